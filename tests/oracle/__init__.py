"""The references against worked values, formulas written once more, and facts of the mathematics."""
