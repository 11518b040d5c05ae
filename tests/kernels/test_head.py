"""The elementwise kernels of a head: their numbers, and their machine code."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from distill_ops.kernels import head, launch
from distill_ops.kernels.math import tanh
from distill_ops.kernels.sweeps import TAIL

from distill_ops import linear_distillation_loss, linear_ops, losses
from distill_ops.analysis import aot, sass
from distill_ops.analysis.forms import count
from distill_ops.heads import rows_buffer

HALF, WIDE, FP16 = torch.bfloat16, torch.float32, torch.float16


@triton.jit
def tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + position, tanh(tl.load(x_ptr + position)))


@pytest.mark.interpreter
def test_tanh(kernel_device):
    """4 units in the last place, from the smallest normal to where it is 1."""
    sizes = torch.logspace(-37, 1.5, 4093, dtype=torch.float64).float()
    x = torch.cat([sizes, torch.tensor([0.0, math.inf, math.nan])])
    x = torch.cat([x, -x[:-1], torch.tensor([0.25])]).to(kernel_device("triton"))
    assert x.numel() == 8192
    y = torch.empty_like(x)
    tanh_kernel[(8,)](x, y, BLOCK=1024)
    truth = x.double().tanh()
    known = ~truth.isnan()
    assert torch.equal(y.isnan(), ~known)
    error = (y.double() - truth)[known].abs()
    assert (error <= 4 * 2.0**-24 * 2 * truth[known].abs()).all()
    assert y[x == math.inf] == 1
    assert y[x == -math.inf] == -1


def matrix(n_rows, n_cols, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = rows_buffer(n_rows, n_cols, dtype, device, True)
    return out.copy_(torch.randn(n_rows, n_cols, generator=generator) * 4)


@pytest.mark.interpreter
@pytest.mark.parametrize("n_cols", [1, 40, 2049])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [None, WIDE, HALF], ids=str)
@pytest.mark.parametrize(("source", "target"), [(WIDE, WIDE), (HALF, HALF), (WIDE, FP16)], ids=str)
def test_finish(source, target, bias, softcap, n_cols, kernel_device):
    device = kernel_device("triton")
    product = matrix(5, n_cols, source, device)
    if bias is not None:
        bias = torch.linspace(-2, 2, n_cols).to(bias).to(device)
    expected = product.double()
    if bias is not None:
        expected = expected + 0.5 * bias.double()
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    logits = product if source == target else matrix(5, n_cols, target, device)
    head.finish(product, logits, bias, 0.5, softcap)
    eps = torch.finfo(target).eps
    scale = expected.abs().clamp(min=eps)  # a sum may cancel
    assert ((logits.double() - expected).abs() <= 4 * eps * scale + 4e-7).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [WIDE, HALF], ids=str)
def test_softcap_gradient(dtype, kernel_device):
    device = kernel_device("triton")
    gradient, logits = matrix(5, 33, dtype, device), matrix(5, 33, WIDE, device, seed=1).tanh_()
    expected = gradient.double() * (1 - (logits.double() / 1.5) ** 2)
    head.softcap_gradient_(gradient, logits, 1.5)
    error = (gradient.double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * gradient.double().abs() + 1e-6).all()


@pytest.mark.interpreter
def test_rows_that_begin_elsewhere_are_refused(kernel_device):
    x = torch.zeros(4, 33, device=kernel_device("triton"))
    with pytest.raises(ValueError, match="rows must begin at multiples of 8 elements"):
        head.finish(x, x, None, 1.0, 3.0)


# --- machine code --------------------------------------------------------------------------------

# dtypes of product, logits and bias
FORMS = {
    "float32": (WIDE, WIDE, WIDE),
    "bfloat16": (HALF, HALF, HALF),
    "to bfloat16": (WIDE, HALF, HALF),
}


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("form", FORMS)
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
        head.finish(product, logits, bias, 0.5, 30.0)
        head.finish(product, logits, bias, 0.5, None)
        head.finish(product, logits, None, 0.5, 30.0)
        head.softcap_gradient_(meta(HALF), logits, 30.0)

    recorded = aot.record(call, target.facts)
    assert len(recorded) == 4
    for launched, special in zip(recorded, (2, 0, 2, 0), strict=True):
        compiled = aot.compile_launch(launched, target)
        if target.backend == "hip":
            assert sass.amd_usage(compiled).stack == 0
            assert "global_load_dwordx4" in compiled.asm["amdgcn"]
            continue
        code, usage = sass.disassemble(compiled)
        assert usage.stack == 0
        (loop,) = [x for x in sass.innermost_loops(code) if x.stores]
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


@pytest.mark.parametrize("logits_dtype", [WIDE, HALF], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_dense_kernel_on_blocks(divergence, logits_dtype, monkeypatch):
    """Padded rows: the aligned form at an odd vocabulary, the gradient in its own dtype beside the
    logits or in their place."""
    target = aot.TARGETS["sm_90"]
    monkeypatch.setattr(losses, "INTERPRETED", True)  # the Triton path without a GPU
    monkeypatch.setattr(
        "distill_ops.linear.linear_loss_op", torch.no_grad()(linear_ops.linear_loss)
    )
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
