"""The oracles of the linear form (semantics.md, 10): the dense ones and the chain rule by hand."""

import math

import pytest
import torch

from distill_ops import reference
from distill_ops.reference import (
    linear_distillation_loss,
    linear_distillation_statistics,
    linear_token_log_probs,
)
from tests.support.cases import DIVERGENCES, OPTIONS, TOKENS

INF = math.inf
N_COLS = 33  # test_dense's


class Head:
    """Hidden states and a head, float64, with a bias, a scale and a softcap."""

    def __init__(self, seed, dim, leading=TOKENS, n_cols=N_COLS, softcap=3.0, bias=True):
        normal = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=normal, dtype=torch.float64)
        self.hidden, self.weight = draw(*leading, dim), draw(n_cols, dim)
        self.bias = draw(n_cols) if bias else None
        self.scale, self.softcap = 0.7, softcap

    @property
    def tensors(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def trained(self):
        for tensor in self.tensors:
            tensor.requires_grad_()
        return self

    def options(self, side=""):
        return {
            f"{side}bias": self.bias, f"{side}logit_scale": self.scale, f"{side}softcap": self.softcap,
        }  # fmt: skip

    def logits(self):
        """One token and column at a time."""
        rows = []
        for hidden in self.hidden.detach().flatten(0, -2):
            row = (self.weight.detach() * hidden).sum(-1)
            row = (row if self.bias is None else row + self.bias.detach()) * self.scale
            rows.append(row if self.softcap is None else self.softcap * (row / self.softcap).tanh())
        return torch.stack(rows).view(*self.hidden.shape[:-1], -1)

    def gradients_by_hand(self, of_logits):
        """The chain rule: the softcap's derivative is ``1 - (s / c)**2``."""
        if self.softcap is not None:
            of_logits = of_logits * (1 - (self.logits() / self.softcap) ** 2)
        of_logits = (of_logits * self.scale).flatten(0, -2)
        hidden = (of_logits @ self.weight.detach()).view_as(self.hidden)
        weight = of_logits.t() @ self.hidden.detach().flatten(0, -2)
        return [hidden, weight] + ([] if self.bias is None else [of_logits.sum(0)])


def linear(student, teacher, **options):
    return linear_distillation_loss(
        student.hidden, student.weight, teacher.hidden, teacher.weight,
        **student.options("student_"), **teacher.options("teacher_"), **options,
    )  # fmt: skip


def check(student, teacher, **options):
    """Loss and gradients against the dense oracle of logits by hand; returns the gradients."""
    loss = linear(student.trained(), teacher, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view_as(loss)
    gradients = torch.autograd.grad((loss * upstream).sum(), student.tensors)
    logits = student.logits().requires_grad_()
    dense = reference.distillation_loss(logits, teacher.logits(), **options)
    (of_logits,) = torch.autograd.grad((dense * upstream).sum(), logits)
    torch.testing.assert_close(loss, dense, rtol=1e-12, atol=1e-14)
    for ours, by_hand in zip(gradients, student.gradients_by_hand(of_logits), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-13)
    return gradients


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_chain_rule(divergence, softcap, bias):
    student = Head(1, 5, softcap=softcap, bias=bias)
    gradients = check(student, Head(2, 8, softcap=softcap, bias=bias), divergence=divergence)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


DENSE_ONLY = {"gradient", "infinities"}
SHARED_OPTIONS = [x for x in OPTIONS if not DENSE_ONLY & set(OPTIONS[x])]


@pytest.mark.parametrize("option", SHARED_OPTIONS)
def test_options_are_the_dense_loss_s(option):
    options = dict(OPTIONS[option])
    if "ignore_index" in options:
        options["labels"] = options["labels"].clamp(min=0)
    check(Head(1, 5), Head(2, 8), divergence="reverse_kl", **options)


def test_gradcheck():
    student, teacher = Head(1, 3, (2,), 6).trained(), Head(2, 4, (2,), 6)
    options = {"labels": torch.tensor([5, 0]), "hard_label_weight": 0.3, "temperature": 1.5}

    def function(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, teacher.hidden, teacher.weight, student_bias=bias,
            student_logit_scale=0.7, student_softcap=2.0, divergence="jensen_shannon", **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, student.tensors)
    ids = torch.tensor([5, 0])
    function = lambda h, w, b: linear_token_log_probs(
        h, w, ids, bias=b, softcap=2.0, logit_scale=0.7, temperature=1.5, return_entropy=True
    )
    assert torch.autograd.gradcheck(function, student.tensors)


def test_the_softcap_by_numbers():
    """x = 3, c = 2: s = 2 tanh(1.5) = 1.8102966; ds/dx = 1 - (s/2)**2 = 0.1807066."""
    hidden = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    log_prob = linear_token_log_probs(hidden, weight, torch.tensor([1]), softcap=2.0)
    assert log_prob.item() == pytest.approx(-math.log1p(math.exp(1.8102966)), abs=1e-7)
    log_prob.backward()
    q = 1 / (1 + math.exp(-1.8102966))
    assert hidden.grad.item() == pytest.approx(-q * 0.1807066, abs=1e-7)


def test_what_is_not_read_leaks_into_no_gradient():
    """NaN of masked tokens and of rows beyond the vocabulary, which 0 * NaN would spread."""
    student, teacher = Head(1, 5, bias=True), Head(2, 8, bias=True)
    options = {
        "loss_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]), "vocab_size": 30,
        "labels": torch.tensor([[3, 3, -100], [0, 29, 4]]), "hard_label_weight": 0.5,
    }  # fmt: skip
    clean = torch.autograd.grad(linear(student.trained(), teacher, **options), student.tensors)
    for head in (student, teacher):
        with torch.no_grad():
            head.hidden[0, 1:] = math.nan
            head.weight[30:], head.bias[30:] = math.nan, INF
    loss = linear(student, teacher, **options)
    gradients = torch.autograd.grad(loss, student.tensors)
    for ours, theirs in zip(gradients, clean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-16)
    assert (gradients[0][0, 1:] == 0).all()
    assert (gradients[1][30:] == 0).all()
    ids = torch.tensor([[1, -100, -100], [2, 3, 4]])
    log_probs = linear_token_log_probs(student.hidden, student.weight[:30], ids)
    assert log_probs[0].tolist()[1:] == [0, 0]
    hidden, weight = torch.autograd.grad(log_probs.sum(), [student.hidden, student.weight])
    assert (hidden[0, 1:] == 0).all()
    assert weight[:30].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_bias_of_minus_infinity_masks_a_column(divergence):
    """Heads padded by their bias: the loss and gradients of the heads without the padding."""
    student, teacher = Head(1, 5, softcap=None), Head(2, 8, softcap=None)
    short = linear(student.trained(), teacher, divergence=divergence, vocab_size=30)
    expected = torch.autograd.grad(short, student.tensors)
    with torch.no_grad():
        student.bias[30:], teacher.bias[30:] = -INF, -INF
    padded = linear(student, teacher, divergence=divergence)
    assert padded.item() == pytest.approx(short.item(), rel=1e-13)
    for ours, theirs in zip(torch.autograd.grad(padded, student.tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-15)


def test_the_loss_of_coefficients_by_numbers():
    """q = (1/4, 3/4), p = (1/2, 1/2), the second token ignored; also the gradient of log q_id alone."""
    hidden = torch.tensor([[math.log(3.0)], [math.nan]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    ids = torch.tensor([1, -100])
    teacher = torch.zeros(2, 1, dtype=torch.float64), weight
    call = lambda given: linear_distillation_statistics(
        hidden, weight, *teacher, ids, coefficients=given, divergence="reverse_kl"
    )
    log_q = math.log(0.25), math.log(0.75)
    entropy = -(0.25 * log_q[0] + 0.75 * log_q[1])
    kl = math.log(2.0) - entropy
    loss, found = call((2.0, torch.tensor([-3.0, math.nan]), torch.tensor(0.5)))
    assert loss.item() == pytest.approx(2 * kl - 3 * log_q[1] + 0.5 * entropy, abs=1e-12)
    assert found.divergence.tolist() == pytest.approx([kl, 0.0], abs=1e-12)
    assert not found.divergence.requires_grad
    (gradient,) = torch.autograd.grad(call((None, 1.0, None))[0], hidden)
    assert gradient.flatten().tolist() == pytest.approx([0.25, 0.0], abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_token_log_probs(temperature):
    head, ids = Head(1, 5).trained(), torch.tensor([[3, 0, -100], [32, 1, 2]])
    options = {"temperature": temperature, "return_entropy": True}
    ours = linear_token_log_probs(head.hidden, head.weight, ids, **head.options(), **options)
    logits = head.logits().requires_grad_()
    dense = reference.token_log_probs(logits, ids, **options)
    for x, y in zip(ours, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
        gradients = torch.autograd.grad(x.sum(), head.tensors, retain_graph=True)
        (of_logits,) = torch.autograd.grad(y.sum(), logits, retain_graph=True)
        for gradient, by_hand in zip(gradients, head.gradients_by_hand(of_logits), strict=True):
            torch.testing.assert_close(gradient, by_hand, rtol=1e-10, atol=1e-14)


def test_the_hard_label_alone_needs_no_teacher():
    student, labels = Head(1, 5), torch.tensor([[3, 0, -100], [32, 1, 2]])
    loss = linear_distillation_loss(
        student.hidden, student.weight, None, None, labels=labels, hard_label_weight=1,
        **student.options("student_"),
    )  # fmt: skip
    expected = torch.nn.functional.cross_entropy(student.logits().view(6, -1), labels.view(-1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)


def test_dtypes():
    student, teacher = Head(1, 5), Head(2, 8)
    for head in (student, teacher):
        head.hidden, head.weight = head.hidden.bfloat16(), head.weight.bfloat16()
        head.bias = head.bias.float()
    loss = linear(student.trained(), teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    dtypes = [x.grad.dtype for x in student.tensors]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    for head in (student, teacher):
        head.hidden, head.weight = head.hidden.detach().double(), head.weight.detach().double()
        head.bias = head.bias.detach().double()
    truth = linear(student, teacher)
    assert truth.dtype == torch.float64
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)


HIDDEN, WEIGHT = torch.zeros(2, 4), torch.zeros(5, 4)
BAD = [
    ({"student_hidden": torch.zeros(2, 3)}, ValueError, r"student_hidden must be \[..., 4\]"),
    ({"student_hidden": [0.0]}, TypeError, "student_hidden must be a tensor"),
    ({"student_weight": torch.zeros(4)}, ValueError, r"student_weight must be \[vocab, dim\]"),
    ({"student_weight": torch.zeros(7, 4)}, ValueError, "student_weight has 7 rows and .* 5: pass vocab_size="),
    ({"student_weight": WEIGHT.int()}, TypeError, "student_weight must be float32"),
    ({"student_bias": torch.zeros(4)}, ValueError, r"student_bias must be \[5\], got shape \(4,\)"),
    ({"student_softcap": 0.0}, ValueError, "student_softcap must be positive and finite, got 0.0"),
    ({"teacher_logit_scale": -1}, ValueError, "teacher_logit_scale must be positive and finite, got -1"),
    ({"teacher_logit_scale": "1"}, TypeError, "teacher_logit_scale must be a positive number"),
    ({"teacher_hidden": torch.zeros(3, 4)}, ValueError, r"leading shape of student_hidden, \(2,\), got \(3,\)"),
    ({"teacher_hidden": None}, ValueError, "teacher_hidden is None, which needs hard_label_weight=1"),
    ({"teacher_weight": None}, ValueError, "teacher_weight is None, which needs hard_label_weight=1"),
    ({"teacher_hidden": torch.zeros(2, 4, requires_grad=True)}, ValueError, "teacher_hidden requires grad.*detach"),
    ({"vocab_size": 6}, ValueError, r"vocab_size must be in \[1, 5\], got 6"),
    ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must have the leading shape of student_hidden"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_input(change, error, message):
    arguments = {
        "student_hidden": HIDDEN, "student_weight": WEIGHT, "teacher_hidden": HIDDEN,
        "teacher_weight": WEIGHT,
    }  # fmt: skip
    assert linear_distillation_loss(**arguments).isfinite()
    with pytest.raises(error, match=message):
        linear_distillation_loss(**arguments | change)


def test_a_teacher_in_training_is_a_constant():
    teacher = Head(2, 8).trained()
    expected = check(Head(1, 5), Head(2, 8), divergence="reverse_kl")
    teacher.hidden.requires_grad_(False)
    assert not linear(Head(1, 5), teacher).requires_grad
    gradients = check(Head(1, 5), teacher, divergence="reverse_kl")
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert teacher.weight.grad is None
    assert teacher.bias.grad is None
    with torch.no_grad():
        assert linear(Head(1, 5), teacher.trained()).isfinite()


def test_bad_token_ids():
    with pytest.raises(ValueError, match="token_ids must have the leading shape of hidden"):
        linear_token_log_probs(HIDDEN, WEIGHT, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 5\).* got 5"):
        linear_token_log_probs(HIDDEN, WEIGHT, torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"hidden must be \[..., 4\] for weight"):
        linear_token_log_probs(HIDDEN[:, :2], WEIGHT, torch.tensor([1, 2]))
