"""Losses over a vocabulary that ranks split: who holds what, what is exchanged, and in what order."""
