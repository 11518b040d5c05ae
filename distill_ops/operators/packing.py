"""Options as they pass through the dispatcher: in a list of strings, one of floats and one of integers."""

import math
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch


class Code(NamedTuple):
    """How values of a type are packed, read from its annotation once."""

    name: str  # "fields" of a NamedTuple, "tuple", or a leaf's type
    parts: tuple  # of the fields, or of the tuple's entries: codes
    kind: Any = None  # the NamedTuple
    optional: bool = False  # whether None is a value


LISTS = {"str": 0, "dtype": 0, "float": 1, "int": 2, "bool": 2}
MISSING = {"str": "", "dtype": "", "float": math.nan, "int": 0}  # stands for None


def code_of(kind: Any) -> Code:
    """How values of an annotated type are packed."""
    if get_origin(kind) is tuple:
        return Code("tuple", (code_of(get_args(kind)[0]),))
    if hasattr(kind, "_fields"):
        return Code("fields", tuple(map(code_of, get_type_hints(kind).values())), kind)
    given = get_args(kind) or (kind,)
    (base,) = [part for part in given if part is not type(None)]
    return Code(base.__name__, (), optional=len(given) > 1)


def pack(code: Code, value: Any, lists: tuple[list, list, list]) -> None:
    """Append a value's parts to the lists of strings, floats and integers."""
    name = code.name
    if name == "tuple":
        lists[2].append(len(value))
        for item in value:
            pack(code.parts[0], item, lists)
    elif name == "fields":
        for part, item in zip(code.parts, value, strict=True):
            pack(part, item, lists)
    else:
        if value is None:
            value = MISSING[name]
        elif name == "dtype":
            value = str(value).removeprefix("torch.")
        elif name == "float":
            value = float(value)
        lists[LISTS[name]].append(int(value) if name == "bool" else value)


def unpack(code: Code, sources: tuple) -> Any:
    """The value again, from iterators over the lists."""
    name = code.name
    if name == "tuple":
        return tuple(unpack(code.parts[0], sources) for _ in range(next(sources[2])))
    if name == "fields":
        return code.kind(*[unpack(part, sources) for part in code.parts])
    value = next(sources[LISTS[name]])
    if name == "bool":
        return bool(value)
    if code.optional and (value == MISSING[name] or value != value):
        return None
    return getattr(torch, value) if name == "dtype" else value
