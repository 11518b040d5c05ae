"""The elementwise kernels of a head, and the dense and the statistics kernel on its blocks, compiled for
GPUs that are not here; their launch choices."""

import pytest
import torch

from tests.support.machine_code import CHIPS, some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.kernels import launch
from distill_ops.kernels import logits as logits_kernels
from distill_ops.kernels.sweeps import TAIL

from distill_ops import linear_distillation_loss, linear_distillation_statistics
from distill_ops.analysis import aot
from distill_ops.analysis.forms import count
from distill_ops.api import choices
from distill_ops.heads.products import rows_buffer
from distill_ops.operators import transforms

HALF, WIDE = torch.bfloat16, torch.float32

# dtypes of product, logits and bias
FORMS = {
    "float32": (WIDE, WIDE, WIDE),
    "bfloat16": (HALF, HALF, HALF),
    "to bfloat16": (WIDE, HALF, HALF),
}


CASES = [(form, chip) for form in FORMS for chip in aot.TARGETS]


@pytest.mark.parametrize(("form", "target"), some(CASES, [("float32", chip) for chip in CHIPS]))
def test_head_kernels(form, target):
    """No stack; 16-byte accesses and no barrier in the loops over rows; tanh by one exponential."""
    target = aot.TARGETS[target]
    source, dtype, bias_dtype = FORMS[form]
    n_cols = 50257  # an odd one, whose rows are padded
    meta = lambda dtype: rows_buffer(512, n_cols, dtype, torch.device("meta"), True)
    product, logits = meta(source), meta(dtype)
    logits = product if source == dtype else logits
    bias = torch.empty(n_cols, dtype=bias_dtype, device="meta")

    def call():
        logits_kernels.finish(product, logits, bias, 0.5, 30.0)
        logits_kernels.finish(product, logits, bias, 0.5, None)
        logits_kernels.finish(product, logits, None, 0.5, 30.0)
        logits_kernels.softcap_gradient_(meta(HALF), logits, 30.0)

    recorded = aot.record(call, target.facts)
    assert len(recorded) == 4
    for launched, special in zip(recorded, (2, 0, 2, 0), strict=True):
        stack, loops = stack_and_loops(launched, target)
        assert stack == 0
        if target.backend == "hip":
            continue
        (loop,) = [x for x in loops if x.stores]
        assert loop.barriers == 0
        assert loop.narrow_accesses == 0
        assert loop.special == 8 * special  # of 8 columns: an exponential and a reciprocal each
        assert loop.instructions <= 8 * (24 if special else 9)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("n_cols", [1, 2048, 2049, 128256])
@pytest.mark.parametrize("n_rows", [1, 512, 8192])
def test_launch_choice(n_rows, n_cols, target):
    facts = aot.TARGETS[target].facts
    choice = launch.head_launch(n_rows, n_cols, facts)
    across, down = choice.grid
    assert choice.num_warps * facts.warp_size == choice.lanes
    assert (across - 1) * 8 * choice.lanes < n_cols <= across * 8 * choice.lanes
    assert 1 <= down <= n_rows
    assert across * down >= min(across * n_rows, 8 * facts.n_sm)


BLOCKS = [(d, dtype) for d in ("forward_kl", "jensen_shannon") for dtype in (WIDE, HALF)]


@pytest.mark.parametrize(
    ("divergence", "logits_dtype"), some(BLOCKS, [("jensen_shannon", WIDE)]), ids=str
)
def test_dense_kernel_on_blocks(divergence, logits_dtype, monkeypatch):
    """Padded rows: the aligned form at an odd vocabulary, the gradient in its own dtype beside the
    logits or in their place."""
    target = aot.TARGETS["sm_90"]
    monkeypatch.setattr(choices, "INTERPRETED", True)  # the Triton path without a GPU
    monkeypatch.setattr(transforms, "dispatches", lambda *_: False)  # whose fakes launch nothing
    empty = lambda *shape: torch.empty(*shape, dtype=HALF, device="meta")
    hidden, weight = empty(4096, 64).requires_grad_(), empty(50257, 64).requires_grad_()
    launches = aot.record(
        lambda: linear_distillation_loss(
            hidden, weight, empty(4096, 64), empty(50257, 64), divergence=divergence,
            logits_dtype=logits_dtype, backend="triton",
        ), target.facts,
    )  # fmt: skip
    launches = [launch for launch in launches if launch.kernel.__name__ == "dense_kernel"]
    counts = count(launches[0], target)
    assert len(launches) > 1
    assert launches[0].arguments["ENDS"] == TAIL.value
    assert counts.usage.stack == 0
    assert all(loop.barriers == 0 for sweep in counts.sweeps.values() for loop in sweep)
    for loop in counts.fast().values():
        loads = [opcode for opcode in loop.opcodes if opcode.startswith("LDG")]
        assert all(".128" in opcode for opcode in loads)
        # four columns of a float32 tile are 8 bytes of gradient
        assert loop.narrow_accesses == (loop.stores if logits_dtype == WIDE else 0)


@pytest.mark.parametrize("logits_dtype", some([WIDE, HALF], [HALF]), ids=str)
def test_statistics_kernel_on_blocks(logits_dtype, monkeypatch):
    """Its forward and its gradient launch, one after the other: the aligned form at an odd vocabulary,
    without a stack; the gradient beside the logits, or in their place."""
    target = aot.TARGETS["sm_90"]
    monkeypatch.setattr(choices, "INTERPRETED", True)  # the Triton path without a GPU
    monkeypatch.setattr(transforms, "dispatches", lambda *_: False)
    empty = lambda *shape: torch.empty(*shape, dtype=HALF, device="meta")
    hidden, weight = empty(4096, 64).requires_grad_(), empty(50257, 64).requires_grad_()
    ids = torch.empty(4096, dtype=torch.int64, device="meta")
    launches = aot.record(
        lambda: linear_distillation_statistics(
            hidden, weight, empty(4096, 64), empty(50257, 64), ids, logits_dtype=logits_dtype,
            coefficients=(1.0, 0.5, None), backend="triton",
        ), target.facts,
    )  # fmt: skip
    launches = [launch for launch in launches if launch.kernel.__name__ == "statistics_kernel"]
    assert [x.arguments["WRITE_GRADIENT"] for x in launches[:4]] == [False, True, False, True]
    for launched in launches[:2]:
        assert launched.arguments["ENDS"] == TAIL.value
        stack, loops = stack_and_loops(launched, target)
        assert stack == 0
        loops = [x for x in loops if x.special and x.bytes_loaded]
        assert loops
        assert all(loop.barriers == 0 for loop in loops)
        for loop in loops:  # four columns of a float32 tile are 8 bytes of gradient
            assert loop.narrow_accesses <= (loop.stores if logits_dtype == WIDE else 0)
