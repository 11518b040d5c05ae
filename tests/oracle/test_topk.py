"""The top-k oracle (semantics.md, 11) against formulas by hand and the dense loss, in float64."""

import math

import pytest
import torch

from distill_ops import JensenShannon, SymmetricKL, reference
from distill_ops.reference import topk_distillation_loss
from tests.support import formulas
from tests.support.cases import DIVERGENCES, OPTIONS, TOKENS
from tests.support.helpers import make_logits, run
from tests.support.semantics_page import ROWS

INF = math.inf
TAILS = ("bucket", "renormalize", "ignore", "restrict", "drop")
by_name = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
by_tail = pytest.mark.parametrize("tail", TAILS)


def make_topk(shape, k, temperature=1.0, seed=0):
    """Student logits ``[..., V]``, and the teacher's k most likely tokens in some order."""
    student, teacher = make_logits(shape, seed=seed, dtype=torch.float64)
    top = torch.log_softmax(teacher / temperature, -1).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    return student, top.values[..., order], top.indices[..., order]


def ours(divergence, student, log_p, ids, tail, **options):
    return run(
        topk_distillation_loss, student, log_p, teacher_ids=ids, tail=tail, divergence=divergence,
        upstream_seed=None, **options,
    )  # fmt: skip


def check_rows(divergence, student, log_p, ids, tail, temperature=1.0):
    """Every row's value and gradient against those by hand; returns ours."""
    options = {"temperature": temperature, "reduction": "none"}
    result = ours(divergence, student, log_p, ids, tail, **options)
    for row in range(len(student)):
        arguments = divergence, student[row], log_p[row], ids[row], tail, temperature
        loss, gradient = formulas.topk(*arguments)
        torch.testing.assert_close(result.loss[row], loss, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(result.gradient[row], gradient, rtol=1e-9, atol=1e-14)
    return result


# --- against the dense loss ----------------------------------------------------------------------


@by_tail
@by_name
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_columns_are_the_dense_loss(divergence, tail, temperature):
    student, teacher = make_logits((4, 23), dtype=torch.float64)
    student[1, 4], student[2, 7:10], teacher[2, 9:12], teacher[3, 2] = -INF, -INF, -INF, -INF
    ids = torch.rand(4, 23, generator=torch.Generator().manual_seed(5)).argsort(-1)
    log_p = torch.log_softmax(teacher / temperature, -1).gather(-1, ids)
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    result = ours(divergence, student, log_p, ids, tail, temperature=temperature, reduction="none")
    dense = run(reference.distillation_loss, student, teacher, upstream_seed=None, **options)
    torch.testing.assert_close(result.loss, dense.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.gradient, dense.gradient, rtol=1e-11, atol=1e-15)


SHARED_OPTIONS = [x for x in OPTIONS if not {"gradient", "infinities"} & set(OPTIONS[x])]


@pytest.mark.covering("option divergence", "tail divergence")
@by_tail
@pytest.mark.parametrize("option", SHARED_OPTIONS)
@pytest.mark.parametrize("divergence", ["soft_cross_entropy", SymmetricKL(0.3)], ids=str)
def test_options_are_the_dense_loss_s(divergence, option, tail):
    options = dict(OPTIONS[option])
    if "ignore_index" in options:
        options["labels"] = options["labels"].clamp(min=0)
    n_cols = options.get("vocab_size", 33)
    student, teacher = make_logits((*TOKENS, 33), dtype=torch.float64)
    temperature = options.get("temperature", 1.0)
    log_p = torch.log_softmax(teacher[..., :n_cols] / temperature, -1)
    ids = torch.arange(n_cols).expand_as(log_p)
    result = ours(divergence, student, log_p, ids, tail, **options)
    options |= {"divergence": divergence, "upstream_seed": None}
    dense = run(reference.distillation_loss, student, teacher, **options)
    torch.testing.assert_close(result.loss, dense.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.gradient, dense.gradient, rtol=1e-11, atol=1e-15)


def test_components_and_a_teacher_that_is_not_needed():
    student, log_p, ids = make_topk((4, 9), 3)
    labels = torch.tensor([0, 8, -100, 4])
    options = {"labels": labels, "hard_label_weight": 0.25}
    loss, divergence, hard = topk_distillation_loss(
        student, log_p, ids, return_components=True, **options
    )
    alone = topk_distillation_loss(student, log_p, ids, labels=labels)
    cross_entropy = torch.nn.functional.cross_entropy(student, labels)
    assert divergence.item() == pytest.approx(alone.item(), rel=1e-14)
    assert hard.item() == pytest.approx(cross_entropy.item(), rel=1e-14)
    assert loss.item() == pytest.approx((0.75 * alone + 0.25 * cross_entropy).item(), rel=1e-14)
    options["hard_label_weight"] = 1
    only = topk_distillation_loss(student, None, None, **options)
    assert only.item() == pytest.approx(cross_entropy.item(), rel=1e-14)


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.covering("divergence tail", "divergence k", "tail temperature k")
@by_tail
@by_name
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_value_and_gradient_by_hand(divergence, tail, k, temperature):
    student, log_p, ids = make_topk((3, 12), k, temperature)
    result = check_rows(divergence, student, log_p, ids, tail, temperature)
    assert result.gradient.sum(-1).tolist() == pytest.approx([0, 0, 0], abs=1e-14)


def test_worked_bucket():
    """V = 5, p = (1/2, 3/10) of ids 4 and 1: three outcomes, worked with a pocket calculator."""
    student = torch.tensor([ROWS["S"]], dtype=torch.float64)
    log_p, ids = torch.tensor([[0.5, 0.3]], dtype=torch.float64).log(), torch.tensor([[4, 1]])
    # q: 0.0761966 of id 4, 0.5630213 of id 1, 0.3607821 of the three others together
    forward = ours("forward_kl", student, log_p, ids, "bucket")
    assert forward.loss.item() == pytest.approx(0.633794, abs=1e-6)
    # q_j (1 - p_rest / q_rest) outside, q_j - p_j inside
    expected = [0.0923044, 0.2630213, 0.0124922, 0.0559855, -0.4238034]
    assert forward.gradient[0].tolist() == pytest.approx(expected, abs=1e-6)
    reverse = ours("reverse_kl", student, log_p, ids, "bucket")
    assert reverse.loss.item() == pytest.approx(0.423939, abs=1e-6)
    variation = ours("total_variation", student, log_p, ids, "bucket")
    assert variation.loss.item() == pytest.approx(0.4238034, abs=1e-6)


@by_tail
@by_name
def test_gradcheck(divergence, tail):
    student, log_p, ids = make_topk((2, 7), 3, seed=3)
    log_p[0, 1], ids[1, 2] = -INF, -1
    function = lambda s: topk_distillation_loss(
        s, log_p, ids, tail=tail, divergence=divergence, temperature=1.4, reduction="none"
    )
    assert torch.autograd.gradcheck(function, student.requires_grad_())


def test_tails_of_the_kls_by_scale():
    """With P the sum of p: ignoring the tail scales p by P, which only these know in closed form."""
    student, log_p, ids = make_topk((3, 12), 4)
    total = log_p.exp().sum(-1)

    def both(divergence):
        results = [
            ours(divergence, student, log_p, ids, tail, reduction="none")
            for tail in ("ignore", "renormalize")
        ]
        return results

    ignore, renormalize = both("soft_cross_entropy")
    torch.testing.assert_close(ignore.loss, total * renormalize.loss, rtol=1e-12, atol=0)
    ignore, renormalize = both("reverse_kl")
    torch.testing.assert_close(ignore.loss, renormalize.loss - total.log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ignore.gradient, renormalize.gradient, rtol=1e-11, atol=1e-16)
    assert (renormalize.loss > 0).all()


def test_the_stored_log_probs_are_never_tempered():
    """Temperature moves the student alone: a student divided by T beforehand is the same."""
    student, log_p, ids = make_topk((3, 12), 4)
    for tail in TAILS:
        hot = topk_distillation_loss(student, log_p, ids, tail=tail, temperature=3.0)
        scaled = topk_distillation_loss(student / 3.0, log_p, ids, tail=tail)
        assert hot.item() == pytest.approx(scaled.item(), rel=1e-14)


# --- edges ---------------------------------------------------------------------------------------


@by_tail
@by_name
def test_unused_slots_are_as_if_absent(divergence, tail):
    student, log_p, ids = make_topk((2, 12), 3)
    wide_log_p = torch.full((2, 6), math.nan, dtype=torch.float64)
    wide_ids = torch.full((2, 6), -1)
    wide_log_p[:, 1:6:2], wide_ids[:, 1:6:2] = log_p, ids
    few = ours(divergence, student, log_p, ids, tail, reduction="none")
    many = ours(divergence, student, wide_log_p, wide_ids, tail, reduction="none")
    torch.testing.assert_close(many.loss, few.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(many.gradient, few.gradient, rtol=1e-13, atol=1e-17)


@by_name
def test_no_used_slot(divergence):
    student, log_p, _ = make_topk((1, 12), 3)
    ids = torch.full((1, 3), -1)
    bucket = check_rows(divergence, student, log_p, ids, "bucket")
    assert bucket.loss.item() == pytest.approx(0, abs=1e-15)
    assert bucket.gradient.abs().max() < 1e-16
    renormalize = ours(divergence, student, log_p, ids, "renormalize")
    assert renormalize.loss.isnan()
    assert renormalize.gradient.isnan().all()
    if divergence.infinite_at_teacher_zero:  # nothing to restrict the student to
        ignore = ours(divergence, student, log_p, ids, "ignore")
        assert ignore.loss.isnan()
        assert ignore.gradient.isnan().all()
    else:
        check_rows(divergence, student, log_p, ids, "ignore")


# (student's columns of -inf, slots of log-probability -inf); ids 0 to 3 are the slots of every row
ZEROS = {
    "teacher": ((), (1,)),
    "student inside": ((2,), ()),
    "student outside": ((7, 8), ()),
    "student outside altogether": (range(4, 10), ()),
    "student inside altogether": (range(4), ()),
    "both inside": ((1, 2), (1, 3)),
    "all but one": ((0, 1, 2, *range(4, 10)), ()),
    "teacher altogether": ((), range(4)),
}


@pytest.mark.covering("divergence tail", "divergence place", "tail place")
@by_tail
@by_name
@pytest.mark.parametrize("place", ZEROS)
def test_zeros(divergence, tail, place):
    student, teacher = make_logits((2, 10), dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1]])
    log_p = torch.log_softmax(teacher, -1).gather(-1, ids)
    columns, slots = ZEROS[place]
    student[:, list(columns)] = -INF
    log_p[torch.isin(ids, torch.tensor(list(slots), dtype=torch.int64))] = -INF
    nowhere = {"teacher altogether": tail != "bucket", "student inside altogether": True}
    restricted = tail == "restrict"
    restricted |= divergence.infinite_at_teacher_zero and tail in ("renormalize", "ignore")
    if (place == "teacher altogether" and tail in ("renormalize", "restrict")) or (
        restricted and nowhere.get(place, False)
    ):
        result = ours(divergence, student, log_p, ids, tail, reduction="none")
        assert result.loss.isnan().all()
        assert result.gradient.isnan().all()
        return
    result = check_rows(divergence, student, log_p, ids, tail)
    assert (result.gradient[student == -INF] == 0).all()
    if divergence.infinite_at_teacher_zero:
        gradient = result.gradient.gather(-1, ids)
        assert (gradient[log_p == -INF] == 0).all()


@by_name
def test_the_sum_of_p_is_one_or_more(divergence):
    """A confident teacher's tail is below rounding: the rest has 2^-24, and is finite and learnt."""
    student, log_p, ids = make_topk((2, 12), 4)
    log_p = log_p - log_p.exp().sum(-1, keepdim=True).log()
    log_p[1] += 1e-6
    result = check_rows(divergence, student, log_p, ids, "bucket")
    assert result.loss.isfinite().all()


def test_a_student_who_shuns_the_rest_gets_a_gradient():
    """q_rest underflows as a probability (e^-900), its logarithm does not: nor does q_j / q_rest."""
    student = torch.tensor([[0.0, 0.0, -900.0, -900.0 + math.log(3)]], dtype=torch.float64)
    log_p, ids = torch.tensor([[0.25, 0.25]], dtype=torch.float64).log(), torch.tensor([[0, 1]])
    result = ours("forward_kl", student, log_p, ids, "bucket")
    # 1/2 log(1/4 / 1/2) + 1/2 log(1/2 / (2 e^-900)); the rest's p is spread as q is, 1 to 3
    expected = 0.5 * math.log(0.5) + 0.5 * (900 - math.log(4))
    assert result.loss.item() == pytest.approx(expected, rel=1e-13)
    assert result.gradient[0].tolist() == pytest.approx([0.25, 0.25, -0.125, -0.375], rel=1e-12)


def test_disjoint_supports():
    """The teacher excludes all that the student has left: no support in common, whatever the tail."""
    student = torch.tensor([[0.5, -INF, -INF, -INF]], dtype=torch.float64)
    log_p, ids = torch.tensor([[-INF, -1.0]], dtype=torch.float64), torch.tensor([[0, 2]])
    for tail in TAILS:
        assert ours("reverse_kl", student, log_p, ids, tail).loss.isnan()
        assert ours("forward_kl", student, log_p, ids, tail).loss == 0  # every term is dropped
    # rests that are each other's zeros: p on the bucket and id 2, q on id 0 alone
    loss = ours(JensenShannon(0.5), student, log_p, ids, "bucket").loss
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.covering("divergence tail", "tail bad")
@by_tail
@by_name
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "p nan", "p inf"])
def test_a_row_without_a_softmax_is_nan_and_alone(divergence, tail, bad):
    student, log_p, ids = make_topk((3, 12), 4)
    value = float(bad.split()[-1])
    if bad[0] == "p":
        log_p[1, 2] = value
    else:
        student[1, slice(None) if value == -INF else ids[1, 0]] = value
    result = ours(divergence, student, log_p, ids, tail, reduction="none")
    assert result.loss.isnan().tolist() == [False, True, False]
    assert result.gradient[1].isnan().all()
    assert result.gradient[::2].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, INF])
def test_logits_outside_what_the_student_is_restricted_to_do_not_matter(value):
    student, log_p, ids = make_topk((1, 12), 4)
    outside = torch.ones(12, dtype=torch.bool).index_fill(0, ids[0], False)
    for tail in ("renormalize", "ignore"):
        truth = ours("reverse_kl", student, log_p, ids, tail)
        same = ours("reverse_kl", student.masked_fill(outside, value), log_p, ids, tail)
        assert same.loss.item() == pytest.approx(truth.loss.item(), rel=1e-14)
        torch.testing.assert_close(same.gradient, truth.gradient)
    assert ours(
        "reverse_kl", student.masked_fill(outside, value), log_p, ids, "bucket"
    ).loss.isnan()


@by_tail
@by_name
def test_tokens_of_weight_0_are_not_read(divergence, tail):
    student, log_p, ids = make_topk((3, 12), 4)
    alone = ours(divergence, student[:1], log_p[:1], ids[:1], tail)
    student[1], log_p[1], ids[1] = math.nan, math.nan, torch.tensor([70, 70, -9, 5])
    options = {"loss_mask": torch.tensor([1.0, 0, 1]), "labels": torch.tensor([3, 3, -100])}
    log_p[2] = INF
    result = ours(divergence, student, log_p, ids, tail, **options)
    assert result.loss.item() == pytest.approx(alone.loss.item(), rel=1e-14)
    torch.testing.assert_close(result.gradient[:1], alone.gradient)
    assert (result.gradient[1:] == 0).all()


def test_dtypes():
    student, log_p, ids = make_topk((3, 12), 4)
    student = student.bfloat16()
    loss = ours("forward_kl", student, log_p.half(), ids.int(), "bucket")
    assert (loss.loss.dtype, loss.gradient.dtype) == (torch.float32, torch.bfloat16)
    truth = ours("forward_kl", student.double(), log_p.half().double(), ids, "bucket")
    assert loss.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    assert topk_distillation_loss(student, log_p, ids).dtype == torch.float64


STUDENT, LOG_P, IDS = torch.zeros(2, 5), torch.full((2, 3), -2.0), torch.tensor([[0, 1, 4]] * 2)
BAD = [
    ({"tail": "dropped"}, ValueError, "tail must be one of 'bucket', .* got 'dropped': did you mean 'drop'"),
    ({"tail": "drop", "mass_terms": 1}, TypeError, "mass_terms must be True or False, got 1"),
    ({"mass_terms": True}, ValueError, "mass_terms=True .* got tail='bucket': pass tail='drop'"),
    ({"tail": "drop", "mass_terms": True}, ValueError, "generalised KL of 'forward_kl'.* got soft_cross"),
    ({"log_prob_floor": 0.0}, ValueError, "log_prob_floor must be finite and negative .* got 0.0"),
    ({"log_prob_floor": -math.inf}, ValueError, "log_prob_floor must be finite and negative"),
    ({"log_prob_floor": math.nan}, ValueError, "log_prob_floor must be finite and negative"),
    ({"log_prob_floor": "-10"}, TypeError, "log_prob_floor must be None or a finite negative number, got str"),
    ({"log_prob_floor": -10, "tail": "ignore"}, ValueError, "log_prob_floor=-10 needs tail='bucket', 'restrict' or"),
    ({"log_prob_floor": -10, "tail": "renormalize"}, ValueError, "log_prob_floor=-10 needs tail="),
    ({"teacher_log_probs": None}, ValueError, "teacher_log_probs is None"),
    ({"teacher_ids": None}, ValueError, "teacher_ids is None"),
    ({"teacher_ids": IDS.tolist()}, TypeError, r"teacher_ids must be a tensor \[..., K\], got list"),
    ({"teacher_ids": IDS.float()}, TypeError, "teacher_ids must be int64 or int32"),
    ({"teacher_ids": IDS[:, :2]}, ValueError, r"shape of teacher_log_probs, \(2, 3\), got \(2, 2\)"),
    ({"teacher_ids": IDS[:1]}, ValueError, r"teacher_ids must have the leading shape"),
    ({"teacher_ids": IDS + 1}, ValueError, r"teacher_ids must lie in \[0, 5\), or be -1.* got 5"),
    ({"teacher_ids": IDS - 2}, ValueError, r"teacher_ids must lie in \[0, 5\), or be -1.* got -2"),
    ({"teacher_ids": IDS.clamp(min=1)}, ValueError, "unique within a token, got 1 twice"),
    ({"vocab_size": 4}, ValueError, r"teacher_ids must lie in \[0, 4\).* got 4"),
    ({"teacher_log_probs": LOG_P.int()}, TypeError, "teacher_log_probs must be float32"),
    ({"teacher_log_probs": LOG_P + 5}, ValueError, "at most 0, got 3: take log_softmax"),
    ({"teacher_log_probs": LOG_P[:, :0]}, ValueError, r"\[..., K\] with at least one slot"),
    ({"teacher_log_probs": LOG_P.clone().requires_grad_()}, ValueError, "teacher_log_probs requires grad"),
    ({"temperature": 0}, ValueError, "temperature must be positive"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_input(change, error, message):
    arguments = {"student_logits": STUDENT, "teacher_log_probs": LOG_P, "teacher_ids": IDS}
    assert topk_distillation_loss(**arguments).isfinite()
    with pytest.raises(error, match=message):
        topk_distillation_loss(**arguments | change)
