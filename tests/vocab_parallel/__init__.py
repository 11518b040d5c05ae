"""A vocabulary split among ranks: every form, on processes of gloo and on threads under the interpreter."""
