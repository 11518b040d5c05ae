"""The public functions and modules, one file a form: they check, choose, and call an operator."""
