"""What compiled kernels cost, counted without a GPU, and the times that follow:
``python -m benchmarks.static``."""
