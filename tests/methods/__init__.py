"""Training methods: their estimators against their targets, by enumeration, and against the references."""
