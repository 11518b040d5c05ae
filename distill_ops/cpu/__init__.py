"""The CPU path, by whole-tensor PyTorch operations on chunks of rows."""
