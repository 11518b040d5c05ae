"""Facts that hold for every divergence and any logits, searched for counterexamples.

What rounding may cost. A float32 logarithm of a probability is off by about a unit in its last
place, and the probability, its exponential, by as much relatively. The terms of a loss and of a
gradient are probabilities times logarithms, so that one unit everywhere can do
``eps * magnitude`` to a token's loss and, at temperature 1, to the sum of its gradient, where::

    magnitude = sum((q + p) * (1 + abs(log_q) + abs(log_p)))

The tests allow UNITS of them. There is no other tolerance, and none has a floor.
"""

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_ops import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    TotalVariation,
    distillation_loss,
)
from tests.support.helpers import Result, make_logits, run

pytest.importorskip("triton")

EPS = torch.finfo(torch.float32).eps
UNITS = 2
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# The same examples in every run; few where the interpreter runs them. The fixture that hypothesis
# would warn of is a name, the same for every example.
search = settings(
    max_examples=6 if INTERPRETING else 120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

shares = st.floats(0.01, 0.99)
exponents = st.sampled_from([0.2, 0.5, 0.7, 1.0, 1.5])
divergences = st.one_of(
    st.sampled_from([SoftCrossEntropy(), ForwardKL(), ReverseKL(), TotalVariation()]),
    st.builds(JensenShannon, shares),
    st.builds(SymmetricKL, shares),
    st.builds(SkewForwardKL, shares),
    st.builds(SkewReverseKL, shares),
    st.builds(AlphaBeta, exponents, exponents),
)


class Case(NamedTuple):
    divergence: Divergence
    student: torch.Tensor  # [N, V], float32
    teacher: torch.Tensor
    temperature: float

    def run(self, backend, device, divergence=None, swap=False, **options):
        """Loss and gradient, on the CPU, of these logits or of them with the roles exchanged."""
        pair = (self.teacher, self.student) if swap else (self.student, self.teacher)
        result = run(
            distillation_loss, *(x.to(device) for x in pair), upstream_seed=None, backend=backend,
            divergence=divergence or self.divergence, temperature=self.temperature, **options,
        )  # fmt: skip
        return Result(*(x.cpu() for x in result))

    def logarithms(self):
        pair = (self.student, self.teacher)
        return [torch.log_softmax(x.double() / self.temperature, -1) for x in pair]

    def tolerance(self):
        """For the loss of each token ``[N]``, and, divided by the temperature, the L1 norm of its
        gradient's error."""
        log_q, log_p = self.logarithms()
        per_column = (log_q.exp() + log_p.exp()) * (1 + log_q.abs() + log_p.abs())
        per_column = per_column.where(log_q + log_p > -torch.inf, 0.0)
        if isinstance(self.divergence, AlphaBeta):  # its terms are divided by the two exponents
            per_column = per_column / (self.divergence.alpha * self.divergence.beta)
        return UNITS * EPS * per_column.sum(-1)

    def gradient_tolerance(self):
        tolerance = self.tolerance()
        if isinstance(self.divergence, TotalVariation):  # the sign of q - p, where it is rounding
            log_q, log_p = self.logarithms()
            q, p = log_q.exp(), log_p.exp()
            rounding = UNITS * EPS * (q + p) * (1 + log_q.abs() + log_p.abs())
            undecided = torch.where((q - p).abs() <= rounding, q, 0.0).sum(-1)
            tolerance = tolerance + 2 * undecided
        return tolerance / self.temperature


@st.composite
def cases(draw, max_rows=3, whole=False):
    """Rows from flat to one-hot, student and teacher from equal to unrelated.

    whole: the logits are multiples of 1/64 of at most 16 and the temperature a power of 2, so that a
    shift by a whole number rounds neither the logits nor, where a path divides first, their
    quotients."""
    shape = draw(st.integers(1, max_rows)), draw(st.integers(1, 70))
    student, other = make_logits(shape, seed=draw(st.integers(0, 2**31 - 1)), scale=1.0)
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 20.0]))
    distance = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0]))
    student, teacher = student * scale, torch.lerp(student, other, distance) * scale
    if whole:
        student, teacher = ((x.clamp(-16, 16) * 64).round() / 64 for x in (student, teacher))
    temperatures = st.sampled_from([0.5, 1.0, 2.0, 4.0]) if whole else st.floats(0.25, 4.0)
    return Case(draw(divergences), student, teacher, draw(temperatures))


def assert_within(difference, tolerance):
    worst = (difference.abs() / tolerance).max().item()
    assert worst <= 1, f"{UNITS * worst:.3g} units, at most {UNITS} allowed"  # also refuses NaN


@given(cases(), st.sampled_from(["none", "sum"]))
@search
def test_gradients_of_a_row_sum_to_zero(backend, device, case, reduction):
    ours = case.run(backend, device, reduction=reduction)
    assert_within(ours.gradient.double().sum(-1), case.tolerance() / case.temperature)


@given(cases(whole=True), st.integers(-30000, 30000), st.integers(-30000, 30000))
@search
def test_adding_a_constant_to_a_row_changes_nothing(backend, device, case, up, teacher_up):
    ours = case.run(backend, device, reduction="none")
    moved = case._replace(student=case.student + up, teacher=case.teacher + teacher_up)
    assert torch.equal(moved.student - up, case.student)
    theirs = moved.run(backend, device, reduction="none")
    assert_within(theirs.loss - ours.loss, 2 * case.tolerance())
    distance = (theirs.gradient - ours.gradient).abs().sum(-1)
    assert_within(distance, 2 * case.gradient_tolerance())


@given(cases(), st.booleans(), st.sampled_from(["none", "sum"]))
@search
def test_zero_at_equality(backend, device, case, flat, reduction):
    """And the teacher's entropy for the soft cross-entropy; the gradient is 0 for both."""
    student = torch.zeros_like(case.student) if flat else case.student
    case = case._replace(student=student, teacher=student)
    ours = case.run(backend, device, reduction=reduction)
    assert_within(ours.gradient.abs().sum(-1), case.tolerance() / case.temperature)
    if isinstance(case.divergence, (ForwardKL, ReverseKL, SymmetricKL, TotalVariation)):
        assert not ours.loss.any()  # no rounding: the two rows' logarithms are the same numbers
        return
    expected = torch.zeros(len(student))
    if isinstance(case.divergence, SoftCrossEntropy):
        _, log_p = case.logarithms()
        expected = -(log_p.exp() * log_p).sum(-1)
    total = torch.sum if reduction == "sum" else torch.clone
    assert_within(ours.loss - total(expected), total(case.tolerance()))


@given(cases())
@search
def test_never_negative(backend, device, case):
    ours = case.run(backend, device, reduction="none")
    assert_within(ours.loss.clamp(max=0), case.tolerance())


def exchanged(divergence):
    """The divergence of student and teacher exchanged."""
    if isinstance(divergence, JensenShannon):
        return JensenShannon(1 - divergence.beta)
    if isinstance(divergence, SymmetricKL):
        return SymmetricKL(1 - divergence.weight)
    if isinstance(divergence, AlphaBeta):
        return AlphaBeta(divergence.beta, divergence.alpha)
    if isinstance(divergence, SkewForwardKL):
        return SkewReverseKL(divergence.alpha)
    if isinstance(divergence, SkewReverseKL):
        return SkewForwardKL(divergence.alpha)
    partners = {ForwardKL(): ReverseKL(), ReverseKL(): ForwardKL()}
    return partners.get(divergence, divergence)


@given(cases())
@search
def test_student_and_teacher_exchanged(backend, device, case):
    """JSD(beta) of (S, Q) is JSD(1 - beta) of (Q, S); forward KL is the reverse; and so on."""
    if isinstance(case.divergence, SoftCrossEntropy):
        case = case._replace(divergence=ForwardKL())
    ours = case.run(backend, device, reduction="none").loss
    other = exchanged(case.divergence)
    theirs = case.run(backend, device, divergence=other, swap=True, reduction="none").loss
    assert_within(theirs - ours, 2 * case.tolerance())


@given(cases(max_rows=4), st.lists(st.booleans(), min_size=4, max_size=4))
@search
def test_masked_is_sliced(backend, device, case, mask):
    keep = torch.tensor(mask[: len(case.student)])
    ours = case.run(backend, device, reduction="sum", loss_mask=keep.to(device))
    assert not ours.gradient[~keep].any()
    if not keep.any():
        assert ours.loss == 0
        return
    kept = case._replace(student=case.student[keep], teacher=case.teacher[keep])
    sliced = kept.run(backend, device, reduction="sum")
    assert_within(ours.loss - sliced.loss, 2 * kept.tolerance().sum())
    distance = (ours.gradient[keep] - sliced.gradient).abs().sum(-1)
    assert_within(distance, 2 * kept.gradient_tolerance())


@given(cases(max_rows=4))
@search
def test_batched_is_looped(backend, device, case):
    ours = case.run(backend, device, reduction="none")
    for i in range(len(case.student)):
        row = case._replace(student=case.student[i : i + 1], teacher=case.teacher[i : i + 1])
        alone = row.run(backend, device, reduction="sum")
        assert_within(ours.loss[i] - alone.loss, 2 * row.tolerance())
        distance = (ours.gradient[i] - alone.gradient).abs().sum(-1)
        assert_within(distance, 2 * row.gradient_tolerance())


@pytest.mark.parametrize("wrong", ["slope", "normaliser", "row"])
def test_the_tolerance_is_tight(wrong):
    """What a kernel could get wrong by little is outside it: D by 1e-5, the normaliser of an offset
    row folded into one number, a row's neighbour."""
    student, teacher = make_logits((2, 50))
    case = Case(ForwardKL(), student, teacher, 1.0)
    ours = case.run("torch", "cpu", reduction="none")
    tolerance = case.tolerance()
    if wrong == "slope":
        q = torch.softmax(student, -1)
        error = (ours.gradient + 1e-5 * q).double().sum(-1)
    elif wrong == "normaliser":
        offset = student + 300
        error = offset - torch.logsumexp(offset, -1, keepdim=True)
        error = (teacher.softmax(-1) * (error - torch.log_softmax(student, -1))).sum(-1)
    else:
        error = ours.loss.flip(0) - ours.loss
    with pytest.raises(AssertionError, match="units"):
        assert_within(error, tolerance)
