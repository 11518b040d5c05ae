"""The suite: a folder for each layer that is tested, a file for each form or question."""
