"""A teacher's top-k: made, stored and read back."""
