"""What `make test` leaves to `make test-full`: combinations that are asked for stay, and mutants' killers."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest

from tests.support.covering import cover, mark_the_rest, pairwise


def test_every_pair_of_values_meets():
    axes = {"a": [1, 2, 3], "b": "wxyz", "c": [None, True], "d": ["one"], "e": range(4)}
    rows = pairwise(axes)
    assert 16 <= len(rows) <= 20  # of 96
    for one, other in combinations(axes, 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(product(axes[one], axes[other]))


def test_cover_takes_what_it_is_told_and_then_the_most():
    cases = [{1}, {1, 2}, {2, 3}, {4}, {3, 4}]
    assert cover(cases) == [1, 4]
    assert cover(cases, chosen=[0]) == [0, 2, 3]


class Item(SimpleNamespace):
    """What mark_the_rest sees of a test."""

    def get_closest_marker(self, name):
        return {"covering": self.covering}.get(name)

    def add_marker(self, mark):
        self.full = mark == "full"


def items(*groups, **axes):
    parent = SimpleNamespace(nodeid="file")
    return [
        Item(
            nodeid=f"file::test[{'-'.join(map(str, values))}]", originalname="test", parent=parent,
            callspec=SimpleNamespace(params=dict(zip(axes, values, strict=True))), full=False,
            covering=pytest.mark.covering(*groups).mark,
        )
        for values in product(*axes.values())
    ]  # fmt: skip


def kept(made, always=()):
    mark_the_rest(made, "full", always)
    return [tuple(item.callspec.params.values()) for item in made if not item.full]


def test_each_backend_has_its_cases():
    axes = {"x": [1, 2, 3], "backend": ["torch", "triton"]}
    assert len(kept(items("x", **axes))) == 6
    assert kept(items("x", "backend", **axes)) == [(1, "torch"), (2, "triton"), (3, "torch")]


def test_attributes_are_axes_and_killers_stay():
    axes = {"x": [1 + 0j, 1 + 1j, 2 + 1j], "y": "ab"}
    assert kept(items("x.imag y", **axes)) == [(1, "a"), (1, "b"), (1 + 1j, "a"), (1 + 1j, "b")]
    killer = "file::test[(2+1j)-b]"
    assert kept(items("x.imag", "y", **axes), {killer}) == [(1, "a"), (2 + 1j, "b")]
