"""The linear form's blocked products: logits of a head that never exist all at once."""
