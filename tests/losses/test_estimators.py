"""The sampled-token estimators: what their docstring claims, by summing over a small vocabulary."""

import math
import subprocess
import sys

import pytest
import torch

from distill_ops import reverse_kl_estimate
from tests.support import ROOT

KINDS = ("k1", "k2", "k3")
INF = math.inf
SEEDS = range(5)


def make_pair(seed, scale=1.5):
    """Student logits and the teacher's log-probabilities, V = 7, float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), torch.log_softmax(teacher, -1)


def forward_kl(student, log_p):
    return (log_p.exp() * (log_p - torch.log_softmax(student, -1))).sum()


def reverse_kl(student, log_p):
    log_q = torch.log_softmax(student, -1)
    return (log_q.exp() * (log_q - log_p)).sum()


def expected(kind, student, log_p):
    """Expectation over every token that q may sample; q as the sampler has no gradient."""
    log_q = torch.log_softmax(student, -1)
    return (log_q.detach().exp() * reverse_kl_estimate(log_q, log_p, kind=kind)).sum()


def gradient(function, *arguments):
    return torch.autograd.grad(function, *arguments)[0]


def variance(kind, student, log_p):
    log_q = torch.log_softmax(student, -1).detach()
    estimate = reverse_kl_estimate(log_q, log_p, kind=kind)
    mean = (log_q.exp() * estimate).sum()
    return (log_q.exp() * (estimate - mean).square()).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_values(seed):
    """k1 and k3 are unbiased, k2 is not."""
    student, log_p = make_pair(seed)
    exact = reverse_kl(student, log_p)
    for kind in ("k1", "k3"):
        torch.testing.assert_close(expected(kind, student, log_p), exact, rtol=1e-12, atol=0)
    assert abs(expected("k2", student, log_p) / exact - 1) > 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradients(seed):
    """k1: none; k2: that of the reverse KL; k3: that of the forward KL."""
    student, log_p = make_pair(seed)
    exact = {
        "k1": torch.zeros_like(student),
        "k2": gradient(reverse_kl(student, log_p), student),
        "k3": gradient(forward_kl(student, log_p), student),
    }
    assert (exact["k2"] - exact["k3"]).norm() > 0.1 * exact["k2"].norm()
    for kind in KINDS:
        ours = gradient(expected(kind, student, log_p), student)
        torch.testing.assert_close(ours, exact[kind], rtol=1e-11, atol=1e-14)


def test_the_policy_gradient_of_k1_is_the_gradient_of_k2():
    student, log_p = make_pair(0)
    log_q = torch.log_softmax(student, -1)
    cost = reverse_kl_estimate(log_q, log_p, kind="k1").detach()
    surrogate = (log_q.detach().exp() * cost * log_q).sum()
    ours = gradient(expected("k2", student, log_p), student)
    torch.testing.assert_close(gradient(surrogate, student), ours, rtol=1e-12, atol=1e-15)


def test_bias_of_k2_is_of_the_third_order():
    """A tenth of the distance, a thousandth of the bias."""
    student, teacher = make_pair(1)
    biases = []
    for distance in (1e-2, 1e-3):
        log_p = torch.log_softmax(student.detach() + distance * teacher, -1)
        biases.append(expected("k2", student, log_p) - reverse_kl(student, log_p))
    assert 900 < biases[0] / biases[1] < 1100


def test_signs():
    student, log_p = make_pair(2)
    k1, k2, k3 = (
        reverse_kl_estimate(torch.log_softmax(student, -1), log_p, kind=kind) for kind in KINDS
    )
    assert k1.min() < 0 < k1.max()
    assert k2.min() > 0
    assert k3.min() > 0


def test_variance_of_k3_is_less_near_and_more_far():
    student, log_p = make_pair(3)
    near = torch.log_softmax(student.detach() + 0.1 * log_p, -1)
    assert variance("k3", student, near) < 0.1 * variance("k1", student, near)
    far = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64).log()
    assert variance("k3", far, far.flip(0)) > 10 * variance("k1", far, far.flip(0))


def test_k3_where_the_student_excludes_tokens_of_the_teacher():
    """The expectation lacks the teacher's probability of them."""
    student, log_p = make_pair(4)
    student = student.detach()
    student[2] = -INF
    log_q = torch.log_softmax(student, -1)
    kept = log_q != -INF
    q, p = log_q[kept].exp(), log_p[kept].exp()
    exact = (q * (q / p).log()).sum()
    k3 = (q * reverse_kl_estimate(log_q, log_p, kind="k3")[kept]).sum()
    torch.testing.assert_close(k3, exact - log_p[2].exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "values", "gradients"),
    [
        (-0.5, -INF, (INF, INF, INF), (1, INF, 1)),
        (-INF, -0.5, (-INF, INF, INF), (1, -INF, -INF)),
        (-INF, -INF, (0, 0, 0), (0, 0, 0)),
        (-1.0, -1.0, (0, 0, 0), (1, 0, 0)),
        (-200.0, -1.0, (-199, 199**2 / 2, INF), (1, -199, -INF)),  # p/q overflows float32
        (-1.0, -200.0, (199, 199**2 / 2, 198), (1, 199, 1)),
        (math.nan, -1.0, (math.nan,) * 3, (1, math.nan, math.nan)),
    ],
)
def test_edges(student, teacher, values, gradients):
    """Infinite and equal log-probabilities; a neighbour is untouched."""
    for kind, value, slope in zip(KINDS, values, gradients, strict=True):
        log_q = torch.tensor([student, -1.0], requires_grad=True)
        estimate = reverse_kl_estimate(log_q, torch.tensor([teacher, -1.5]), kind=kind)
        estimate.sum().backward()
        kwargs = {"rtol": 1e-6, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(estimate[0].item(), float(value), **kwargs)
        torch.testing.assert_close(log_q.grad[0].item(), float(slope), **kwargs)
        alone = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}[kind]
        assert estimate[1].item() == pytest.approx(alone, rel=1e-6)


def test_k3_of_near_equal_log_probabilities():
    """Off by a unit of the log-ratio, never below 0; exp(r) - 1 - r is off by a unit of 1."""
    size = 10 ** torch.linspace(-6, -1, 1001)
    log_ratio = torch.cat([size, -size])
    ours = reverse_kl_estimate(torch.zeros(2002), log_ratio, kind="k3")
    truth = torch.expm1(log_ratio.double()) - log_ratio.double()
    error = (ours - truth).abs()
    assert (error <= 2**-22 * log_ratio.abs()).all()
    assert (ours >= 0).all()
    naive = log_ratio.exp() - 1 - log_ratio
    assert not ((naive - truth).abs() <= 2**-22 * log_ratio.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    student, log_p = make_pair(5)
    log_q = torch.log_softmax(student.detach(), -1).requires_grad_()
    estimate = lambda log_q: reverse_kl_estimate(log_q, log_p, kind=kind)
    assert torch.autograd.gradcheck(estimate, log_q)
    assert torch.autograd.gradgradcheck(estimate, log_q)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtypes(kind):
    single, double = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5, dtype=torch.float64)
    for student, teacher in [(single, single), (double, double), (single, double)]:
        estimate = reverse_kl_estimate(student, teacher, kind=kind)
        assert estimate.shape == (2, 3)
        assert estimate.dtype == torch.promote_types(student.dtype, teacher.dtype)
    for shape in [(), (0,), (4, 0)]:
        assert reverse_kl_estimate(torch.zeros(shape), torch.zeros(shape), kind=kind).shape == shape


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "k4"}, ValueError, "kind must be one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"student": [0.0]}, TypeError, "student_log_prob must be a tensor .*got list"),
        ({"teacher": None}, TypeError, "teacher_log_prob must be a tensor .*got NoneType"),
        ({"student": X.bfloat16()}, TypeError, "student_log_prob must be float32 or float64, got"),
        ({"teacher": X.long()}, TypeError, "teacher_log_prob must be float32 or float64, got"),
        ({"teacher": X[:1]}, ValueError, r"shape of student_log_prob, \(2, 3\), got \(1, 3\)"),
        ({"teacher": X.to("meta")}, ValueError, "on meta, but student_log_prob on cpu"),
        (
            {"teacher": X.clone().requires_grad_()},
            ValueError,
            "teacher_log_prob requires grad.*detach it",
        ),
    ],
)
def test_validation(change, error, message):
    arguments = {"student": X, "teacher": X, "kind": "k1"} | change
    with pytest.raises(error, match=message):
        reverse_kl_estimate(arguments["student"], arguments["teacher"], kind=arguments["kind"])


def test_kind_has_no_default():
    with pytest.raises(TypeError, match="kind"):
        reverse_kl_estimate(X, X)


@pytest.mark.full
def test_example_of_the_page():
    (block,) = (ROOT / "docs/estimators.md").read_text().split("```python\n")[1:]
    subprocess.run([sys.executable, "-c", block.split("```")[0]], check=True)
