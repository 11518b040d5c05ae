"""The statistics of two language-model heads against the oracle, and the loss that coefficients make of
them."""

import math
import subprocess
import sys

import pytest
import torch

import distill_ops
from distill_ops import (
    StatisticsCoefficients,
    SymmetricKL,
    linear_distillation_statistics,
    reference,
)
from distill_ops.divergences.built_in import BUILT_IN
from tests.support import ROOT
from tests.support.declared import renyi_like
from tests.support.linear_cases import (
    CAPPED,
    blocks_of,
    count_products,
    hold,
    leaves,
    make_pair,
    use_gpu_products,
)

DIVERGENCES = [*(kind() for kind in BUILT_IN.values()), renyi_like()]
N_ROWS, N_COLS = 5, 50
OF_ENGINE = ("memory_budget", "logits_dtype", "backend")
BFLOAT16, MIB = torch.bfloat16, 1 << 20

COEFFICIENTS = {
    "statistics": lambda of_rows: None,
    "numbers": lambda of_rows: StatisticsCoefficients(0.7, -1.3, 0.25),
    "tensors": lambda of_rows: (of_rows(1), of_rows(2), torch.tensor(-0.4).to(of_rows(3))),
    "log_prob": lambda of_rows: (None, of_rows(4), 0),
    "divergence": lambda of_rows: StatisticsCoefficients(divergence=of_rows(5) > 0),
}


def coefficients_of(name, n_rows=N_ROWS, device="cpu"):
    """By name; one a token is a random number, NaN for the one that is ignored."""

    def of_rows(seed):
        values = torch.randn(n_rows, generator=torch.Generator().manual_seed(seed))
        values[2:3] = math.nan
        return values.to(device)

    return COEFFICIENTS[name](of_rows)


def ids_of(n_rows=N_ROWS, n_cols=N_COLS, device="cpu"):
    ids = torch.arange(n_rows) * 11 % n_cols
    ids[2:3] = -100
    return ids.to(device)


def functions(pair, ids, options):
    """Ours and the oracle's, of the student's hidden states, weight and bias."""

    def of(function, options):
        def call(hidden, weight, bias):
            found = function(
                hidden, weight, pair.teacher_hidden, pair.teacher_weight, ids, student_bias=bias,
                teacher_bias=pair.teacher_bias, **options,
            )  # fmt: skip
            loss, found = found if options["coefficients"] else (None, found)
            assert found.top1_agreement.dtype == torch.bool
            parts = (*found[:-1], found.top1_agreement.float())
            return parts if loss is None else (loss, *parts)

        return call

    options = {"coefficients": None} | options
    theirs = {name: x for name, x in options.items() if name not in OF_ENGINE}
    return (
        of(linear_distillation_statistics, options),
        of(reference.linear_distillation_statistics, theirs),
    )


def check(pair, ids, **options):
    return hold(*functions(pair, ids, options), pair[:2] + pair[4:5])


@pytest.mark.covering("divergence", "coefficients head", "dtype head")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("head", ["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16], ids=str)
def test_against_the_oracle(divergence, coefficients, head, dtype, backend, device):
    pair = make_pair((N_ROWS,), N_COLS, dtype=dtype, bias=head == "capped", device=device)
    check(
        pair, ids_of(device=device), divergence=divergence, temperature=1.3, backend=backend,
        coefficients=coefficients_of(coefficients, device=device),
        **(CAPPED if head == "capped" else {}),
    )  # fmt: skip


@pytest.mark.covering("n_rows", "coefficients softcap")
@pytest.mark.parametrize("n_rows", [0, 1, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("coefficients", ["statistics", "tensors"])
def test_blocks(n_rows, softcap, coefficients, backend, device):
    """Of two or three tokens, with a parameter of their own; without a softcap the gradient overwrites
    the logits that it is made of, at a vocabulary that is no whole number of vectors."""
    pair = make_pair((n_rows,), 51, device=device)
    weights = torch.linspace(0.1, 0.9, n_rows).to(device)
    check(
        pair, ids_of(n_rows, 51, device), divergence=SymmetricKL(weights), backend=backend,
        coefficients=coefficients_of(coefficients, n_rows, device), student_softcap=softcap,
        memory_budget=2000,
    )  # fmt: skip


@pytest.mark.parametrize("coefficients", ["statistics", "tensors"])
def test_leading_shape_and_vocab_size(coefficients, backend, device):
    """Heads of different widths; further rows get gradient 0, whatever they hold."""
    pair = make_pair((3, 2), 40, teacher_cols=44, bias=True, device=device)
    pair.student_weight[36:] = math.nan
    given = coefficients_of(coefficients, 6, device)
    if given is not None:
        given = tuple(x.view(3, 2) if x.dim() else x for x in given)
    ids = ids_of(6, 36, device).view(3, 2)
    found = check(pair, ids, vocab_size=36, coefficients=given, backend=backend)
    assert not found[-2][36:].any()
    assert found[-3].shape == (3, 2, 16)


@pytest.mark.parametrize("coefficients", ["statistics", "tensors"])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_ignored_tokens_are_not_read(coefficients, gpu, backend, device, monkeypatch):
    """Their hidden states, of either model, may hold NaN: results and gradients are as of the others."""
    if gpu:
        use_gpu_products(monkeypatch)
    pair = make_pair((N_ROWS,), N_COLS, bias=True, device=device)
    given = coefficients_of(coefficients, device=device)
    expected = functions(pair, ids_of(device=device), {"coefficients": given, "backend": backend})[
        0
    ]
    pair = pair.map(torch.clone)
    pair.student_hidden[2] = pair.teacher_hidden[2] = math.nan
    ours = functions(pair, ids_of(device=device), {"coefficients": given, "backend": backend})[0]
    clean = leaves(
        (pair.student_hidden.nan_to_num(), pair.student_weight, pair.student_bias), False
    )
    dirty = leaves((pair.student_hidden, pair.student_weight, pair.student_bias), False)
    for function, students in ((expected, clean), (ours, dirty)):
        outputs = function(*students)
        outputs[0].sum().backward()
        students.extend(outputs)
    for x, y in zip(clean, dirty, strict=True):
        if x.requires_grad and x.is_leaf:
            x, y = x.grad, y.grad
            assert x.any()
        assert torch.equal(x, y)
    assert not dirty[0].grad[2].any()
    assert all(not x[2] for x in dirty[-6:])


FROZEN = {
    (): 2,
    ("student_hidden",): 3,
    ("student_weight",): 3,
    ("student_bias",): 2,
    ("student_hidden", "student_weight", "student_bias"): 4,
}


@pytest.mark.parametrize("names", FROZEN, ids=str)
def test_products(names, backend, device, monkeypatch):
    """Four with coefficients; six without, as the backward forms the logits again; two without a
    gradient. A frozen tensor gets none, and the others get the bits that they would."""
    pair, ids = make_pair((2,), N_COLS, bias=True, device=device), ids_of(2, device=device)
    factors = coefficients_of("tensors", 2, device)
    gradients = []
    for given in (factors, None):
        for students in (pair.student, names):
            calls = count_products(monkeypatch)
            trained = pair.trained(students)
            found = linear_distillation_statistics(
                *trained[:4], ids, student_bias=trained.student_bias, coefficients=given,
                backend=backend,
            )  # fmt: skip
            if given is None:
                found = found.divergence, found.student_log_prob, found.student_entropy
                loss = sum((f * x).sum() for f, x in zip(factors, found, strict=True))
            else:
                loss = found[0]
                assert not any(x.requires_grad for x in found[1])
            assert loss.requires_grad == bool(students)
            if students:
                loss.backward()
            again = 2 if given is None and students else 0
            assert len(calls) == FROZEN[students] + again
            gradients.append([getattr(trained, name).grad for name in pair.student])
    for i, name in enumerate(pair.student):
        whole, *others = (made[i] for made in gradients)
        assert whole.any()
        for other, students in zip(others, (names, pair.student, names), strict=True):
            assert other is None if name not in students else torch.equal(other, whole)


@pytest.mark.parametrize("products", ["float16 weight", "autocast"])
def test_float16_gradients_are_made_in_the_backward(products, backend, device, monkeypatch):
    """Which knows GradScaler's scale; the loss can be differentiated twice then."""
    if products == "autocast":
        name = "distill_ops.api.linear_statistics.autocast_dtype"
        monkeypatch.setattr(name, lambda _: torch.float16)
        use_gpu_products(monkeypatch)
    calls = count_products(monkeypatch)
    ids = ids_of(2, device=device)
    half = {"weight_dtype": torch.float16} if products == "float16 weight" else {}
    pair = make_pair((2,), N_COLS, device=device, **half)
    pair = pair.trained(("student_hidden", "student_weight"))
    loss, found = linear_distillation_statistics(
        *pair[:4], ids, coefficients=(1.0, 2.0, None), backend=backend
    )
    assert len(calls) == 2
    assert not any(x.requires_grad for x in found)
    (loss * 1024.0).backward(retain_graph=True)
    assert len(calls) == 6
    once = pair.student_hidden.grad.clone()
    assert once.any()
    loss.backward()
    torch.testing.assert_close(pair.student_hidden.grad, once * (1025 / 1024), rtol=1e-3, atol=0)


def test_a_gradient_of_the_forward_serves_once(backend, device):
    pair = make_pair((3,), N_COLS, device=device).trained(("student_hidden", "student_weight"))
    loss, _ = linear_distillation_statistics(
        *pair[:4], ids_of(3, device=device), coefficients=(1.0, None, None), backend=backend
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up: leave coefficients out, and weigh the stat"):
        loss.backward()


@pytest.mark.parametrize("zero", [None, 0.0, torch.tensor([0.0, 1.0])], ids=["none", "0", "tensor"])
def test_a_coefficient_of_0_leaves_an_infinity_out(zero, backend, device):
    """The first token's log-probability is -inf."""
    pair = make_pair((2,), N_COLS, bias=True, device=device)
    pair.student_bias[0] = -math.inf
    ids = torch.tensor([0, 3], device=device)
    zero = zero.to(device) if isinstance(zero, torch.Tensor) else zero
    pair = pair.trained(pair.student)
    for function in (linear_distillation_statistics, reference.linear_distillation_statistics):
        backends = {"backend": backend} if function is linear_distillation_statistics else {}
        loss, found = function(
            *pair[:4],
            ids,
            student_bias=pair.student_bias,
            coefficients=(1.0, zero, 0.5),
            **backends,
        )
        assert found.student_log_prob[0] == -math.inf
        assert loss.isfinite()
    loss, _ = linear_distillation_statistics(
        *pair[:4],
        ids,
        student_bias=pair.student_bias,
        coefficients=(1.0, zero, 0.5),
        backend=backend,
    )
    loss.backward()
    assert pair.student_hidden.grad.isfinite().all()


@pytest.mark.parametrize("logits_dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_products_as_on_a_gpu(logits_dtype, softcap, backend, device, monkeypatch):
    """bfloat16 operands; bfloat16 logits without a softcap are overwritten by their gradient. Rows
    under work within blocks, a vocabulary that is no multiple of 8."""
    use_gpu_products(monkeypatch)
    blocks_of(monkeypatch, 4, 3)
    pair = make_pair((N_ROWS,), 51, dtype=BFLOAT16, device=device)
    ids, given = ids_of(n_cols=51, device=device), coefficients_of("tensors", device=device)
    options = {"coefficients": given, "student_softcap": softcap, "logits_dtype": logits_dtype}
    ours, theirs = functions(pair, ids, options | {"backend": backend})
    found = []
    for function, double in ((ours, False), (theirs, True)):
        students = leaves((*pair[:2], None), double)
        loss = function(*students)[0]
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in students[:2])])
    eps = torch.finfo(BFLOAT16).eps
    for mine, truth in zip(*found, strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        assert error < (4 if logits_dtype == BFLOAT16 else 1) * eps


MEMORY = """
import torch
from benchmarks.core.memory import peak_above_inputs
from distill_ops import linear_distillation_statistics

torch.set_num_threads(1)
n_rows, n_cols, dim = 256, 16000, 256
hidden, weight = torch.randn(n_rows, dim), torch.randn(n_cols, dim)
teacher_hidden, teacher_weight = torch.randn(n_rows, dim), torch.randn(n_cols, dim)
ids = torch.randint(n_cols, (n_rows,))
hidden.requires_grad_(), weight.requires_grad_()

def step():
    hidden.grad = weight.grad = None
    found = linear_distillation_statistics(
        hidden, weight, teacher_hidden, teacher_weight, ids, memory_budget={budget},
        coefficients={coefficients}, divergence="jensen_shannon",
    )
    loss = found[0] if {coefficients} else sum(x.sum() for x in found[:4])
    loss.backward()

step()
hidden.grad = weight.grad = None
peak = peak_above_inputs(step, torch.device("cpu"))
print(peak, (hidden.numel() + weight.numel()) * 4)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    "coefficients",
    [pytest.param(None, marks=pytest.mark.full), (1.0, -0.5, 0.1)],
    ids=["all", "loss"],
)
def test_peak_memory(coefficients):
    """At most the gradients, the budget and 32 MiB, as of the linear loss."""
    budget = 16 * MIB
    program = MEMORY.format(budget=budget, coefficients=coefficients)
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    if output.startswith("None"):
        pytest.skip("this system does not tell the peak")
    peak, gradients = map(int, output.split())
    assert peak <= gradients + budget + 32 * MIB
    assert peak >= gradients + budget // 4  # what is measured is there


def test_a_budget_that_holds_the_logits_of_the_student_alone():
    """A token takes its hidden states and logits of both models: 4 bytes an entry."""
    pair, ids = make_pair((2,), N_COLS), torch.tensor([1, 2])
    least = 4 * (16 + N_COLS + 24 + N_COLS)
    linear_distillation_statistics(*pair[:4], ids, memory_budget=least)
    with pytest.raises(ValueError, match=f"is too small: .* take {least} bytes"):
        linear_distillation_statistics(*pair[:4], ids, memory_budget=least - 1)


def test_float64(device, backend):
    pair = make_pair((3,), N_COLS, dtype=torch.float64, device=device)
    call = lambda function, **options: function(*pair[:4], torch.tensor([1, -100, 3]), **options)
    if backend == "triton":
        with pytest.raises(ValueError, match="float64"):
            call(linear_distillation_statistics, backend=backend)
        return
    ours = call(linear_distillation_statistics)
    theirs = call(reference.linear_distillation_statistics)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def test_as_dense_statistics_of_the_same_logits(backend, device):
    """A head of the identity makes the hidden states the logits."""
    logits = make_pair((5,), 9, dims=(9, 9), device=device)
    eye, ids = torch.eye(9, device=device), ids_of(5, 9, device)
    pair = logits.student_hidden, logits.teacher_hidden
    expected = distill_ops.distillation_statistics(*pair, ids, backend=backend)
    ours = linear_distillation_statistics(pair[0], eye, pair[1], eye, ids, backend=backend)
    for mine, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, its)
