"""The token and statistics kernels as their launchers launch them, compiled for GPUs that are not
here: no stack, 16-byte accesses and no barrier in the loops, and at most 12 instructions an element
a sweep of the token kernel."""

import pytest
import torch

pytest.importorskip("triton")

from distill_ops.analysis import aot, forms, sass
from distill_ops.divergences import BUILT_IN

HALF, WIDE = torch.bfloat16, torch.float32
MOST_INSTRUCTIONS = 12  # an element a sweep (the limit set for the token kernel)


def loops_over_tiles(launch, target):
    """Stack bytes of a launch, and its loops that take exponentials of logits."""
    compiled = aot.compile_launch(launch, target)
    if target.backend == "hip":
        assert "global_load_dwordx4" in compiled.asm["amdgcn"]
        return sass.amd_usage(compiled).stack, []
    code, usage = sass.disassemble(compiled)
    loops = [x for x in sass.innermost_loops(code) if x.special and x.bytes_loaded]
    return usage.stack, loops


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("n_cols", [128256, 50257])
@pytest.mark.parametrize("dtype", [HALF, WIDE], ids=str)
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "alone"])
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


ON_EVERY_TARGET = ("reverse_kl", "jensen_shannon")  # with a moment and without one


@pytest.mark.parametrize(
    ("divergence", "target"),
    [(d, t) for d in BUILT_IN for t in aot.TARGETS if d in ON_EVERY_TARGET or t == "sm_90"],
)
def test_statistics_kernel(divergence, target):
    target = aot.TARGETS[target]
    launches = forms.statistics_launches(BUILT_IN[divergence](), 128256, HALF, target)
    assert len(launches) == 2
    for launch in launches:
        stack, loops = loops_over_tiles(launch, target)
        assert stack == 0
        assert all(loop.barriers == 0 and loop.narrow_accesses == 0 for loop in loops)
