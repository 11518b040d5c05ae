"""What tells the settings of a resumed curation apart: data, functions, objects."""

import dataclasses
import functools
import random
import re
import threading
from pathlib import Path

import pytest
import torch

from distill_ops.methods.system2.digests import described, digest


def closing_over(x, default=0):
    def inner(text, default=default):
        return text, x

    return inner


class Plain:
    def __init__(self, x):
        self.x = x


class Slots:
    __slots__ = ("x",)
    __init__ = Plain.__init__


@dataclasses.dataclass
class Data:
    x: object


class Stated(Plain):
    """What it says of itself, as pickle asks."""

    def __getstate__(self):
        return {"x": str(type(self.x))}


def recursive(x):
    def inner(text):
        return inner(text[x:])

    return inner


def lambdas(x):
    return [lambda text: text.lower(), lambda text: text.upper(), lambda text: text[0]][x]


MAKERS = {
    "plain": Plain, "slots": Slots, "dataclass": Data, "nested": lambda x: [Plain({"a": (x,)})],
    "closure": closing_over, "default": lambda x: closing_over(0, default=x), "recursive": recursive,
    "lambda": lambdas, "method": lambda x: Plain(x).__init__, "partial": lambda x: functools.partial(max, x),
    "wrapped": lambda x: functools.wraps(print)(closing_over(x)), "cache": lambda x: functools.lru_cache(closing_over(x)),
    "pattern": lambda x: re.compile(f"a{x}"), "path": lambda x: Path(f"/a/{x}"), "bytes": lambda x: bytes([x]),
    "random": random.Random, "set": lambda x: {"a", x}, "tensor": lambda x: Plain(torch.full((2,), x)),
    "float": lambda x: [float("nan"), float("inf"), 1.0][x], "class": lambda x: [Plain, Data][x],
}  # fmt: skip


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_equal_things_are_one_and_others_are_not(make):
    of = lambda x: digest(described(make(x)))
    assert of(0) == of(0)
    assert of(0) != of(1)


def test_sets_have_no_order():
    assert list({0, 8}) != list({8, 0})  # of a table with 8 places
    assert described({0, 8}) == described({8, 0})


def test_what_nothing_can_be_told_of_is_refused():
    with pytest.raises(TypeError, match="a lock cannot be told from another one .cannot pickle"):
        described({"a": Plain([threading.Lock()])})
    assert described(Stated(threading.Lock())) == described(Stated(threading.Lock()))
    assert described(Stated("")) != described(Stated(1))
