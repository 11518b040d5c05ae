"""Options as they pass through the dispatcher: in a list of strings, one of floats and one of integers."""

import math
from typing import Any, get_args, get_origin, get_type_hints

import torch

# What a NamedTuple of options is made of: ("fields", its parts), ("tuple", part), or a leaf
Code = tuple[str, Any]
LISTS = {"str": 0, "dtype": 0, "float": 1, "int": 2, "bool": 2}
MISSING = {"str": "", "dtype": "", "float": math.nan, "int": 0}  # stands for None


def code_of(kind: Any) -> tuple[str, Any]:
    """How values of an annotated type are packed."""
    if get_origin(kind) is tuple:
        return "tuple", code_of(get_args(kind)[0])
    if hasattr(kind, "_fields"):
        return "fields", tuple(code_of(hint) for hint in get_type_hints(kind).values())
    (base,) = [part for part in get_args(kind) or (kind,) if part is not type(None)]
    return base.__name__, None


def pack(code: Code, value: Any, lists: tuple[list, list, list]) -> None:
    """Append a value's parts to the lists of strings, floats and integers."""
    name, inner = code
    if name == "tuple":
        lists[2].append(len(value))
        for item in value:
            pack(inner, item, lists)
    elif name == "fields":
        for part, item in zip(inner, value, strict=True):
            pack(part, item, lists)
    else:
        if value is None:
            value = MISSING[name]
        elif name == "dtype":
            value = str(value).removeprefix("torch.")
        elif name == "float":
            value = float(value)
        lists[LISTS[name]].append(int(value) if name == "bool" else value)


def unpack(code: Code, kind: Any, sources: tuple) -> Any:
    """The value again, from iterators over the lists."""
    name, inner = code
    if name == "tuple":
        item = get_args(kind)[0]
        return tuple(unpack(inner, item, sources) for _ in range(next(sources[2])))
    if name == "fields":
        kinds = get_type_hints(kind).values()
        return kind(*(unpack(c, k, sources) for c, k in zip(inner, kinds, strict=True)))
    value = next(sources[LISTS[name]])
    if name == "bool":
        return bool(value)
    optional = len(get_args(kind)) > 1
    if optional and (value == MISSING[name] or value != value):
        return None
    return getattr(torch, value) if name == "dtype" else value
