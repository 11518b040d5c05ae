"""The operators that PyTorch knows, one file a form; all are made by ``register.py``."""
