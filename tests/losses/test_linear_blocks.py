"""The linear loss over blocks of tokens: their sizes, their memory, and the sums over them."""

import subprocess
import sys

import pytest
import torch

from distill_ops import SymmetricKL, linear_distillation_loss
from distill_ops.api import heads
from distill_ops.cpu import forms
from distill_ops.heads.blocks import CPU_BUDGET, Blocks, split
from distill_ops.operators import linear as operator
from tests.support import ROOT
from tests.support.cases import BOOL_MASK, FLOAT_MASK
from tests.support.helpers import assert_close
from tests.support.linear_cases import (
    CAPPED,
    blocks_of,
    check,
    make_pair,
    run,
    run_reference,
    use_gpu_products,
)

pytest.importorskip("triton")

HALF = torch.bfloat16
GIB, MIB = 1 << 30, 1 << 20


# --- sizes, which are pure -----------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("spare", [0, 100000])
@pytest.mark.parametrize("budget", [60, 61, 119, 120, 1000, 54321, 10**7])
@pytest.mark.parametrize("n_rows", [0, 1, 7, 128, 129, 1000, 8191])
def test_blocks_fit_their_budget(n_rows, budget, spare, gpu):
    """... and hold as much as it allows, within a quarter."""
    token_bytes, row_bytes = 20, 40
    blocks = split(n_rows, token_bytes, row_bytes, budget, spare, gpu=gpu)
    used = blocks.tokens * token_bytes + blocks.rows * row_bytes
    assert 1 <= blocks.rows <= blocks.tokens
    if blocks.tokens >= n_rows:
        assert used <= budget + spare
        assert blocks.tokens == max(n_rows, 1)
    else:
        assert used <= budget
        n_blocks = -(-n_rows // blocks.tokens)
        assert n_blocks <= -(-n_rows // max(1, budget // 80)) + 1
    if not gpu:
        assert blocks.rows == blocks.tokens


def test_budget_below_one_token():
    for gpu in (False, True):
        with pytest.raises(ValueError, match=r"memory_budget=59 is too small: .* take 60 bytes"):
            split(5, 20, 40, 59, gpu=gpu)


def test_blocks_at_real_sizes():
    """8192 tokens, 4096 dimensions, 128256 columns, bfloat16, float32 logits, 1 GiB.

    Five blocks of 1664 tokens; but the weight gradient's float32 sum, 2.1 GB, is more than what the
    gradient of all logits takes beyond it, so one block saves memory and the sum's traffic."""
    n_cols, dim = 128256, 4096
    token_bytes, row_bytes = 2 * n_cols + 4 * dim, 2 * 4 * n_cols + 2 * dim
    blocks = split(8192, token_bytes, row_bytes, GIB, gpu=True)
    assert blocks == Blocks(1664, 512)
    one = split(8192, token_bytes, row_bytes, GIB, 4 * n_cols * dim, gpu=True)
    assert one == Blocks(8192, 512)
    several = split(32768, token_bytes, row_bytes, GIB, 4 * n_cols * dim, gpu=True)
    assert several.tokens < 2200
    assert 8192 * token_bytes + 512 * row_bytes <= GIB + 4 * n_cols * dim
    # on a CPU in float32, 32000 columns: blocks of about 256 tokens
    token_bytes, row_bytes = 4 * 32000 + 8 * 1024, 4 * 32000 + 4 * 1024
    blocks = split(1024, token_bytes, row_bytes, CPU_BUDGET, gpu=False)
    assert blocks == Blocks(205, 205)


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [
        (100, (100, 100)),
        (255, (255, 255)),
        (256, (256, 128)),
        (400, (400, 134)),
        (3000, (500, 167)),
    ],
)
def test_a_cpu_block_in_pieces(n_rows, expected):
    """No piece has fewer than 128 rows, where the block has as many."""
    assert split(n_rows, 1, 1, 1000, gpu=False, pieces=True) == Blocks(*expected)
    assert split(n_rows, 1, 1, 1000, gpu=False).tokens == expected[0]


def test_blocks_are_of_about_equal_size():
    assert split(1000, 1, 1, 1400, gpu=False).tokens == 500
    tokens = split(1100, 1, 1, 1536, gpu=True).tokens
    assert tokens == 640  # 1100 in two, in whole tiles of 128


# --- sums over blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_blocks_that_do_not_divide_the_tokens(n_rows, softcap, backend, device):
    """The same bits of losses and hidden gradients, whatever the blocks; the weight's sum likewise
    within rounding."""
    pair = make_pair((n_rows,), 50, bias=True, device=device)
    options = {"student_softcap": softcap, "backend": backend, "reduction": "sum"}
    whole = run(linear_distillation_loss, pair, **options)
    for tokens in (1, 3, 5):
        budget = tokens * 4 * (3 * 56 + 2 * 16 + 24)
        ours = run(linear_distillation_loss, pair, memory_budget=budget, **options)
        torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-6, atol=0)
        for name, gradient in ours.gradients.items():
            torch.testing.assert_close(gradient, whole.gradients[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_the_weight_gradient_is_summed_in_float32(gpu, monkeypatch):
    """64 blocks of bfloat16: rounded once, not 64 times."""
    pair = make_pair((64,), 40, dtype=HALF, bias=True)
    if gpu:
        use_gpu_products(monkeypatch)
    blocks_of(monkeypatch, 1, 1)
    options = {"names": ("student_weight", "student_bias"), "upstream_seed": None}
    ours = run(linear_distillation_loss, pair, **options)
    truth = run_reference(pair, double=True, **options)
    for name, gradient in ours.gradients.items():
        expected = truth.gradients[name]
        rounding = (expected.to(HALF).double() - expected).norm()
        # the logits' gradient is rounded before its products on a GPU
        assert (gradient.double() - expected).norm() <= (2 if gpu else 1.05) * rounding


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("products", ["float64", "cpu", "gpu"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_every_dtype(dtype, weight_dtype, products, monkeypatch):
    """One block and several: hidden states and weight need not be of one dtype."""
    pair = make_pair((9,), 20, dtype=dtype, weight_dtype=weight_dtype, bias=True)
    if products == "float64":
        pair = pair._replace(teacher_hidden=pair.teacher_hidden.double())
    elif products == "gpu":
        use_gpu_products(monkeypatch)
    whole = run(linear_distillation_loss, pair)
    blocks_of(monkeypatch, 2, 2)
    ours = run(linear_distillation_loss, pair)
    torch.testing.assert_close(ours.loss, whole.loss)
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name])


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_an_infinite_upstream_of_a_masked_token(lost, backend, device):
    """As a mean over a sequence without tokens gives it: their gradients stay 0."""
    pair = make_pair((2, 3), device=device).trained(("student_hidden", "student_weight"))
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], device=device)
    loss = linear_distillation_loss(*pair[:4], loss_mask=mask, reduction="none", backend=backend)
    loss.backward(torch.where(mask == 0, lost, 0.5))
    gradients = [pair.student_hidden.grad, pair.student_weight.grad]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not gradients[0][mask == 0].any()


# --- as on a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def gpu_products(monkeypatch):
    use_gpu_products(monkeypatch)
    return lambda tokens, rows: blocks_of(monkeypatch, tokens, rows)


GPU_CASES = {
    "bf16": (HALF, {}),
    "bf16 capped": (HALF, CAPPED),
    "bf16 logits": (HALF, {"logits_dtype": HALF}),  # the logits' own memory takes the gradient
    "bf16 logits capped": (HALF, {"logits_dtype": HALF, **CAPPED}),
    "fp16": (torch.float16, CAPPED),
    "fp16 logits of bf16": (HALF, {"logits_dtype": torch.float16}),
    "fp32": (torch.float32, {}),
    "fp32 bf16 logits": (torch.float32, {"logits_dtype": HALF}),
    "masked": (HALF, {"loss_mask": BOOL_MASK, "student_softcap": 3.0}),
    "kept": (HALF, {"loss_mask": FLOAT_MASK, "kept_tokens": 5}),
    "backward": (HALF, {"gradient": "backward"}),
}


@pytest.mark.parametrize("case", GPU_CASES)
def test_products_as_on_a_gpu(case, gpu_products, backend, device):
    """Half-precision operands, float32 logits, sub-blocks within blocks, a vocabulary that is no
    multiple of 8. The logits' gradient is rounded to the operands' dtype."""
    dtype, options = GPU_CASES[case]
    options = options | {"divergence": SymmetricKL(), "backend": backend}
    pair = make_pair(dtype=dtype, bias="logits" not in case, device=device)
    gpu_products(4, 2)
    ours = run(linear_distillation_loss, pair, **options)
    truth = run_reference(pair, double=True, **options)
    eps = torch.finfo(options.get("logits_dtype", dtype)).eps
    if options.get("logits_dtype") is None:  # of float32 products
        assert_close("loss", ours.loss, ours.loss, truth.loss, 8.0)
    for name, gradient in ours.gradients.items():
        expected = truth.gradients[name]
        assert gradient.dtype == dtype
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error < (4 if options.get("logits_dtype") else 1) * eps + 1e-6, name


def test_mixed_dtypes_as_on_a_gpu(gpu_products, backend, device):
    gpu_products(4, 2)
    for dtype, weight_dtype in ((HALF, torch.float32), (torch.float32, HALF)):
        pair = make_pair(dtype=dtype, weight_dtype=weight_dtype, bias=True, device=device)
        check(pair, divergence="forward_kl", backend=backend, **CAPPED)


def test_autocast_as_on_a_gpu(gpu_products, backend, device, monkeypatch):
    """float32 tensors, bfloat16 products, float32 gradients."""
    monkeypatch.setattr("distill_ops.api.heads.autocast_dtype", lambda device: HALF)
    gpu_products(4, 2)
    pair = make_pair(bias=True, device=device)
    ours = run(linear_distillation_loss, pair, backend=backend)
    rounded = pair.map(lambda x: x.to(HALF).float())
    rounded = rounded._replace(student_bias=pair.student_bias, teacher_bias=pair.teacher_bias)
    expected = run(linear_distillation_loss, rounded, backend=backend, divergence="forward_kl")
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()
        assert error < torch.finfo(HALF).eps


# --- memory --------------------------------------------------------------------------------------

MEMORY = """
import torch
from benchmarks.core.memory import peak_above_inputs
from distill_ops import linear_distillation_loss

torch.set_num_threads(1)
dtype, gradient, budget = torch.{dtype}, "{gradient}", {budget}
n_rows, n_cols, dim = 512, 16000, 256
draw = lambda *shape: torch.randn(*shape).to(dtype)
hidden, weight = draw(n_rows, dim), draw(n_cols, dim)
teacher_hidden, teacher_weight = draw(n_rows, dim), draw(n_cols, dim)
hidden.requires_grad_(), weight.requires_grad_()

def step():
    hidden.grad = weight.grad = None
    loss = linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, divergence="jensen_shannon",
        memory_budget=budget, gradient=gradient, student_softcap={softcap},
    )
    loss.backward()

step()
hidden.grad = weight.grad = None
peak = peak_above_inputs(step, torch.device("cpu"))
print(peak, (hidden.numel() + weight.numel()) * dtype.itemsize)
"""


@pytest.mark.full
@pytest.mark.covering("dtype", "gradient")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("gradient", "softcap"), [("forward", None), ("backward", 30.0)])
def test_peak_memory(dtype, gradient, softcap):
    """At most the gradients, the budget and 32 MiB; for bfloat16 weights the sum in float32."""
    budget = 16 * MIB
    program = MEMORY.format(dtype=dtype, gradient=gradient, budget=budget, softcap=softcap)
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    if output.startswith("None"):
        pytest.skip("this system does not tell the peak")
    peak, gradients = map(int, output.split())
    accumulator = 16000 * 256 * 4 if dtype == "bfloat16" else 0
    assert peak <= gradients + budget + accumulator + 32 * MIB
    assert peak >= gradients + budget // 4  # what is measured is there


def test_rows_begin_at_16_bytes(gpu_products, monkeypatch):
    """The kernels get aligned rows at any vocabulary."""
    gpu_products(4, 3)
    seen = []

    def look(options, tokens, student, teacher, *, gradient, losses, components, outputs):
        seen.extend((student, teacher, gradient))

    class Path:  # as the kernels' own
        tokens = staticmethod(forms.tokens)
        rows = staticmethod(look)
        reduced = staticmethod(lambda losses, *_: (losses.sum(), None))

    monkeypatch.setattr(operator, "path_of", lambda backend: Path)
    monkeypatch.setattr(heads, "choose_backend", lambda *_: "triton")
    pair = make_pair(dtype=HALF)
    run(linear_distillation_loss, pair)
    assert len(seen) == 9  # blocks of 3 and 1 and 2 rows
    for matrix in seen:
        assert matrix.shape[1] == 33
        assert matrix.stride() == (40, 1)
        assert matrix.data_ptr() % 16 == 0


def test_tokens_of_blocks_are_the_tokens(backend, device):
    """Masks, labels and parameters of a block are its own: losses a token, in order."""
    pair = make_pair((7,), 40, device=device)
    generator = torch.Generator().manual_seed(3)
    options = {
        "loss_mask": torch.tensor([1.0, 0.5, 0, 2, 1, 0, 1.5]),
        "labels": torch.randint(40, (7,), generator=generator),
        "hard_label_weight": 0.5,
        "divergence": SymmetricKL(torch.linspace(0.1, 0.9, 7).to(device)),
        "reduction": "none",
        "backend": backend,
    }
    check(pair, memory_budget=2000, **options)
