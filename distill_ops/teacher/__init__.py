"""A teacher's most likely tokens: found once, stored, and read back while training."""
