"""semantics.md, checked: worked values, infinities, and the facts that hold for every divergence."""

import math

import pytest
import torch

import distill_ops
from distill_ops import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    distillation_loss,
    reference,
)
from tests.support.cases import DIVERGENCES
from tests.support.helpers import (
    check,
    make_logits,
    run,
    run_reference,
)
from tests.support.semantics_page import ROWS, worked_values

INF = float("inf")
S, Q = ROWS["S"], ROWS["Q"]


def losses(backend):
    """The loss function of a path, and the dtype it is held in."""
    if backend == "reference":
        return reference.distillation_loss, torch.float64
    dtype = torch.float64 if backend == "torch" else torch.float32
    return lambda s, t, **o: distillation_loss(s, t, backend=backend, **o), dtype


PATHS = [
    "reference",
    "torch",
    pytest.param("triton", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("worked", worked_values(), ids=lambda w: f"{w[0]}-{w[4]}")
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_worked_values(worked, backend, gradient, kernel_device):
    divergence, options, student, teacher, expected, expected_gradient = worked
    loss_function, dtype = losses(backend)
    options = dict(options)
    if backend != "reference":
        options["gradient"] = gradient
    # a second row of weight 0 that holds NaN changes nothing
    student = torch.tensor([student, [math.nan] * 5], dtype=dtype, device=kernel_device(backend))
    teacher = torch.tensor([teacher, [math.nan] * 5], dtype=dtype, device=student.device)
    if "labels" in options:
        options["labels"] = torch.tensor([options["labels"], -100], device=student.device)
    else:
        options["loss_mask"] = torch.tensor([1, 0], device=student.device)
    student.requires_grad_()
    loss = loss_function(student, teacher, divergence=divergence, **options)
    loss.backward()
    tolerance = 6e-11 if dtype == torch.float64 else 2e-7
    if divergence.name == "alpha_beta":
        tolerance *= 5  # its sum is divided by alpha * beta = 0.14
    assert loss.item() == pytest.approx(expected, abs=tolerance)
    assert student.grad[0].tolist() == pytest.approx(expected_gradient, abs=tolerance)
    assert (student.grad[1] == 0).all()


@pytest.mark.parametrize("backend", PATHS)
def test_worked_cross_entropy_with_weights(backend, kernel_device):
    loss_function, dtype = losses(backend)
    student = torch.tensor([S, Q], dtype=dtype, device=kernel_device(backend))
    loss = loss_function(
        student, None, hard_label_weight=1, labels=torch.tensor([1, 4], device=student.device),
        loss_mask=torch.tensor([0.75, 0.25], device=student.device),
    )  # fmt: skip
    tolerance = 1e-12 if dtype == torch.float64 else 2e-7
    assert loss.item() == pytest.approx(0.609932186143, abs=tolerance)


def banned(logits, *columns, value=-INF):
    logits = logits.clone()
    for column in columns:
        logits[..., column] = value
    return logits


# (student columns, teacher columns) set to -inf
PLACES = {
    "student": ((3, slice(10, 14)), ()),
    "teacher": ((), (5, slice(20, 30))),
    "overlapping": ((3, slice(10, 14)), (3, slice(12, 20))),
    "padding": ((slice(30, None),), (slice(30, None),)),
    "first_tiles": ((slice(0, 3000),), (slice(0, 2500),)),
    "one_column_left": ((slice(0, 7), slice(8, None)), ()),
}


@pytest.mark.covering("place divergence.operands", "place gradient", "divergence gradient")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_infinite_logits_are_dropped(divergence, place, gradient, backend, device):
    n_cols = 4099 if place == "first_tiles" else 40
    student, teacher = make_logits((3, n_cols), device=device)
    student_columns, teacher_columns = PLACES[place]
    # one row without infinities: only the others take the guarded way
    student[:2], teacher[:2] = (
        banned(student[:2], *student_columns),
        banned(teacher[:2], *teacher_columns),
    )
    options = {"divergence": divergence, "temperature": 1.5, "backend": backend}
    ours = check(distillation_loss, student, teacher, gradient=gradient, **options)
    assert (ours.gradient[student == -INF] == 0).all()


@pytest.mark.covering("place divergence.moment", "divergence")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_infinite_logits_without_gradient(divergence, place, backend, device):
    """The forward alone takes one sweep where the moments are closed; it must fall back too."""
    n_cols = 4099 if place == "first_tiles" else 40
    student, teacher = make_logits((2, n_cols), device=device)
    student_columns, teacher_columns = PLACES[place]
    student, teacher = banned(student, *student_columns), banned(teacher, *teacher_columns)
    loss = distillation_loss(student, teacher, divergence=divergence, backend=backend)
    truth = run_reference(student, teacher, double=True, divergence=divergence)
    assert loss.item() == pytest.approx(truth.loss.item(), rel=2e-6)


@pytest.mark.covering("place divergence.operands", "divergence")
@pytest.mark.parametrize("place", ["student", "teacher", "overlapping", "padding"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_infinite_logits_propagate(divergence, place, backend, device):
    student, teacher = make_logits((2, 40), device=device)
    student_columns, teacher_columns = PLACES[place]
    student, teacher = banned(student, *student_columns), banned(teacher, *teacher_columns)
    options = {"divergence": divergence, "infinities": "propagate", "reduction": "sum"}
    ours = run(distillation_loss, student, teacher, backend=backend, **options)
    truth = run_reference(student, teacher, double=True, **options)
    infinite = {
        "soft_cross_entropy": place in ("student", "overlapping"),
        "forward_kl": place in ("student", "overlapping"),
        "reverse_kl": place in ("teacher", "overlapping"),
        "symmetric_kl": place != "padding",
    }.get(divergence.name, False)
    if not infinite:
        check(distillation_loss, student, teacher, backend=backend, **options)
        return
    assert ours.loss == truth.loss == INF
    if divergence.infinite_at_teacher_zero and place != "student":
        assert not ours.gradient.isfinite().any()
    else:  # finite: q - p for the forward KL, as in PyTorch
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(ours.gradient.double(), truth.gradient, rtol=0, atol=4 * eps)


@pytest.mark.covering("divergence.operands gradient")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_rows_without_a_softmax_are_nan_and_alone(divergence, gradient, backend, device):
    """NaN, infinity and nothing but -inf, of the student or the teacher, every second row."""
    student, teacher = make_logits((13, 40), device=device)
    for first, side in ((1, student), (7, teacher)):
        side[first, 7], side[first + 2, 7], side[first + 4] = math.nan, INF, -INF
        side[first : first + 5 : 2, 9] = -INF  # and a dropped column, which must not hide it
    options = {"divergence": divergence, "gradient": gradient, "backend": backend}
    summed = run(distillation_loss, student, teacher, **options)
    assert summed.loss.isnan()
    del options["gradient"]
    each = run(distillation_loss, student, teacher, reduction="none", **options)
    assert each.loss[1::2].isnan().all()
    assert each.loss[::2].isfinite().all()
    for gradient in (summed.gradient, each.gradient):
        assert gradient[1::2].isnan().all()
        assert gradient[::2].isfinite().all()


def test_disjoint_supports(backend, device):
    student, teacher = make_logits((1, 40), device=device)
    student, teacher = banned(student, slice(0, 20)), banned(teacher, slice(20, None))
    assert distillation_loss(student, teacher, divergence="reverse_kl", backend=backend).isnan()
    for divergence in ("soft_cross_entropy", "forward_kl"):  # every term is dropped
        ours = run(distillation_loss, student, teacher, divergence=divergence, backend=backend)
        assert ours.loss == 0
        assert (ours.gradient == 0).all()
    loss = distillation_loss(student, teacher, divergence=JensenShannon(0.5), backend=backend)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.covering("lowest divergence.moment", "divergence")
@pytest.mark.parametrize("lowest", ["student", "teacher", "both", "whole rows"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_logits_at_the_lowest_float_are_finite(divergence, lowest, backend, device):
    """Masks of ``finfo.min`` overflow when divided by a temperature below 1, or by ln 2."""
    student, teacher = make_logits((2, 40), device=device)
    low = torch.finfo(torch.float32).min
    if lowest == "whole rows":
        student[0], teacher[1] = low, low
    else:
        if lowest in ("student", "both"):
            student = banned(student, slice(4, 9), value=low)
        if lowest in ("teacher", "both"):
            teacher = banned(teacher, slice(4, 9), value=low)
    student.requires_grad_()
    loss = distillation_loss(
        student, teacher, divergence=divergence, reduction="none", backend=backend
    )
    loss.sum().backward()
    assert not loss.isnan().any()
    assert student.grad.isfinite().all()
    truth = reference.distillation_loss(
        student.detach().double(), teacher.double(), divergence=divergence, reduction="none"
    )
    assert loss.tolist() == pytest.approx(truth.tolist(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_hard_label_sees_the_full_student(weight, temperature, backend, device):
    """Reverse KL restricts the student to the teacher's support; the cross-entropy does not."""
    student, teacher = make_logits((3, 40), device=device)
    student, teacher = banned(student, 4), banned(teacher, slice(10, 15))
    options = {
        "divergence": "reverse_kl", "hard_label_weight": weight, "temperature": temperature,
        "labels": torch.tensor([12, 3, 39], device=device), "backend": backend,
    }  # fmt: skip
    for gradient in ("forward", "backward"):
        check(distillation_loss, student, teacher, gradient=gradient, **options)


def test_a_label_with_an_infinite_logit(backend, device):
    student, teacher = make_logits((2, 40), device=device)
    student = banned(student, 4)
    labels = torch.tensor([4, 5], device=device)
    ours = run(
        distillation_loss, student, teacher, labels=labels, hard_label_weight=0.5,
        reduction="none", backend=backend,
    )  # fmt: skip
    assert ours.loss[0] == INF
    assert ours.loss[1].isfinite()
    assert ours.gradient.isfinite().all()


# --- facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_facts_of_a_divergence(divergence, backend, device):
    student, teacher = make_logits((4, 300), device=device)
    options = {"divergence": divergence, "backend": backend}
    eps = torch.finfo(torch.float32).eps
    ours = run(distillation_loss, student, teacher, **options)
    # every gradient row sums to 0
    assert (ours.gradient.double().sum(-1).abs() <= 300 * eps * ours.gradient.abs().max()).all()
    # a constant added to a row changes nothing (a power of two: exact in these logits' range)
    shifted = run(distillation_loss, student + 16.0, teacher - 32.0, **options)
    assert shifted.loss.item() == pytest.approx(ours.loss.item(), rel=1e-4)
    if divergence != distill_ops.SoftCrossEntropy():
        same = run(distillation_loss, student, student, **options)
        assert same.loss.abs() <= 16 * eps  # alpha-beta divides by alpha * beta = 0.14
        assert (same.gradient.abs() <= 4 * eps).all()


def test_symmetry_of_jensen_shannon(backend, device):
    student, teacher = make_logits((3, 50), device=device)
    one = distillation_loss(student, teacher, divergence=JensenShannon(0.3), backend=backend)
    other = distillation_loss(teacher, student, divergence=JensenShannon(0.7), backend=backend)
    assert one.item() == pytest.approx(other.item(), rel=1e-5)


def test_end_points_are_the_kls(backend, device):
    student, teacher = make_logits((3, 50), device=device)
    limits = [
        (JensenShannon(0), ForwardKL()),
        (JensenShannon(1.0), "reverse_kl"),
        (distill_ops.SkewForwardKL(0.0), "forward_kl"),
        (distill_ops.SkewReverseKL(0), ReverseKL()),
        (distill_ops.AlphaBeta(1, 0), "forward_kl"),
        (distill_ops.AlphaBeta(0, 1.0), "reverse_kl"),
    ]
    for limit, kl in limits:
        ours = run(distillation_loss, student, teacher, divergence=limit, backend=backend)
        theirs = run(distillation_loss, student, teacher, divergence=kl, backend=backend)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.gradient, theirs.gradient)


def test_soft_cross_entropy_and_forward_kl_share_their_gradient(backend, device):
    student, teacher = make_logits((3, 50), dtype=torch.bfloat16, device=device)
    soft, kl = (
        run(distillation_loss, student, teacher, divergence=d, backend=backend)
        for d in (distill_ops.SoftCrossEntropy(), ForwardKL())
    )
    assert torch.equal(soft.gradient, kl.gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_slope_is_the_derivative_of_value(divergence):
    """The device text itself, on tensors: slope = d value / d log_q at fixed p."""
    student, teacher = make_logits((64,), dtype=torch.float64)
    log_q = torch.log_softmax(student, -1).requires_grad_()
    log_p = torch.log_softmax(teacher, -1)
    value, slope = divergence.on_columns(log_q, log_p, divergence.parameters)
    (derivative,) = torch.autograd.grad(value.sum(), log_q)
    # soft cross-entropy and forward KL leave nothing out; the others' q-dependence is in slope
    torch.testing.assert_close(slope, derivative, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_closed_forms_agree_with_the_text_they_replace(divergence, monkeypatch):
    from distill_ops.cpu import dense

    student, teacher = make_logits((5, 200), dtype=torch.float64)
    closed = run(distillation_loss, student, teacher, divergence=divergence, temperature=1.3)
    monkeypatch.setattr(dense, "CLOSED_FORMS", {})
    general = run(distillation_loss, student, teacher, divergence=divergence, temperature=1.3)
    assert closed.loss.item() == pytest.approx(general.loss.item(), rel=1e-13)
    torch.testing.assert_close(closed.gradient, general.gradient, rtol=1e-11, atol=1e-16)
