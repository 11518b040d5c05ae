"""The top-k kernel's launches, compiled for GPUs that are not here (``test_dense.py``)."""

import pytest
import torch

from tests.support.machine_code import some, stack_and_loops

pytest.importorskip("triton")

from distill_ops import SymmetricKL
from distill_ops.analysis import aot
from distill_ops.analysis.forms import topk_launches
from distill_ops.divergences.base import as_divergence


def launches(divergence, target, *, n_cols=128256, k=64, dtype=torch.bfloat16, **options):
    return topk_launches(as_divergence(divergence), n_cols, k, dtype, target, **options)


def test_a_restricted_student_is_read_at_the_k_alone():
    """Nothing outside is seen with "restrict", nor by a divergence that is infinite at p = 0 without a
    bucket: no sweep."""
    for divergence, tail, hard, swept in [
        ("reverse_kl", "ignore", 0.0, False),
        ("reverse_kl", "ignore", 0.5, True),
        ("reverse_kl", "bucket", 0.0, True),
        ("reverse_kl", "drop", 0.0, True),
        ("jensen_shannon", "restrict", 0.0, False),
        ("alpha_beta", "restrict", 0.5, True),
    ]:
        (launch,) = launches(divergence, aot.TARGETS["sm_90"], tail=tail, hard_label_weight=hard)
        assert launch.arguments["REST"] == (tail in ("bucket", "drop"))
        assert not launch.arguments["EACH"]
        assert (launch.arguments["n_words"] > 0) == swept


def test_scratch_memory_is_a_bit_a_column():
    target = aot.TARGETS["sm_90"]
    (launch,) = launches("forward_kl", target, n_cols=128256)
    words = launch.arguments["words_ptr"]
    assert words.shape[0] == launch.grid[0] == target.facts.n_sm
    assert 128256 / 8 <= 4 * words.shape[1] <= 128256 / 8 + 1024 * 8


# every way a row can go, and what changes the code
FORMS = {
    "bucket": ("jensen_shannon", {}),
    "odd": ("soft_cross_entropy", {"n_cols": 50257}),
    "no gradient": ("skew_forward_kl", {"gradient": "none"}),
    "hard": ("forward_kl", {"hard_label_weight": 0.5}),
    "hard T": ("skew_reverse_kl", {"hard_label_weight": 0.5, "temperature": 2.0}),
    "restricted": ("reverse_kl", {"tail": "ignore"}),
    "restricted hard": ("symmetric_kl", {"tail": "renormalize", "hard_label_weight": 0.5}),
    "each": ("alpha_beta", {"tail": "ignore"}),
    "fp16": ("forward_kl", {"dtype": torch.float16, "gradient": "backward"}),
    "fp32": ("total_variation", {"dtype": torch.float32, "n_cols": 32000, "k": 1}),
    "vocab_size": ("soft_cross_entropy", {"n_cols": 151936, "vocab_size": 151643}),
    "many": ("jensen_shannon", {"k": 1024}),
    "restrict": ("jensen_shannon", {"tail": "restrict"}),
    "restrict hard T": (
        "total_variation",
        {"tail": "restrict", "hard_label_weight": 0.5, "temperature": 2.0},
    ),
    "drop": ("alpha_beta", {"tail": "drop"}),
    "mass terms": (SymmetricKL(0.3), {"tail": "drop", "mass_terms": True, "gradient": "backward"}),
    "floor": ("reverse_kl", {"log_prob_floor": -10.0, "hard_label_weight": 0.5}),
    "many floored": (
        "forward_kl",
        {"tail": "drop", "mass_terms": True, "log_prob_floor": -10.0, "k": 1023},
    ),
    "teacher rows": ("jensen_shannon", {"n_teacher_rows": 1024}),
}


NVIDIA = [(form, "sm_90") for form in FORMS]
NVIDIA += [
    (form, chip)
    for form in ("bucket", "hard T", "each", "many", "restrict hard T", "many floored")
    for chip in ("sm_80", "sm_100")
]


@pytest.mark.parametrize(
    ("form", "target"), some(NVIDIA, [("bucket", "sm_90"), ("teacher rows", "sm_90")])
)
def test_kernel_for_nvidia(form, target):
    """No stack; loops over tiles without barriers, with 16-byte accesses beside a byte of the bitmap."""
    divergence, options = FORMS[form]
    target = aot.TARGETS[target]
    for launch in launches(divergence, target, **options):
        stack, loops = stack_and_loops(launch, target)
        assert stack == 0
        size = launch.arguments["student_ptr"].element_size()
        whole = [
            loop for loop in loops if loop.special > 3 and loop.count("LDG")
            if any(".128" in opcode for opcode in loop.opcodes if opcode.startswith("LDG"))
        ]  # fmt: skip
        swept = launch.arguments["REST"] or launch.arguments["HARD"]
        assert bool(whole) == swept
        for loop in whole:
            wide = sum(n for o, n in loop.opcodes.items() if o.startswith("LDG") and ".128" in o)
            columns = wide * 16 / size
            assert loop.barriers == 0
            # the first sweep reads a byte of the bitmap a vector
            assert loop.narrow_accesses == (0 if loop.stores else wide)
            if columns == 8 * launch.arguments["UNROLL"] and form not in OWN_SWEEPS:
                assert loop.instructions / columns <= (7.25 if loop.stores else 11)


OWN_SWEEPS = "each", "hard T", "restrict hard T"  # which cost more than the others' two
AMD = ["bucket", "odd", "hard T", "restricted", "each", "many", "restrict", "drop", "many floored"]


@pytest.mark.parametrize("form", some(AMD, ["bucket"]))
def test_kernel_for_amd(form):
    divergence, options = FORMS[form]
    target = aot.TARGETS["gfx942"]
    for launch in launches(divergence, target, **options):
        assert stack_and_loops(launch, target, wide=not form.startswith("restrict"))[0] == 0
