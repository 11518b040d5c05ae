"""What the kernels cost, read from their compiled code: no GPU needed."""
