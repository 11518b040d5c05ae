"""What stands between a caller and the numbers: operators, validation, the package, processes."""
