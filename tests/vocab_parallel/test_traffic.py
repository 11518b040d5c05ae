"""What ranks send each other, and the memory that a rank takes: counted, and held to their limits."""

import pytest
import torch

from tests.support.cases import LABELS
from tests.vocab_parallel.cases import DIVERGENCES, WIDTHS, Case
from tests.vocab_parallel.work import Traffic, memory, traffic

ONE = ("soft_cross_entropy", "forward_kl", "reverse_kl")  # their sums follow from the moments
N_TOKENS = LABELS.numel()
MIB = 1 << 20
HARD = {"labels": LABELS, "hard_label_weight": 0.4}

divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


def numbers(counted: Traffic, dtype: torch.dtype) -> float:
    """Floating-point numbers a token that a rank sent."""
    return counted.bytes / dtype.itemsize / N_TOKENS


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@divergences
def test_collectives_and_numbers_a_token(divergence, gradient, ranks):
    wanted = 1 if divergence.name in ONE else 2
    limit = 12 if divergence.name == "soft_cross_entropy" else 16
    for options, dtype in ((HARD, torch.float32), ({}, torch.float64)):
        options = {**options, "divergence": divergence, "gradient": gradient}
        for forward, backward in ranks.call(3, traffic, Case(WIDTHS[3], options, dtype)):
            assert forward.collectives == wanted
            assert 0 < numbers(forward, dtype) <= limit
            assert backward == Traffic(0, 0)


@divergences
def test_the_widths_are_one_more(divergence, ranks):
    case = Case(WIDTHS[2], {"divergence": divergence})
    ways = "offset", "nothing"
    given, unknown = (ranks.call(2, traffic, case._replace(told=told)) for told in ways)
    for (forward, _), (more, backward) in zip(given, unknown, strict=True):
        assert more.collectives == forward.collectives + 1
        assert more.bytes - forward.bytes <= 16  # the widths, whatever the number of tokens
        assert backward == Traffic(0, 0)


def test_hard_labels_alone_are_one_collective(ranks):
    for dtype in (torch.float32, torch.float64):
        case = Case(WIDTHS[2], {"labels": LABELS, "hard_label_weight": 1.0}, dtype)
        for forward, backward in ranks.call(2, traffic, case):
            assert forward.collectives == 1
            assert numbers(forward, dtype) <= 12
            assert backward == Traffic(0, 0)


def test_a_rank_sends_as_much_to_many_as_to_few(ranks):
    """Counted is what it gives to a collective, not what comes back."""
    two, four = (
        ranks.call(n, traffic, Case(WIDTHS[n], {"divergence": "reverse_kl"})) for n in (2, 4)
    )
    assert set(two) == set(four)


def test_one_more_collective_is_seen(ranks):
    case = Case(WIDTHS[2], {})
    for (before, _), (after, _) in zip(
        ranks.call(2, traffic, case), ranks.call(2, traffic, case, 1), strict=True
    ):
        assert after == Traffic(before.collectives + 1, before.bytes + 4)


SHAPE = 640, 16384  # of a rank: 40 MiB, more than the limit allows beside the gradient


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("reverse_kl", {"gradient": "backward", "labels": True, "hard_label_weight": 0.4}),
        ("jensen_shannon", {}),
    ],
)
def test_memory(divergence, options, ranks):
    options = {**options, "divergence": divergence}
    if "labels" in options:
        options["labels"] = torch.arange(SHAPE[0])
    gradient = 4 * SHAPE[0] * SHAPE[1]
    for peak in ranks.call(2, memory, SHAPE, options):
        assert gradient <= peak <= gradient + 32 * MIB, f"{peak / MIB:.1f} MiB"
