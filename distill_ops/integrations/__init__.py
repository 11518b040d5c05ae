"""Drop-in replacements with the signature of the original."""
