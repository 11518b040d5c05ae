"""The token, gather and statistics kernels as their launchers launch them, compiled for GPUs that are not
here: no stack, 16-byte accesses and no barrier in the loops, and at most 12 instructions an element
a sweep of the token and gather kernels."""

import pytest
import torch

from tests.support.machine_code import CHIPS, some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.analysis import aot, forms
from distill_ops.divergences.built_in import BUILT_IN

HALF, WIDE = torch.bfloat16, torch.float32
MOST_INSTRUCTIONS = 12  # an element a sweep (the limit set for the token kernel)


def loops_over_tiles(launch, target):
    """Stack bytes of a launch, and its loops that take exponentials of logits."""
    stack, loops = stack_and_loops(launch, target)
    return stack, [x for x in loops if x.special and x.bytes_loaded]


TOKEN = [
    (entropy, dtype, n_cols, chip)
    for entropy in (True, False) for dtype in (HALF, WIDE) for n_cols in (128256, 50257)
    for chip in aot.TARGETS
]  # fmt: skip


@pytest.mark.parametrize(
    ("entropy", "dtype", "n_cols", "target"),
    some(TOKEN, [(True, HALF, 128256, chip) for chip in CHIPS]),
    ids=str,
)
def test_token_kernel(entropy, dtype, n_cols, target):
    target = aot.TARGETS[target]
    launches = forms.token_launches(n_cols, dtype, entropy, target)
    assert len(launches) == 2
    for launch in launches:
        stack, loops = loops_over_tiles(launch, target)
        assert stack == 0
        if target.backend == "hip":
            continue
        assert all(loop.barriers == 0 for loop in loops)
        whole = [loop for loop in loops if loop.narrow_accesses == 0]
        columns = lambda loop: loop.bytes_loaded / dtype.itemsize
        assert min(loop.instructions / columns(loop) for loop in whole) <= MOST_INSTRUCTIONS
        assert max(columns(loop) for loop in whole) >= 2 * launch.arguments["WIDTH"]


GATHER = [
    (k, dtype, n_cols, chip)
    for k, dtype, n_cols in (
        (64, HALF, 128256), (64, HALF, 50257), (64, WIDE, 50257), (1024, HALF, 128256),
    )
    for chip in aot.TARGETS
]  # fmt: skip


@pytest.mark.parametrize(
    ("k", "dtype", "n_cols", "target"),
    some(GATHER, [(64, HALF, 50257, "sm_90"), (1024, HALF, 128256, "gfx942")]),
    ids=str,
)
def test_gather_kernel(k, dtype, n_cols, target):
    """The token kernel's sweep and no more, at an odd vocabulary too."""
    target = aot.TARGETS[target]
    (launch,) = forms.gather_launches(n_cols, k, dtype, target, masked=k == 1024)
    stack, loops = loops_over_tiles(launch, target)
    assert stack == 0
    if target.backend == "hip":
        return
    assert loops
    assert all(loop.barriers == 0 for loop in loops)
    whole = [loop for loop in loops if loop.narrow_accesses == 0]
    columns = lambda loop: loop.bytes_loaded / dtype.itemsize
    assert min(loop.instructions / columns(loop) for loop in whole) <= MOST_INSTRUCTIONS
    assert max(columns(loop) for loop in whole) >= 2 * launch.arguments["WIDTH"]


ON_EVERY_TARGET = ("reverse_kl", "jensen_shannon")  # with a moment and without one


STATISTICS = [(d, t) for d in BUILT_IN for t in aot.TARGETS if d in ON_EVERY_TARGET or t == "sm_90"]


@pytest.mark.parametrize(
    ("divergence", "target"), some(STATISTICS, [("jensen_shannon", chip) for chip in CHIPS])
)
def test_statistics_kernel(divergence, target):
    target = aot.TARGETS[target]
    launches = forms.statistics_launches(BUILT_IN[divergence](), 128256, HALF, target)
    assert len(launches) == 2
    for launch in launches:
        stack, loops = loops_over_tiles(launch, target)
        assert stack == 0
        assert all(loop.barriers == 0 and loop.narrow_accesses == 0 for loop in loops)
