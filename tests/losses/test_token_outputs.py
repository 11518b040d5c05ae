"""What losses tell of each token beside them, on every path, against the reference in float64."""

import pytest
import torch

from tests.support.cases import DIVERGENCES
from tests.support.helpers import assert_close, check, make_logits, topk_of
from tests.support.linear_cases import count_products

pytest.importorskip("triton")

from dataclasses import replace

from distill_ops.kernels import outputs

from distill_ops import (
    AlphaBeta,
    LossComponents,
    ReverseKL,
    SkewReverseKL,
    SoftCrossEntropy,
    TokenOutputs,
    distillation_loss,
    linear_distillation_loss,
    linear_topk_distillation_loss,
    reference,
    topk_distillation_loss,
)
from distill_ops.analysis import aot
from distill_ops.analysis.forms import Form, record_operator
from distill_ops.checks import contents
from distill_ops.operators.dense import dense_loss
from distill_ops.results import ARGMAX, OF_TEACHER, OF_WHOLE_TEACHER, TOKEN_OUTPUTS

INF = float("inf")
OF_TOPK = tuple(name for name in TOKEN_OUTPUTS if name not in OF_WHOLE_TEACHER)
OF_STUDENT = tuple(name for name in TOKEN_OUTPUTS if name not in OF_TEACHER)


def assert_outputs(found, function, *tensors, **options):
    """``found`` is as the reference has it in float64, within twice the error that it has in float32."""
    wide = lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
    truth = function(*map(wide, tensors), **{name: wide(x) for name, x in options.items()})[1]
    eager = function(*tensors, **options)[1]
    for name, ours, theirs, true in zip(TOKEN_OUTPUTS, found, eager, truth, strict=True):
        if name not in options["token_outputs"]:
            assert ours is None
        elif name in ARGMAX:
            assert ours.dtype == torch.int64
            assert torch.equal(ours.cpu(), true.cpu()), name
        else:
            assert not ours.requires_grad
            assert_close(name, ours, theirs, true)


def test_names_are_the_kernels():
    assert TokenOutputs._fields == outputs.NAMES == TOKEN_OUTPUTS
    assert outputs.bits(TOKEN_OUTPUTS) == 2 ** len(TOKEN_OUTPUTS) - 1


ROWS = ("plain", "student -inf", "teacher -inf", "both", "not finite")


def make_rows(kind, device, shape=(5, 37)):
    student, teacher = make_logits(shape, device=device)
    if kind in ("student -inf", "both"):
        student[0, 3] = student[2, 1:] = -INF
        student[3] = -INF
    if kind in ("teacher -inf", "both"):
        teacher[0, 3] = teacher[1, :30] = -INF
    if kind == "not finite":
        student[1, 4], student[2, 0], teacher[3, 5], teacher[0] = INF, torch.nan, torch.nan, -INF
    return student, teacher


@pytest.mark.covering("divergence", "rows gradient")
@pytest.mark.parametrize("gradient", [None, "forward", "backward"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_dense(divergence, rows, gradient, backend, device):
    student, teacher = make_rows(rows, device)
    labels = torch.tensor([3, 1, -100, 2, 36], device=device)
    options = {
        "divergence": divergence, "labels": labels, "temperature": 2.0, "token_outputs": TOKEN_OUTPUTS,
    }  # fmt: skip
    leaf = student.clone().requires_grad_(gradient is not None)
    made = {"gradient": gradient or "auto", "backend": backend}
    loss, found = distillation_loss(leaf, teacher, **options, **made)
    assert_outputs(found, reference.distillation_loss, student, teacher, **options)
    options.pop("token_outputs")
    alone = student.clone().requires_grad_(gradient is not None)
    expected = distillation_loss(alone, teacher, **options, **made)
    if device == "cpu" and backend == "torch":  # other operations of the same accuracy
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, equal_nan=True)
    else:
        assert torch.equal(loss.nan_to_num(), expected.nan_to_num())
    if gradient:
        loss.backward()
        expected.backward()
        assert_close("gradient", leaf.grad, alone.grad, alone.grad.double())


# several tiles of columns, rows that begin anywhere; the largest logit in the first and last columns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_cols", [1031, 4096])
def test_shapes(n_cols, dtype, backend, device):
    student, teacher = make_logits((3, n_cols), dtype=dtype, device=device)
    student[0, 0], student[1, -1], student[2, 7] = 12.0, 12.0, 12.0
    student[2, -3] = 12.0  # of equals the first
    teacher[:, [5, 600, 1029]] = (
        14.0  # the last in the lane of the first, in the tile that comes last
    )
    ids = torch.tensor([0, n_cols - 1, 600], device=device)
    options = {"token_ids": ids, "token_outputs": TOKEN_OUTPUTS, "divergence": "jensen_shannon"}
    _, found = distillation_loss(student, teacher, backend=backend, **options)
    assert found.student_argmax.tolist() == [0, n_cols - 1, 7]
    assert found.teacher_argmax.tolist() == [5, 5, 5]
    assert_outputs(found, reference.distillation_loss, student, teacher, **options)


@pytest.mark.parametrize("name", TOKEN_OUTPUTS)
def test_each_alone(name, backend, device):
    """What one needs does not hang on what another does."""
    student, teacher = make_rows("student -inf", device)
    options = {
        "token_outputs": [name], "divergence": "total_variation",
        "loss_mask": torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0], device=device),
    }  # fmt: skip
    if name == "log_prob":
        options["token_ids"] = torch.tensor([3, 0, 0, 2, 999], device=device)
    teacher[4] = torch.nan  # of weight 0
    leaf = student.clone().requires_grad_()
    _, found = distillation_loss(leaf, teacher, backend=backend, **options)
    assert_outputs(found, reference.distillation_loss, student, teacher, **options)
    assert getattr(found, name)[4] == (-1 if name in ARGMAX else 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_a_divergence(temperature, backend, device):
    student, _ = make_rows("student -inf", device)
    student[3] = 0.0
    options = {
        "labels": torch.tensor([1, 0, 0, -100, 2], device=device), "hard_label_weight": 1.0,
        "temperature": temperature, "token_outputs": OF_STUDENT, "return_components": True,
    }  # fmt: skip
    for inplace in (False, True):
        logits = (student.clone().requires_grad_() * 1.0).view_as(student)
        losses, found = distillation_loss(logits, None, inplace=inplace, backend=backend, **options)
        assert isinstance(losses, LossComponents)
        assert_outputs(found, reference.distillation_loss, student, None, **options)


TAILS = ("bucket", "renormalize", "ignore")


@pytest.mark.covering("divergence tail", "gradient", "hard", "rows")
@pytest.mark.parametrize("rows", ["plain", "student -inf", "not finite"])
@pytest.mark.parametrize("hard", [0.0, 0.4])
@pytest.mark.parametrize("gradient", [None, "forward", "backward"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    "divergence", [SoftCrossEntropy(), ReverseKL(), AlphaBeta(0.2, 0.7)], ids=str
)
def test_topk(divergence, tail, gradient, hard, rows, backend, device):
    student, teacher = make_rows(rows, device)
    log_p, ids = topk_of(teacher.nan_to_num(0, 1, 0), 6)
    ids[0, 2], log_p[2, 1], log_p[3] = -1, -INF, log_p[3, 5].clone()  # equals: the smallest id
    options = {
        "divergence": divergence, "tail": tail, "hard_label_weight": hard, "temperature": 2.0,
        "labels": torch.tensor([3, int(ids[1, 0]), -100, 2, 36], device=device),
        "token_outputs": OF_TOPK,
    }  # fmt: skip
    leaf = student.clone().requires_grad_(gradient is not None)
    made = {"gradient": gradient or "auto", "backend": backend}
    loss, found = topk_distillation_loss(leaf, log_p, ids, **options, **made)
    oracle = reference.topk_distillation_loss
    assert_outputs(found, oracle, student, log_p, teacher_ids=ids, **options)
    options.pop("token_outputs")
    expected = topk_distillation_loss(student, log_p, ids, backend=backend, **options)
    assert torch.equal(loss.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kept_tokens", [None, 5])
def test_linear(kept_tokens, backend, device):
    """Several blocks, tokens of weight 0, at their own places; both heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 7), (40, 7), (2, 4, 7), (40, 7)
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    labels = torch.arange(8, device=device).view(2, 4) * 5
    labels[0, 1] = labels[1, 3] = labels[1, 0] = -100
    options = {"labels": labels, "divergence": SkewReverseKL(0.2), "token_outputs": TOKEN_OUTPUTS}
    leaf = tensors[0].clone().requires_grad_()
    for gradient in ("forward", "backward"):
        loss, found = linear_distillation_loss(
            leaf, *tensors[1:], gradient=gradient, memory_budget=3000, kept_tokens=kept_tokens,
            backend=backend, **options,
        )  # fmt: skip
        loss.backward()
        assert_outputs(found, reference.linear_distillation_loss, *tensors, **options)
    log_p, ids = topk_of(tensors[2] @ tensors[3].t(), 5)
    options["token_outputs"] = OF_TOPK
    _, found = linear_topk_distillation_loss(
        *tensors[:2], log_p, ids, memory_budget=3000, backend=backend, **options
    )
    logits = tensors[0] @ tensors[1].t()
    oracle = reference.topk_distillation_loss
    assert_outputs(found, oracle, logits, log_p, teacher_ids=ids, **options)


def test_an_ignored_id_among_tokens_that_count(backend, device):
    student, teacher = make_logits((3, 21), device=device)
    ids = torch.tensor([4, -100, 20], device=device)
    _, found = distillation_loss(
        student, teacher, token_ids=ids, token_outputs=["log_prob"], backend=backend
    )
    expected = student.log_softmax(-1)[torch.arange(3), ids.clamp(min=0)]
    expected[1] = 0.0
    torch.testing.assert_close(found.log_prob, expected)


@pytest.mark.parametrize("offset", [300.0, -3e4])
def test_logits_far_from_zero(offset, backend, device):
    """What rounds the sweeps' exponents does not round the logarithms: the labels' among them."""
    student, teacher = make_logits((12, 257), offset=offset, device=device)
    labels = torch.arange(12, device=device)
    options = {"labels": labels, "token_outputs": TOKEN_OUTPUTS, "divergence": "forward_kl"}
    _, found = distillation_loss(student, teacher, backend=backend, **options)
    assert_outputs(found, reference.distillation_loss, student, teacher, **options)
    options = {"labels": labels, "hard_label_weight": 1.0, "reduction": "none"}
    check(distillation_loss, student, None, backend=backend, **options)
    options["hard_label_weight"], options["divergence"] = 0.5, "total_variation"
    check(distillation_loss, student, teacher, backend=backend, **options)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(shape, backend, device):
    student, teacher = torch.zeros(2, *shape, 9, device=device)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    options = {"token_ids": ids, "backend": backend}
    _, found = distillation_loss(student, teacher, token_outputs=TOKEN_OUTPUTS, **options)
    assert {tuple(x.shape) for x in found} == {shape}
    log_p, slots = topk_of(teacher, 2)
    _, found = topk_distillation_loss(student, log_p, slots, token_outputs=OF_TOPK, **options)
    assert found.teacher_mass.shape == shape


def test_the_argmax_alone_of_rows_without_a_softmax(backend, device):
    student, teacher = make_rows("not finite", device)
    student[4] = -INF
    options = {"token_outputs": ["student_argmax"], "backend": backend}
    hard = {"labels": torch.zeros(5, dtype=torch.int64, device=device), "hard_label_weight": 1.0}
    expected = student.argmax(-1)
    expected[[1, 2, 4]] = -1
    _, found = distillation_loss(student, None, **hard, **options)
    assert torch.equal(found.student_argmax, expected)
    log_p, slots = topk_of(torch.zeros_like(student), 2)
    for tail in ("bucket", "restrict"):
        _, found = topk_distillation_loss(student, log_p, slots, tail=tail, **options)
        assert torch.equal(found.student_argmax, expected)


@pytest.mark.interpreter
def test_of_a_slot_beyond_the_vocabulary_the_mass_is_unknown(monkeypatch):
    """On a GPU nobody looks at an id."""
    monkeypatch.setattr(contents, "readable", lambda *tensors: False)
    student, teacher = make_logits((2, 21))
    log_p, ids = topk_of(teacher, 3)
    ids[0, 1] = 21
    names = ("teacher_mass", "teacher_argmax")
    _, found = topk_distillation_loss(student, log_p, ids, token_outputs=names, backend="triton")
    assert found.teacher_mass.isnan().tolist() == [True, False]
    assert found.teacher_argmax.tolist() == [-1, int(ids[1, log_p[1].argmax()])]


def test_products_are_those_of_the_loss_alone(monkeypatch):
    """Two of logits and two of gradients, whatever is told beside."""
    products = count_products(monkeypatch)
    tensors = [torch.randn(shape) for shape in ((6, 7), (40, 7), (6, 7), (40, 7))]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    for names in ((), TOKEN_OUTPUTS):
        products.clear()
        ids = torch.arange(6) if names else None
        linear_distillation_loss(*tensors, token_ids=ids, token_outputs=names)
        assert len(products) == 4
        with torch.no_grad():
            linear_distillation_loss(*tensors, token_ids=ids, token_outputs=names)
        assert len(products) == 6


@pytest.mark.parametrize("gradient", ["none", "forward", "backward"])
def test_launches_are_those_of_the_loss_alone(gradient):
    target = aot.TARGETS["sm_90"]
    for form in (Form(1031, hard_label_weight=0.5), Form(1031, temperature=2.0)):
        counts = []
        for names in ((), TOKEN_OUTPUTS):
            problem = replace(form, token_outputs=names).problem(SoftCrossEntropy())
            counts.append(
                [
                    x.kernel.fn.__name__
                    for x in record_operator(dense_loss, *problem, gradient, target)
                ]
            )
        alone, more = counts
        # the labels of the log-probabilities are weights of the tokens, too
        assert [name for name in more if name != "weights_kernel"] == [
            name for name in alone if name != "weights_kernel"
        ]
        assert more.count("dense_kernel") == (2 if gradient == "backward" else 1)
