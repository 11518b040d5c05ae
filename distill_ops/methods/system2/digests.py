"""What a curation depends on, as a digest that is the same in every process."""

import json
from collections.abc import Callable, Mapping
from copyreg import dispatch_table
from functools import partial
from hashlib import sha256
from types import CodeType, ModuleType
from typing import Any

import torch

from ...scalars import shown

_encode = json.JSONEncoder(sort_keys=True, allow_nan=False).encode


def digest(value: Any) -> str:
    return sha256(_encode(value).encode()).hexdigest()[:16]


def input_digest(index: int, value: Any) -> str:
    """Of an input, which must be a string or a mapping of JSON's types."""
    if isinstance(value, Mapping):
        value = dict(value)
    elif not isinstance(value, str):
        raise TypeError(f"input {index} must be a str or a mapping of fields, got {shown(value)}")
    try:
        return digest(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"input {index} must hold what JSON holds ({error}), got {shown(value)}"
        ) from None


def described(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """What tells a value from others, as JSON: data, functions, and of objects what pickle keeps.

    A function is its name, what it closes over and its defaults; one without a name is its compiled code.

    Raises:
        TypeError: a value that pickle does not take, as a lock or an open file.
    """
    if isinstance(value, float):
        return value if abs(value) < float("inf") else repr(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, bytes):
        return ["bytes", sha256(value).hexdigest()]
    if isinstance(value, ModuleType):
        return ["module", value.__name__]
    if id(value) in within:
        return ["itself"]
    of = partial(described, within=within | {id(value)})
    if isinstance(value, Mapping):
        return {str(name): of(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [of(x) for x in value]
    if isinstance(value, set | frozenset):  # whose order differs between processes
        return ["set", sorted(_encode(of(x)) for x in value)]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), of(value.co_consts)]
    if isinstance(value, torch.Tensor):  # of which pickle keeps an address
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return ["tensor", str(value.dtype), list(value.shape), of(raw.numpy().tobytes())]
    if hasattr(value, "__qualname__"):
        return _named(value, of)
    kind = type(value)
    try:
        kept = dispatch_table[kind](value) if kind in dispatch_table else value.__reduce_ex__(4)
    except Exception as error:
        raise TypeError(f"a {kind.__name__} cannot be told from another one ({error})") from error
    if isinstance(kept, tuple):
        kept = [*kept[:3], *(list(items) for items in kept[3:5] if items is not None)]
    return [f"{kind.__module__}.{kind.__qualname__}", of(kept)]


def _named(value: Any, of: Callable[[Any], Any]) -> list:
    """A function, a method, or a class."""
    found = [getattr(value, "__module__", None), value.__qualname__]
    if isinstance(value, type):
        return found
    names = ("__self__", "__defaults__", "__kwdefaults__", "__wrapped__")
    held = {name: getattr(value, name, None) for name in names}
    code = getattr(value, "__code__", None)
    if code is not None:
        cells = getattr(value, "__closure__", None) or ()
        for name, cell in zip(code.co_freevars, cells, strict=False):
            try:
                held[f"closes over {name}"] = cell.cell_contents
            except ValueError:  # nothing in it yet
                pass
        if code.co_name == "<lambda>":
            held["code"] = code
    return [*found, {name: of(x) for name, x in held.items() if x is not None}]
