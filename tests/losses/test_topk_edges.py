"""The top-k loss where probabilities are 0, tiny or not numbers, tokens unread, or calls bad."""

import math

import pytest
import torch

from tests.losses.test_topk import EVERY, SOME, TAILS, by_name, by_tail, make_topk
from tests.oracle.test_topk import BAD, IDS, LOG_P, STUDENT, ZEROS
from tests.support.helpers import (
    assert_close,
    check_topk,
    run,
    run_reference,
)

pytest.importorskip("triton")

from distill_ops import ReverseKL, SkewForwardKL, reference, topk_distillation_loss

INF = math.inf


def check_rows(student, log_p, ids, **options):
    """Every row against the oracle, NaN and infinities included; returns ours."""
    options |= {"teacher_ids": ids, "reduction": "none"}
    ours = run(topk_distillation_loss, student, log_p, **options)
    options.pop("backend")
    options["oracle"] = reference.topk_distillation_loss
    eager, truth = (run_reference(student, log_p, double=d, **options) for d in (False, True))
    assert_close("loss", ours.loss, eager.loss, truth.loss, 4.0)
    assert_close("gradient", ours.gradient, eager.gradient, truth.gradient)
    return ours


def zero_rows(device):
    """A row for each place of a zero, of student or teacher, and one without: as make_topk."""
    student, _, _ = make_topk((len(ZEROS) + 1, 10), 4)
    ids = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0]]).repeat(3, 1)
    _, teacher, _ = make_topk((len(ZEROS) + 1, 10), 10, seed=1)
    log_p = teacher[:, :4].clone()
    for row, (columns, slots) in enumerate(ZEROS.values()):
        student[row, list(columns)] = -INF
        log_p[row, torch.isin(ids[row], torch.tensor(list(slots), dtype=torch.int64))] = -INF
    return [x.to(device) for x in (student, log_p, ids)]


@pytest.mark.covering("divergence", "tail")
@pytest.mark.parametrize("tail", ["bucket", "ignore", "restrict", "drop"])
@by_name
def test_zeros(divergence, tail, backend, device):
    student, log_p, ids = zero_rows(device)
    ours = check_rows(student, log_p, ids, divergence=divergence, tail=tail, backend=backend)
    assert ours.loss[-1].isfinite()
    assert (ours.gradient[student == -INF].nan_to_num(0) == 0).all()


@pytest.mark.covering("divergence", "tail")
@by_tail
@pytest.mark.parametrize("divergence", [*SOME, EVERY[-1]], ids=lambda d: d.name)
def test_rows_without_a_softmax_are_nan_and_alone(divergence, tail, backend, device):
    student, log_p, ids = make_topk((9, 12), 4, device=device)
    student[1, ids[1, 0]] = math.nan
    student[2, ids[2, 3]] = INF
    student[3] = -INF
    log_p[4, 2], log_p[5, 1] = math.nan, INF
    outside = [next(c for c in range(12) if c not in row) for row in ids.tolist()]
    student[6, outside[6]] = math.nan  # which matters where the student is not restricted to the K
    student[7, outside[7]] = INF
    ours = check_rows(student, log_p, ids, divergence=divergence, tail=tail, backend=backend)
    assert ours.loss[1:6].isnan().all()
    assert ours.gradient[1:6].isnan().all()
    assert ours.gradient[[0, 8]].isfinite().all()


@pytest.mark.covering("divergence", "tail")
@by_tail
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_unused_slots_are_as_if_absent(divergence, tail, backend, device):
    student, log_p, ids = make_topk((2, 12), 3, device=device)
    wide_log_p = torch.full((2, 6), math.nan, device=device)
    wide_ids = torch.full((2, 6), -1, device=device)
    wide_log_p[:, 1:6:2], wide_ids[:, 1:6:2] = log_p, ids
    options = {"divergence": divergence, "tail": tail, "reduction": "none", "backend": backend}
    few = run(topk_distillation_loss, student, log_p, teacher_ids=ids, **options)
    many = run(topk_distillation_loss, student, wide_log_p, teacher_ids=wide_ids, **options)
    eps = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(many.loss, few.loss, rtol=4 * eps, atol=0)
    floor = eps * few.gradient.abs().max().item()
    torch.testing.assert_close(many.gradient, few.gradient, rtol=0, atol=floor)


@pytest.mark.parametrize("divergence", [*SOME, *EVERY[-2:]], ids=lambda d: d.name)
def test_no_used_slot(divergence, backend, device):
    """The bucket is certain in both models; without one p is 0 everywhere."""
    student, log_p, ids = make_topk((3, 12), 3, seed=2, device=device)
    ids[0] = -1
    options = {"divergence": divergence, "backend": backend}
    bucket = check_rows(student, log_p, ids, tail="bucket", **options)
    assert bucket.loss[0].abs() < 1e-6
    assert bucket.gradient[0].abs().max() < 1e-7
    labels = torch.tensor([0, 5, 7], device=device)  # the cross-entropy sees every column
    check_rows(student, log_p, ids, labels=labels, hard_label_weight=0.4, **options)
    for tail in TAILS[1:]:
        ours = check_rows(student, log_p, ids, tail=tail, **options)
        nowhere = tail in ("renormalize", "restrict")
        nowhere |= tail == "ignore" and divergence.infinite_at_teacher_zero
        assert ours.loss[0].isnan() == nowhere


@pytest.mark.covering("divergence", "tail")
@by_tail
@pytest.mark.parametrize("divergence", [ReverseKL(), SkewForwardKL(), SOME[0], SOME[2]], ids=str)
def test_the_lowest_float_is_a_logit(divergence, tail, backend, device):
    """Not -inf: its column is not dropped. (Where p weighs its logarithm losses are near 1e38.)"""
    student, log_p, ids = make_topk((3, 12), 4, device=device)
    lowest = torch.finfo(torch.float32).min
    student[0, ids[0, 1]] = lowest
    outside = torch.ones(12, dtype=torch.bool, device=device).index_fill(0, ids[1], False)
    student[1, outside] = lowest
    check_rows(
        student, log_p, ids, divergence=divergence, tail=tail, temperature=0.5, backend=backend
    )


@pytest.mark.parametrize(
    ("divergence", "tail"),
    [*((d, "bucket") for d in EVERY), *((d, "ignore") for d in SOME)],
    ids=lambda x: str(x)[:30],
)
def test_confident_models(divergence, tail, backend, device):
    """The rest of the student is 1e-9, then nothing; of the teacher 1e-6, then below 2^-24."""
    student, log_p, ids = make_topk((4, 30), 4, device=device)
    log_p -= log_p.exp().sum(-1, keepdim=True).log()
    log_p += torch.tensor([[-1e-6], [-1e-8], [0.0], [1e-6]], device=device)
    shift = torch.tensor([[20.0], [22.0], [120.0], [0.0]], device=device)
    student.scatter_(-1, ids, student.gather(-1, ids) + shift)
    ours = check_rows(student, log_p, ids, divergence=divergence, tail=tail, backend=backend)
    assert ours.loss.isfinite().all()


def test_the_teacher_s_rest_is_not_float32_s_rounding(backend, device):
    """Log-probabilities near 0 are exact to 1e-13: so is 1 - sum(p), but not summed in float32."""
    student = torch.tensor([[0.0, -14.0, -14.5, -15.0]], device=device)
    log_p, ids = torch.tensor([[-2e-6]], device=device), torch.tensor([[0]], device=device)
    options = {"divergence": "forward_kl", "teacher_ids": ids}
    ours = run(topk_distillation_loss, student, log_p, backend=backend, **options)
    truth = run_reference(
        student, log_p, double=True, oracle=reference.topk_distillation_loss, **options
    )
    assert ours.gradient[0, 1:].cpu().tolist() == pytest.approx(
        truth.gradient[0, 1:].cpu().tolist(), rel=1e-4
    )


@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_no_rest_where_the_k_cover_the_vocabulary(divergence, backend, device):
    """Even if their probabilities sum to less than 1."""
    student, log_p, ids = make_topk((2, 9), 9, device=device)
    check_rows(student, log_p - 0.7, ids, divergence=divergence, backend=backend)


def test_a_student_who_shuns_the_rest_gets_a_gradient(backend, device):
    """q_rest underflows (e^-900), its logarithm does not: nor does q_j / q_rest."""
    student = torch.tensor([[0.0, 0.0, -900.0, -900.0 + math.log(3)]], device=device)
    log_p = torch.tensor([[0.25, 0.25]], device=device).log()
    ids = torch.tensor([[0, 1]], device=device)
    options = {"divergence": "forward_kl", "teacher_ids": ids, "upstream_seed": None}
    ours = run(topk_distillation_loss, student, log_p, backend=backend, **options)
    assert ours.loss.item() == pytest.approx(0.5 * math.log(0.5) + 450 - math.log(2), rel=1e-6)
    assert ours.gradient[0].tolist() == pytest.approx([0.25, 0.25, -0.125, -0.375], rel=1e-4)


@pytest.mark.parametrize("offset", [300.0, -3e4])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_logits_far_from_zero(divergence, offset, backend, device):
    student, log_p, ids = make_topk((8, 257), 6, device=device)
    options = {"divergence": divergence, "tail": "ignore", "backend": backend}
    check_topk(student + offset, log_p, ids, **options)


@pytest.mark.covering("divergence", "tail", "gradient")
@by_tail
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_tokens_of_weight_0_are_not_read(divergence, gradient, tail, backend, device):
    student, log_p, ids = make_topk((4, 12), 4, device=device)
    student[1], log_p[1] = math.nan, math.nan
    ids[1] = torch.tensor([70, 70, -9, 5])
    log_p[3] = INF
    mask = torch.tensor([1.0, 0, 0.5, 1], device=device)
    labels = torch.tensor([3, 3, 2, -100], device=device)
    options = {
        "divergence": divergence, "tail": tail, "gradient": gradient, "hard_label_weight": 0.3,
    }  # fmt: skip
    ours = check_topk(
        student, log_p, ids, loss_mask=mask, labels=labels, backend=backend, **options
    )
    assert (ours.gradient[1::2] == 0).all()
    assert ours.gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_kept_token(reduction, backend, device):
    student, log_p, ids = make_topk((3, 12), 4, device=device)
    student[0] = math.nan
    for normalizer in (None, 0) if reduction == "mean" else (None,):
        ours = run(
            topk_distillation_loss, student, log_p, teacher_ids=ids, backend=backend,
            loss_mask=torch.zeros(3, device=device), reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
        assert (ours.loss == 0).all()
        assert (ours.gradient == 0).all()


def test_what_lies_between_strided_rows_is_not_read(backend, device):
    student, log_p, ids = make_topk((2, 4, 21), 3, device=device)
    student[:, -1] = math.nan
    ours = run(
        topk_distillation_loss, student[:, :-1], log_p[:, 1:], teacher_ids=ids[:, 1:],
        backend=backend,
    )  # fmt: skip
    assert ours.loss.isfinite()
    assert ours.gradient.isfinite().all()


# --- bad input -----------------------------------------------------------------------------------

MORE = [
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"gradient": "later"}, ValueError, "gradient must be one of"),
    ({"student_logits": STUDENT.half(), "gradient": "forward"}, ValueError, "would underflow"),
    ({"reduction": "none", "gradient": "forward"}, ValueError, "needs reduction='mean' or 'sum'"),
    (
        {
            "student_logits": torch.zeros(1, 2000),
            "teacher_log_probs": torch.full((1, 1025), -9.0),
            "teacher_ids": torch.arange(1025)[None],
        },
        ValueError,
        r"number of slots K must be in \[1, 1024\], got 1025",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), [*BAD, *MORE], ids=lambda x: str(x)[:30])
def test_bad_input(change, error, message):
    arguments = {"student_logits": STUDENT, "teacher_log_probs": LOG_P, "teacher_ids": IDS}
    assert topk_distillation_loss(**arguments).isfinite()
    with pytest.raises(error, match=message):
        topk_distillation_loss(**arguments | change)


def test_triton_on_a_cpu_tensor():
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a GPU.*on cpu"):
        topk_distillation_loss(STUDENT, LOG_P, IDS, backend="triton")


@pytest.mark.interpreter
def test_triton_on_float64():
    for student, log_p in ((STUDENT.double(), LOG_P), (STUDENT, LOG_P.double())):
        with pytest.raises(ValueError, match="backend='triton' takes .* got float64"):
            topk_distillation_loss(student, log_p, IDS, backend="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_ids_that_nobody_checked_are_nan(tail, monkeypatch, kernel_device):
    """On a GPU ids are not read before the kernel; it reads and writes no memory by a wrong one."""
    student, log_p, ids = make_topk((3, 12), 4, device=kernel_device("triton"))
    ids[0, 1], ids[1, 2] = 12, -7
    monkeypatch.setattr("distill_ops.checks.contents.readable", lambda *_: False)
    for divergence in SOME:
        ours = run(
            topk_distillation_loss, student, log_p, teacher_ids=ids, divergence=divergence,
            tail=tail, reduction="none", backend="triton",
        )  # fmt: skip
        assert ours.loss.isnan().tolist() == [True, True, False]
        assert ours.gradient.isnan().any(-1).tolist() == [True, True, False]
