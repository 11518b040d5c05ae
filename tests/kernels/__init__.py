"""Device code by itself, in Triton's interpreter."""
