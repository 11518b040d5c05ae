"""Triton's interpreter without the half of its time that it spends on looking for its builtins.

Each call of a device function goes through all names of ``triton.language`` for those that the launch
has not replaced yet; within a launch there are none. The first of a module's tells for all of them:
they are replaced together, and given back together.
"""

import functools
import inspect


def look_for_builtins_once():
    """Replace the interpreter's search; nothing where this Triton has another."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    search = getattr(interpreter, "_patch_builtin", None)
    if search is None:
        return
    first = {}

    @functools.wraps(search)
    def replace_builtins(package, *more):
        if package not in first:
            members = inspect.getmembers(package)
            first[package] = next((name for name, x in members if is_builtin(x)), None)
        name = first[package]
        if name is not None and is_builtin(getattr(package, name)):
            search(package, *more)

    interpreter._patch_builtin = replace_builtins
