"""The launches over parts of rows, compiled for GPUs that are not here (``test_dense.py``): no stack,
16-byte accesses and no barrier in the loops over tiles, and no more instructions than the dense kernel's
sweeps of which they are made."""

import pytest
import torch

from tests.support.machine_code import CHIPS, some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.analysis import aot, sass
from distill_ops.analysis.forms import Form, count, phase_launch
from distill_ops.divergences.built_in import BUILT_IN
from tests.support.declared import chi_squared

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
    ("normalise", "jensen_shannon", 64128, 1.0, "gfx942"),
    ("reduce", "jensen_shannon", 64128, 1.0, "sm_90"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "divergence", "n_cols", "temperature", "target"), some(CASES, KEPT)
)
def test_phase(phase, divergence, n_cols, temperature, target):
    target, divergence = aot.TARGETS[target], DIVERGENCES[divergence]()
    label = 0.5 if temperature != 1 else 0.0
    launch = phase_launch(
        phase, divergence, n_cols, torch.bfloat16, target,
        temperature=temperature, hard_label_weight=label,
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
    form = Form(n_cols, gradient="none", hard_label_weight=label, temperature=temperature)
    dense = count(*form.launches(divergence, target), target).fast()
    # symmetric KL's second sweep is rare there; a declared one's first has a moment here
    if phase in dense and (phase == "reduce" or divergence.name in BUILT_IN):
        most = dense[phase].instructions / columns(dense[phase])
        assert min(loop.instructions / columns(loop) for loop in whole) <= 1.05 * most


COMBINED = [
    ("combine", "soft_cross_entropy", 1.0), ("combine", "reverse_kl", 2.0), ("combine", "jensen_shannon", 1.0),
    ("combine sums", "jensen_shannon", 2.0),
]  # fmt: skip


@pytest.mark.parametrize("target", some(aot.TARGETS, CHIPS[:1]))
def test_combining(target):
    """No stack, and few registers: a row is a thread."""
    for phase, divergence, temperature in COMBINED:
        launch = phase_launch(
            phase, BUILT_IN[divergence](), 64128, torch.bfloat16, aot.TARGETS[target],
            temperature=temperature, hard_label_weight=0.5 if temperature != 1 else 0.0,
        )  # fmt: skip
        compiled = aot.compile_launch(launch, aot.TARGETS[target])
        nvidia = aot.TARGETS[target].backend == "cuda"
        usage = sass.disassemble(compiled)[1] if nvidia else sass.amd_usage(compiled)
        assert usage.stack == 0
        assert usage.registers <= 96
