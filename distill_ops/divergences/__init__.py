"""The divergences: what one is, the nine built-in ones, and a user's own."""
