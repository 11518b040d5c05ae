"""Every check of a user's arguments, before any kernel runs; one file a kind of argument."""
