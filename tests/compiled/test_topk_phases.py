"""The top-k loss's launches over parts of rows, compiled for GPUs that are not here: no stack, and no barrier
in the loops over tiles, which cost what the whole rows' kernel does (``test_topk.py``)."""

import pytest
import torch

from tests.support.machine_code import CHIPS, some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.analysis import aot, sass
from distill_ops.analysis.forms import topk_phase_launch
from distill_ops.divergences.built_in import BUILT_IN
from tests.support.declared import chi_squared

DIVERGENCES = {**BUILT_IN, "declared": chi_squared}

# instructions an element; of a divergence that sees each column outside the K, "each"
MOST = {"normalise": 11, "differentiate": 7, "each reduce": 40, "each differentiate": 40}
CASES = [
    (phase, tail, divergence, temperature, target)
    for phase in ("normalise", "reduce", "differentiate")
    for tail, divergence in (
        ("bucket", "forward_kl"), ("renormalize", "alpha_beta"), ("drop", "reverse_kl"),
        ("restrict", "declared"),
    )
    for temperature in (1.0, 2.0)
    for target in ("sm_90", "sm_100", "gfx942")
]  # fmt: skip
KEPT = [
    ("normalise", "bucket", "forward_kl", 1.0, "sm_90"),
    ("reduce", "renormalize", "alpha_beta", 1.0, "sm_90"),
    ("differentiate", "bucket", "forward_kl", 1.0, "sm_90"),
    ("differentiate", "drop", "reverse_kl", 2.0, "gfx942"),
]


@pytest.mark.parametrize(
    ("phase", "tail", "divergence", "temperature", "target"), some(CASES, KEPT)
)
def test_topk_phase(phase, tail, divergence, temperature, target):
    target = aot.TARGETS[target]
    launch = topk_phase_launch(
        phase, DIVERGENCES[divergence](), 64128, 64, torch.bfloat16, target, tail=tail,
        temperature=temperature, hard_label_weight=0.5 if temperature != 1 else 0.0,
    )  # fmt: skip
    swept = phase == "differentiate" or any(launch.arguments.get(x) for x in ("REST", "HARD"))
    stack, loops = stack_and_loops(launch, target, wide=swept)
    assert stack == 0
    if target.backend == "hip":
        return
    each = "each " if launch.arguments.get("EACH") else ""
    if each + phase in MOST and (tail == "bucket" or each) and temperature == 1:
        whole = [loop for loop in loops if loop.special and loop.bytes_loaded >= 16]
        assert all(loop.barriers == 0 for loop in whole)
        columns = lambda loop: loop.bytes_loaded / (17 / 8 if phase != "differentiate" else 2)
        cost = min(loop.instructions / columns(loop) for loop in whole)
        assert cost <= MOST[each + phase], cost


@pytest.mark.parametrize("target", some(aot.TARGETS, CHIPS[:1]))
def test_combining(target):
    """No stack, and few registers: a row is a thread."""
    target = aot.TARGETS[target]
    launch = topk_phase_launch(
        "combined", BUILT_IN["reverse_kl"](), 64128, 64, torch.bfloat16, target, temperature=2.0,
        hard_label_weight=0.5,
    )  # fmt: skip
    compiled = aot.compile_launch(launch, target)
    nvidia = target.backend == "cuda"
    usage = sass.disassemble(compiled)[1] if nvidia else sass.amd_usage(compiled)
    assert usage.stack == 0
    assert usage.registers <= 96
