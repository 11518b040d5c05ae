"""What a loss holds in memory, by formulas: no tensor is made."""
