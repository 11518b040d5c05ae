"""Tails of the top-k loss: what a floor, mass terms and repeated ids make of them, and what is said of
each tail (docs/tails.md)."""

import math

import pytest
import torch

from tests.losses.test_topk import EVERY, SOME, by_name, make_topk
from tests.losses.test_topk_edges import check_rows, zero_rows
from tests.support.helpers import check_topk, make_logits, run, topk_of

pytest.importorskip("triton")

from distill_ops import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    distillation_loss,
    reference,
    topk_distillation_loss,
)

INF = math.inf
FLOORED = ("bucket", "restrict", "drop")
by_floored = pytest.mark.parametrize("tail", FLOORED)
KLS = [ForwardKL(), ReverseKL(), SymmetricKL(0.3), JensenShannon(0.0)]


# --- a floor of log-probabilities ----------------------------------------------------------------


@pytest.mark.covering("divergence", "divergence.operands tail")
@by_floored
@by_name
def test_floor(divergence, tail, backend, device):
    """It binds on the student, on the teacher, on both, and on the rest."""
    inputs = make_topk((4, 21), 7, 1.3, device=device)
    options = {"log_prob_floor": -2.2, "temperature": 1.3, "backend": backend}
    ours = check_topk(*inputs, divergence=divergence, tail=tail, **options)
    assert ours.gradient.sum(-1).abs().max() < 1e-6


@pytest.mark.covering("divergence.operands", "tail")
@by_floored
@by_name
def test_nothing_is_infinite_above_a_floor(divergence, tail, backend, device):
    """Every place of a zero: no term is dropped, no student restricted; a student without a logit that
    it may have is NaN."""
    student, log_p, ids = zero_rows(device)
    ours = check_rows(
        student, log_p, ids, divergence=divergence, tail=tail, log_prob_floor=-4.0, backend=backend
    )
    listed = student.gather(-1, ids) if tail == "restrict" else student
    nowhere = (listed == -INF).all(-1)
    if tail == "restrict":
        nowhere |= (log_p == -INF).all(-1)
    assert torch.equal(ours.loss.isnan(), nowhere)


@pytest.mark.covering("divergence", "tail")
@by_floored
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_a_floor_that_binds_nowhere_changes_nothing(divergence, tail, backend, device):
    student, log_p, ids = make_topk((3, 40), 6, device=device)
    options = {"divergence": divergence, "tail": tail, "teacher_ids": ids, "backend": backend}
    plain = run(topk_distillation_loss, student, log_p, **options)
    for floor in (-60.0, -1e300):
        deep = run(topk_distillation_loss, student, log_p, log_prob_floor=floor, **options)
        assert all(map(torch.equal, deep, plain))


# --- mass terms ----------------------------------------------------------------------------------


@pytest.mark.covering("divergence", "floor")
@pytest.mark.parametrize("floor", [None, -3.0])
@pytest.mark.parametrize("divergence", KLS, ids=str)
def test_mass_terms(divergence, floor, backend, device):
    """The generalised KL is at least 0, zeros in either model included, and 0 at equality."""
    student, log_p, ids = zero_rows(device)
    options = {"tail": "drop", "mass_terms": True, "log_prob_floor": floor}
    options |= {"divergence": divergence, "backend": backend, "temperature": 1.4}
    ours = check_rows(student, log_p, ids, **options)
    assert not (ours.loss < 0).any()
    labels = torch.arange(len(student), device=device)
    check_topk(
        student[-1:], log_p[-1:], ids[-1:], labels=labels[-1:], hard_label_weight=0.3, **options
    )
    _, same, listed = make_topk((3, 30), 5, 1.4, device=device)
    _, teacher = make_logits((3, 30), device=device)
    equal = run(topk_distillation_loss, teacher, same, teacher_ids=listed, **options)
    assert equal.loss.abs() < 1e-6
    assert equal.gradient.abs().max() < 1e-7


def test_mass_terms_by_a_weight_of_each_token(backend, device):
    student, log_p, ids = make_topk((3, 30), 5, device=device)
    weights = torch.tensor([0.2, 0.5, 0.9], device=device)
    ours = check_topk(
        student, log_p, ids, divergence=SymmetricKL(weights), tail="drop", mass_terms=True,
        reduction="none", backend=backend,
    )  # fmt: skip
    one = {"tail": "drop", "mass_terms": True, "teacher_ids": ids, "backend": backend}
    forward, reverse = (
        topk_distillation_loss(student, log_p, divergence=d, reduction="none", **one)
        for d in ("forward_kl", "reverse_kl")
    )
    torch.testing.assert_close(ours.loss, (1 - weights) * forward + weights * reverse)


def test_mass_terms_of_nearly_equal_rows(backend, device):
    """Where every term is the small difference of its parts."""
    student, log_p, ids = make_topk((8, 60), 12, device=device)
    _, teacher = make_logits((8, 60), device=device)
    for divergence in KLS[:3]:
        check_topk(
            teacher + 1e-2 * student, log_p, ids, divergence=divergence, tail="drop",
            mass_terms=True, backend=backend,
        )  # fmt: skip


# --- repeated ids --------------------------------------------------------------------------------

# what a slot of each row holds: ids, and whether its log-probability is -inf; then its ids without the
# slots that repeat one
REPEATS = [
    ([3, 7, 3, 3, 5], [0, 0, 1, 1, 0], [3, 7, -1, -1, 5]),  # a server's padding
    ([3, 3, 7, 5, 5], [1, 0, 0, 1, 0], [-1, 3, 7, -1, 5]),  # before the one above -inf
    (
        [3, 7, 3, 3, 5],
        [1, 0, 1, 1, 0],
        [3, 7, -1, -1, 5],
    ),  # none above: the first excludes the token
    ([3, 7, 2, 4, 5], [0, 1, 0, 1, 0], [3, 7, 2, 4, 5]),  # excluded tokens
    ([-1, -1, 2, 2, 0], [1, 0, 0, 1, 0], [-1, -1, 2, -1, 0]),
]


@pytest.mark.covering("divergence", "tail gradient")
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore", "restrict", "drop"])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_slots_that_repeat_an_id_are_unused(divergence, tail, gradient, backend, device):
    ids, zero, left = (torch.tensor(x, device=device) for x in zip(*REPEATS, strict=True))
    student, log_p, _ = make_topk((len(REPEATS), 9), 5, device=device)
    log_p = log_p.masked_fill(zero.bool(), -INF)
    options = {"divergence": divergence, "tail": tail, "gradient": gradient, "backend": backend}
    options |= {"labels": ids[:, 2], "hard_label_weight": 0.3}
    ours = check_topk(student, log_p, ids, **options)
    named = run(topk_distillation_loss, student, log_p, teacher_ids=left, **options)
    assert all(map(torch.equal, ours, named))


def test_ids_that_cover_the_vocabulary_once(backend, device):
    """Repeats do not count among the columns: there is a rest, or none."""
    student, teacher = make_logits((2, 4), device=device)
    log_p, _ = topk_of(teacher, 4)
    ids = torch.tensor([[0, 1, 2, 2, 2], [0, 1, 2, 3, 0]], device=device)
    log_p = torch.cat([log_p, torch.full_like(log_p[:, :1], -INF)], -1)
    log_p[0, 3] = -INF
    check_rows(student, log_p, ids, divergence="forward_kl", backend=backend)


def test_two_finite_slots_of_an_id_are_refused():
    student, log_p = torch.zeros(2, 9), torch.full((2, 4), -2.0)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 5, 5]])
    log_p[1, 2] = -INF
    with pytest.raises(ValueError, match="unique within a token, got 5 twice, of .* above -inf"):
        topk_distillation_loss(student, log_p, ids)
    log_p[1, 3] = -INF
    assert topk_distillation_loss(student, log_p, ids).isfinite()


# --- what is said of each tail -------------------------------------------------------------------


@by_name
def test_restrict_is_the_dense_loss_of_the_k(divergence):
    student, teacher = (x.double() for x in make_logits((3, 20)))
    log_p, ids = topk_of(teacher, 6)
    options = {"divergence": divergence, "reduction": "none", "temperature": 1.5}
    ours = run(topk_distillation_loss, student, log_p, teacher_ids=ids, tail="restrict", **options)
    # a teacher whose softmax at T the log-probabilities are
    dense = run(distillation_loss, student.gather(-1, ids), log_p * 1.5, **options)
    torch.testing.assert_close(ours.loss, dense.loss, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(ours.gradient.gather(-1, ids), dense.gradient, rtol=1e-9, atol=1e-13)
    assert (ours.gradient.scatter(-1, ids, 0.0) == 0).all()


@pytest.mark.parametrize("tail", ["bucket", "restrict"])
@pytest.mark.parametrize("divergence", EVERY[1:], ids=lambda d: str(d)[:40])
def test_no_loss_at_equality(divergence, tail):
    _, teacher = (x.double() for x in make_logits((4, 20)))
    log_p, ids = topk_of(teacher, 6)
    ours = run(
        topk_distillation_loss, teacher, log_p, teacher_ids=ids, tail=tail, divergence=divergence
    )
    assert ours.loss.abs() < 1e-12
    if divergence != TotalVariation():  # whose gradient is the sign of rounding there
        assert ours.gradient.abs().max() < 1e-12


def dropped(divergence, q, p, **options):
    """Per-token losses with "drop" of probabilities [n, 2] of two tokens among four."""
    rest = (1 - q.sum(-1, keepdim=True)) / 2
    student = torch.cat([q, rest, rest], -1).log().requires_grad_()
    ids = torch.tensor([[0, 1]]).expand_as(p)
    loss = topk_distillation_loss(
        student, p.log(), ids, divergence=divergence, tail="drop", reduction="none", **options
    )
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def test_minima_of_what_drop_leaves():
    """Forward KL: q = p / sum(p), below 0; reverse KL: q = p / e, -sum(p) / e; with mass terms, and for
    divergences of terms that are least at q = p: p, 0."""
    p = torch.tensor([[0.5, 0.3]], dtype=torch.float64)
    loss, _ = dropped("forward_kl", p / 0.8 * (1 - 1e-9), p)
    assert loss.item() == pytest.approx(0.8 * math.log(0.8), abs=1e-8)
    loss, gradient = dropped("reverse_kl", p / math.e, p)
    assert loss.item() == pytest.approx(-0.8 / math.e, abs=1e-14)
    assert gradient.abs().max() < 1e-14
    for divergence in (JensenShannon(0.3), AlphaBeta(0.2, 0.7), SymmetricKL(0.5)):
        loss, gradient = dropped(divergence, p, p)
        assert max(loss.abs().item(), gradient.abs().max().item()) < 1e-14
    for divergence in KLS[:3]:
        loss, gradient = dropped(divergence, p, p, mass_terms=True)
        assert max(loss.abs().item(), gradient.abs().max().item()) < 1e-14


def test_where_drop_is_negative():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 2000, 3, generator=generator, dtype=torch.float64)
    q, p = logits.softmax(-1)[..., :2]
    for divergence in (JensenShannon(0.3), AlphaBeta(0.2, 0.7), SymmetricKL(0.5), TotalVariation()):
        assert (dropped(divergence, q, p)[0] >= 0).all()
    for divergence in (*KLS[:3], SkewForwardKL(0.1), SkewReverseKL(0.1)):
        assert (dropped(divergence, q, p)[0] < 0).any()
    for divergence in KLS[:3]:
        assert (dropped(divergence, q, p, mass_terms=True)[0] >= 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_mass_terms_leave_what_cancels_to_neither(divergence, backend, device):
    """Of near rows a term and its masses cancel to second order: the error of eager PyTorch, which takes
    them apart, is many times ours."""
    student, teacher = make_logits((32, 200), device=device)
    student = teacher + 0.05 * (student - teacher)
    log_p, ids = topk_of(teacher, 16)
    options = {"divergence": divergence, "tail": "drop", "mass_terms": True, "reduction": "none"}
    ours = topk_distillation_loss(student, log_p, ids, backend=backend, **options)
    eager = reference.topk_distillation_loss(student, log_p, ids, **options)
    truth = reference.topk_distillation_loss(student.double(), log_p.double(), ids, **options)
    error, of_eager = ((x - truth).abs().max() for x in (ours, eager))
    assert error < of_eager / 2
