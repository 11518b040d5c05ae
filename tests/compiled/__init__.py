"""Kernels compiled for GPUs that are not here, and what the static page says of them."""
