"""The launches over parts of rows, compiled for GPUs that are not here (``test_dense.py``): no stack,
16-byte accesses and no barrier in the loops over tiles."""

import pytest
import torch

from tests.support.machine_code import some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.analysis import aot
from distill_ops.analysis.forms import phase_launch
from distill_ops.divergences.built_in import BUILT_IN
from tests.support.declared import chi_squared

MOST = {"normalise": 11, "reduce": 17}  # instructions an element
DIVERGENCES = {**BUILT_IN, "declared": chi_squared}

# what changes the code; T = 2 is with a hard label
CASES = [
    (phase, divergence, n_cols, temperature, target)
    for phase, divergences in {
        "normalise": ("soft_cross_entropy", "symmetric_kl", "jensen_shannon", "declared"),
        "reduce": ("symmetric_kl", "jensen_shannon", "skew_reverse_kl", "declared"),
    }.items()
    for divergence in divergences
    for n_cols, temperature in ((64128, 1.0), (50257, 2.0))
    for target in ("sm_90", "sm_100", "gfx942")
]  # fmt: skip
KEPT = [
    ("normalise", "symmetric_kl", 50257, 2.0, "sm_100"),
    ("normalise", "soft_cross_entropy", 64128, 1.0, "sm_90"),
    ("normalise", "jensen_shannon", 64128, 1.0, "gfx942"),
    ("reduce", "jensen_shannon", 64128, 1.0, "sm_90"),
    ("reduce", "symmetric_kl", 64128, 1.0, "gfx942"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "divergence", "n_cols", "temperature", "target"), some(CASES, KEPT)
)
def test_phase(phase, divergence, n_cols, temperature, target):
    target = aot.TARGETS[target]
    launch = phase_launch(
        phase, DIVERGENCES[divergence](), n_cols, torch.bfloat16, target,
        temperature=temperature, hard_label_weight=0.5 if temperature != 1 else 0.0,
    )  # fmt: skip
    stack, loops = stack_and_loops(launch, target)
    assert stack == 0
    if target.backend == "hip":
        return
    loops = [loop for loop in loops if loop.special and loop.bytes_loaded]
    assert all(loop.barriers == 0 for loop in loops)
    whole = [loop for loop in loops if loop.narrow_accesses == 0 and not loop.guarded]
    columns = lambda loop: loop.bytes_loaded / 4
    assert max(columns(loop) for loop in whole) >= launch.arguments["WIDTH"]
    assert min(loop.instructions / columns(loop) for loop in whole) <= MOST[phase]
