"""Training methods over the fused functions, in plain PyTorch: one file a method."""
