"""Every kernel as its launcher would launch it, compiled for GPUs that are not here.

Asserted on the machine code: no stack (and so no spill), 16-byte accesses and no barrier in the
fast loops, and the counts that the design sets. Opcode counts are NVIDIA's; for AMD, registers
and stack."""

import pytest
import torch

from tests.support.cases import DIVERGENCES
from tests.support.helpers import make_logits
from tests.support.machine_code import CHIPS, some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.kernels import launch, metrics, reduction
from distill_ops.kernels.layout import row_layouts

from benchmarks.static.kernels import entry_rows
from benchmarks.static.launches import BF16, TRAIN, Entry
from benchmarks.static.limits import QUANTITIES, verdict
from distill_ops import JensenShannon, SoftCrossEntropy
from distill_ops.analysis import aot, sass
from distill_ops.analysis.forms import Form, count

HALF, WIDE, FP16 = torch.bfloat16, torch.float32, torch.float16

# what is launched: vocabulary, dtypes of student and teacher, and the options that change the code
FORMS = {
    "bf16": Form(128256),
    "bf16 short": Form(32000),
    "bf16 odd": Form(50257),  # GPT-2's: rows begin anywhere
    "bf16 no gradient": Form(128256, gradient="none"),
    "bf16 hard": Form(151936, hard_label_weight=0.5),
    "bf16 hard T": Form(151936, hard_label_weight=0.5, temperature=2.0),
    "fp16": Form(128256, FP16, FP16, gradient="backward"),
    "fp32": Form(32000, WIDE, WIDE),
    "mixed": Form(32000, HALF, WIDE),
    "vocab_size": Form(151936, vocab_size=151643),
    "mismatched": Form(50257, teacher_stride=50304),
    "teacher rows": Form(128256, n_teacher_rows=1024),
    "teacher rows odd": Form(50257, n_teacher_rows=1024, gradient="backward"),
}


# every form of a divergence with a moment and of one without; of the others those that share least
# of their code. `make static` counts all nine, at two vocabularies, for sm_90 and sm_100.
WHOLE = [SoftCrossEntropy(), JensenShannon()]
OTHERS = [d for d in DIVERGENCES if d.name not in {whole.name for whole in WHOLE}]
CASES = [(d, form) for d in WHOLE for form in FORMS]
CASES += [(d, form) for d in OTHERS for form in ("bf16", "bf16 hard T", "fp32")]
NVIDIA = [(d, form, "sm_90") for d, form in CASES]
NVIDIA += [(d, "bf16 hard T", "sm_100") for d in OTHERS] + [(d, "bf16", "sm_80") for d in OTHERS]
AMD = [(d, form) for d, form in CASES if form in ("bf16", "bf16 odd")]
SOME = [(SoftCrossEntropy(), "bf16 odd", "sm_90"), (JensenShannon(), "bf16 hard T", "sm_90")]
SOME += [(SoftCrossEntropy(), "teacher rows", "sm_90")]


def name_of(value):
    return value if isinstance(value, str) else value.name


@pytest.mark.parametrize(("divergence", "form", "target"), some(NVIDIA, SOME), ids=name_of)
def test_dense_kernel_for_nvidia(divergence, form, target):
    target = aot.TARGETS[target]
    launches = FORMS[form].launches(divergence, target)
    assert len(launches) == (2 if FORMS[form].gradient == "backward" else 1)
    for launched in launches:
        counts = count(launched, target)
        assert counts.usage.stack == 0
        fast = counts.fast()
        assert ("differentiate" in fast) == launched.arguments["WRITE_GRADIENT"]
        assert ("normalise" in fast) == launched.arguments["WRITE_LOSS"]
        loops = [loop for sweep in counts.sweeps.values() for loop in sweep]
        assert all(loop.barriers == 0 for loop in loops)
        if form == "mixed":  # the bf16 tensor of the two: 8 bytes for 4 logits
            continue
        if form in ("mismatched", "teacher rows odd"):  # the teacher's begin elsewhere
            continue
        assert all(loop.narrow_accesses == 0 for loop in fast.values())


@pytest.mark.parametrize(
    ("divergence", "form"), some(AMD, [(JensenShannon(), "bf16")]), ids=name_of
)
def test_dense_kernel_for_amd(divergence, form):
    target = aot.TARGETS["gfx942"]
    for launched in FORMS[form].launches(divergence, target):
        wide = form not in ("mixed", "mismatched", "teacher rows odd")
        assert stack_and_loops(launched, target, wide)[0] == 0


def test_chosen_rows_cost_a_load_a_row():
    """The loops over tiles are the same ones."""
    target = aot.TARGETS["sm_90"]
    plain, chosen = (
        count(FORMS[form].launches(SoftCrossEntropy(), target)[0], target)
        for form in ("bf16", "teacher rows")
    )
    assert chosen.instructions() == plain.instructions()
    assert chosen.usage.stack == 0


def test_instructions_of_one_divergence():
    """The limit on the page, of code compiled here; the others' are in its JSON."""
    target = aot.TARGETS["sm_90"]
    _, (row,) = entry_rows(Entry("dense", TRAIN, BF16, "jensen_shannon"), target)
    quantity = "instructions"
    assert verdict("jensen_shannon", quantity, getattr(row, QUANTITIES[quantity])) is None


EVEN_AND_ODD = [
    (dtype, n, chip) for dtype in (HALF, WIDE) for n in (128256, 50257) for chip in aot.TARGETS
]


@pytest.mark.parametrize(
    ("dtype", "n_cols", "target"),
    some(EVEN_AND_ODD, [(HALF, 128256, chip) for chip in CHIPS]),
    ids=str,
)
def test_metrics_kernel(dtype, n_cols, target):
    target = aot.TARGETS[target]
    student, teacher = (torch.empty(64, n_cols, dtype=dtype, device="meta") for _ in range(2))
    sums = torch.empty(metrics.N_SUMS, 64, device="meta")
    agreement = torch.empty(64, dtype=torch.uint8, device="meta")
    call = lambda: metrics.run(student, teacher, 2.0, n_cols, sums, agreement)
    (launched,) = aot.record(call, target.facts)
    stack, loops = stack_and_loops(launched, target)
    assert stack == 0
    whole = [loop for loop in loops if loop.special > 8]
    assert len(whole) >= 2 or target.backend == "hip"
    assert all(loop.barriers == 0 for loop in whole)
    assert min((loop.narrow_accesses for loop in whole), default=0) == 0


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("target", some(aot.TARGETS, CHIPS))
def test_kernels_over_tokens(target, every):
    """The three in one form, and in every."""
    target = aot.TARGETS[target]
    meta = {"device": "meta"}
    mask, labels = torch.empty(8192, **meta), torch.empty(8192, dtype=torch.int64, **meta)
    losses, components = torch.empty(8192, **meta), torch.empty(2, 8192, **meta)

    def call():
        weights, total = reduction.token_weights(mask.bool(), labels, -100)
        reduction.total(losses, components, weights, total)
        if every:
            reduction.token_weights(None, labels, -100)
            reduction.token_weights(mask.int(), None, -100)
            reduction.total(losses, components[:0], None, 17.0)

    recorded = aot.record(call, target.facts)
    assert len(recorded) == (5 if every else 2)
    for launched in recorded:
        assert stack_and_loops(launched, target, wide=False)[0] == 0


SCALED = [(dtype, chip) for dtype in (HALF, FP16, WIDE) for chip in aot.TARGETS]


@pytest.mark.parametrize(
    ("dtype", "target"), some(SCALED, [(HALF, chip) for chip in CHIPS]), ids=str
)
def test_scale_kernel(dtype, target):
    """16-byte loads and stores, two a turn, whatever the length: the compiler is told nothing of it."""
    target = aot.TARGETS[target]
    gradient = torch.empty(8191, 50257, dtype=dtype, device="meta")
    call = lambda: reduction.scale_(gradient, torch.empty((), device="meta"))
    (launched,) = aot.record(call, target.facts)
    (length,) = [p for p in launched.kernel.params if p.name == "n_elements"]
    assert length.do_not_specialize
    compiled = aot.compile_launch(launched, target)
    if target.backend == "hip":
        assert sass.amd_usage(compiled).stack == 0
        assert "global_load_dwordx4" in compiled.asm["amdgcn"]
        assert "global_store_dwordx4" in compiled.asm["amdgcn"]
        return
    code, usage = sass.disassemble(compiled)
    assert usage.stack == 0
    (loop,) = [loop for loop in sass.innermost_loops(code) if loop.stores]
    assert loop.barriers == 0
    assert loop.narrow_accesses == 0
    assert (loop.bytes_loaded, loop.stores) == (32, 2)


# --- launch choices and layouts, which are pure --------------------------------------------------


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("n_cols", [1, 100, 32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("budget", [launch.MATCHED, launch.SCATTERED], ids=["matched", "scattered"])
def test_launch_choice(target, n_cols, itemsize, budget):
    facts = aot.TARGETS[target].facts
    row_bytes = 2 * itemsize * n_cols
    choice = launch.dense_launch(4096, n_cols, itemsize, row_bytes, budget, facts)
    threads = choice.num_warps * facts.warp_size
    assert threads <= 1024
    assert choice.lanes == threads
    assert choice.width * itemsize == launch.LOAD_BYTES
    a_multiprocessor = choice.n_programs / facts.n_sm
    assert a_multiprocessor == int(a_multiprocessor) >= 1
    assert a_multiprocessor * threads == budget.threads
    assert a_multiprocessor * threads * (choice.maxnreg or 64) <= 65536
    assert launch.dense_launch(3, n_cols, itemsize, row_bytes, budget, facts).n_programs <= 3


def test_rows_in_flight_fit_the_cache_where_two_programs_are_chosen():
    facts = aot.TARGETS["sm_90"].facts
    short = launch.dense_launch(8192, 32000, 2, 128000, launch.MATCHED, facts)
    assert short.n_programs == 2 * facts.n_sm
    assert short.n_programs * 128000 <= facts.l2_bytes
    long = launch.dense_launch(8192, 128256, 2, 513024, launch.MATCHED, facts)
    assert long.n_programs == facts.n_sm


def test_layout_of_rows():
    student, teacher = make_logits((3, 5, 24))
    n_inner, (rows,) = row_layouts(student)
    assert (n_inner, rows.offsets(), rows.aligned()) == (15, (0, 0, 24), True)
    # a shifted view needs two strides, and begins away from a boundary
    n_inner, (rows, other) = row_layouts(student[:, 1:, :21], teacher[:, 1:, :21])
    assert (n_inner, rows.offsets()) == (4, (0, 120, 24))
    assert rows.base.data_ptr() == student.data_ptr() + 24 * 4
    assert rows.matches(other)
    n_inner, (rows,) = row_layouts(student[..., 3:])
    assert rows.offsets() == (3, 0, 24)
    assert not rows.aligned()
    assert rows.base.data_ptr() == student.data_ptr()
    odd, _ = make_logits((6, 21))
    _, (rows,) = row_layouts(odd)
    assert not rows.aligned()
    assert rows.matches(row_layouts(odd)[1][0])
