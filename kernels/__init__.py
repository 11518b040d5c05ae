"""Device code of distill_ops, installed as ``distill_ops.kernels``."""
