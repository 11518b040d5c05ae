"""Rows made to break a kernel, against the float64 oracle: every divergence and path.

What each row is for stands beside it. The vocabulary spans several of the interpreter's tiles and
ends in a partial one, and its rows begin at addresses that are not multiples of 16 bytes.
"""

import pytest
import torch

from distill_ops import (
    AlphaBeta,
    ForwardKL,
    ReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    distillation_loss,
    reference,
)
from tests.support.cases import DIVERGENCES
from tests.support.helpers import Result, make_logits, run, run_reference

N_COLS = 1203  # float32: two whole tiles of 512 columns and a partial one
INF = float("inf")
EPS = torch.finfo(torch.float32).eps
UNITS = 2


def spike(height, student_at, teacher_at):
    """One logit far from all others: everything else underflows, or (negative) it alone does."""

    def change(student, teacher):
        student[0, student_at] += height
        teacher[0, teacher_at] += height

    return change


def offset(student_by, teacher_by):
    """A whole row far from zero: float32 numbers there are 0.002 apart, and a normaliser folded
    into one number as well."""

    def change(student, teacher):
        student += student_by
        teacher += teacher_by

    return change


def first_tiles_infinite(student_to, teacher_to):
    """Top-p masking: until a finite logit comes the running maximum is -inf."""

    def change(student, teacher):
        student[:, :student_to] = -INF
        teacher[:, :teacher_to] = -INF

    return change


def one_finite(column):
    """Both distributions are certain, of the same column."""

    def change(student, teacher):
        for row in (student, teacher):
            kept = row[:, column].clone()
            row[:] = -INF
            row[:, column] = kept

    return change


def equal_logits(student, teacher):
    """A student without preference, all exponentials 1."""
    student[:] = -7.0


def subnormal(student, teacher):
    """Probabilities around 1e-40, which hardware flushes to 0, in half of the columns."""
    student[:, ::2] -= 92.0
    teacher[:, 1::2] -= 92.0


def underflow(student, teacher):
    """Probabilities just above and below the smallest float32."""
    steps = torch.linspace(-110.0, -80.0, N_COLS // 2)
    student[:, : len(steps)] = steps
    teacher[:, -len(steps) :] = steps


def rising(student, teacher):
    """The running maximum moves in every tile of one row and never in the other."""
    ramp = torch.linspace(-60.0, 60.0, N_COLS)
    student += ramp
    teacher -= ramp


def ties(student, teacher):
    """Two columns share all the probability, in different tiles."""
    for row in (student, teacher):
        row[:, 5] = row[:, -5] = 50.0
    teacher[:, 5] += 1.0


ROWS = {
    "spike": spike(1e4, 700, 700),
    "spikes apart": spike(1e4, 3, 1200),
    "spike down": spike(-1e4, 700, 3),
    "offset": offset(3e4, 3e4),
    "offset down": offset(-3e4, -3e4),
    "offsets apart": offset(3e4, -3e4),
    "first tiles -inf": first_tiles_infinite(1100, 1100),
    "first tiles of the student -inf": first_tiles_infinite(1030, 0),
    "first tiles of the teacher -inf": first_tiles_infinite(0, 1030),
    "all but the last -inf": first_tiles_infinite(N_COLS - 1, N_COLS - 1),
    "one finite, in the first tile": one_finite(2),
    "equal logits": equal_logits,
    "subnormal": subnormal,
    "underflow": underflow,
    "rising": rising,
    "ties": ties,
}


# Whose loss takes the logarithm of one distribution under the other: far apart, it is large.
CROSSED = (SoftCrossEntropy, ForwardKL, ReverseKL, SymmetricKL)


def rounding(divergence, student, teacher, temperature):
    """What a unit in the last place of every logarithm and exponential does to the loss of a row
    and, divided by the temperature, to its gradient's L1 norm; columns without probability left out."""
    if divergence.infinite_at_teacher_zero:
        student = student.masked_fill(teacher == -INF, -INF)
    logs = [torch.log_softmax(x.double() / temperature, -1) for x in (student, teacher)]
    (log_q, log_p), (q, p) = ([x.where(x > -INF, 0.0) for x in logs], [x.exp() for x in logs])
    if isinstance(divergence, AlphaBeta):
        total = divergence.alpha + divergence.beta
        terms = q**total * (1 + log_q.abs()) + p**total * (1 + log_p.abs())
        terms = terms / (divergence.alpha * divergence.beta)
    else:
        terms = q * (1 + log_q.abs()) + p * (1 + log_p.abs())
    if isinstance(divergence, CROSSED):
        terms = terms + q * log_p.abs() + p * log_q.abs()
    return EPS * terms.sum()


def make_rows(row):
    student, teacher = make_logits((1, N_COLS), seed=3)
    ROWS[row](student, teacher)
    return student, teacher


# "forward" makes the gradient beside the loss; "backward" from the row's statistics. Where a
# divergence has closed moments, these are another way to its loss.
MODES = [(divergence, "forward") for divergence in DIVERGENCES]
MODES += [(d, "backward") for d in DIVERGENCES if d.moment != "none"]


@pytest.mark.covering("row gradient", "divergence gradient")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("divergence", "gradient"), MODES, ids=str)
def test_adversarial_rows(divergence, row, gradient, backend, device):
    """At most twice eager's error and UNITS roundings: eager is often exact here, by luck."""
    student, teacher = make_rows(row)
    options = {
        "divergence": divergence,
        "temperature": 1.0 if gradient == "forward" else 0.7,
        "upstream_seed": None,
    }
    ours = run(
        distillation_loss, student.to(device), teacher.to(device),
        gradient=gradient, backend=backend, **options,
    )  # fmt: skip
    eager, truth = (
        run_reference(student, teacher, double=double, **options) for double in (False, True)
    )
    allowed = UNITS * rounding(divergence, student, teacher, options["temperature"])
    for name in Result._fields:
        error, eager_error = (
            (getattr(x, name).cpu() - getattr(truth, name)).abs().sum() for x in (ours, eager)
        )
        limit = 2 * eager_error + allowed
        assert error <= limit, (
            f"{name}: error {error:.3g}, eager's {eager_error:.3g}, at most {limit:.3g}"
        )
        allowed = allowed / options["temperature"]


@pytest.mark.covering("row", "divergence")
@pytest.mark.parametrize("row", [row for row in ROWS if "apart" not in row and "of the" not in row])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_identical_rows(divergence, row, backend, device):
    """Loss and gradient are 0 but for rounding; the soft cross-entropy's loss is the entropy."""
    _, teacher = make_rows(row)
    ours = run(
        distillation_loss, teacher.to(device), teacher.to(device),
        divergence=divergence, backend=backend, upstream_seed=None,
    )  # fmt: skip
    allowed = UNITS * rounding(divergence, teacher, teacher, 1.0)
    assert ours.gradient.abs().sum() <= allowed
    if not isinstance(divergence, SoftCrossEntropy):
        assert ours.loss.abs() <= allowed


@pytest.mark.parametrize("gradient", ["forward", "none"])
@pytest.mark.parametrize("offset", [0.0, -3e4])
def test_symmetric_kl_of_nearly_equal_rows(offset, gradient, backend, device):
    """p and q cancel in every term, and not in the sums over either that one sweep could give: loss
    and gradient made of these are wrong by two to three times eager PyTorch's error."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(16, 700, generator=generator) + offset
    student = teacher + 0.004 * torch.randn(16, 700, generator=generator)

    def losses_and_gradient(student, teacher, loss_function, **options):
        logits = student.clone().requires_grad_()
        options |= {"divergence": SymmetricKL(), "temperature": 0.5}
        with torch.set_grad_enabled(gradient == "forward"):
            losses = [
                loss_function(*row, reduction="sum", **options)
                for row in zip(logits, teacher, strict=True)
            ]
        if gradient == "none":
            return [torch.stack(losses).double().cpu()]
        (gradients,) = torch.autograd.grad(sum(losses), logits)
        return [torch.stack(losses).detach().double().cpu(), gradients.double().cpu()]

    eager = losses_and_gradient(student, teacher, reference.distillation_loss)
    truth = losses_and_gradient(student.double(), teacher.double(), reference.distillation_loss)
    logits = student.to(device), teacher.to(device)
    ours = losses_and_gradient(*logits, distillation_loss, backend=backend)
    # the kernels have p - q from the ratio's logarithm there
    limits = (1.5, 1.5) if backend == "torch" else (1.5, 0.1)
    for mine, of_eager, exact, limit in zip(ours, eager, truth, limits, strict=False):
        assert (mine - exact).norm() <= limit * (of_eager - exact).norm()
