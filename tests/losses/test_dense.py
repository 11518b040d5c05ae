"""The dense loss against the float64 oracle: every divergence, option, path and shape."""

import pytest
import torch

import distill_ops
from distill_ops import (
    AlphaBeta,
    JensenShannon,
    ReverseKL,
    distillation_loss,
)
from tests.support.cases import (
    BOOL_MASK,
    DIVERGENCES,
    FLOAT_MASK,
    LABELS,
    OPTIONS,
    TOKENS,
    VIEWS,
)
from tests.support.covering import pairwise
from tests.support.helpers import assert_close, check, make_logits, moved, run, run_reference

pytest.importorskip("triton")


@pytest.mark.covering("option", "divergence")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_options(divergence, option, backend, device):
    options = moved(OPTIONS[option], device)
    if "ignore_index" in options:
        options["labels"] = options["labels"].clamp(min=0)
    student, teacher = make_logits((*TOKENS, 33), device=device)
    if options.get("hard_label_weight") == 1:
        teacher = None
    check(distillation_loss, student, teacher, divergence=divergence, backend=backend, **options)


AXES = {
    "temperature": [1.0, 0.3, 2.5],
    "scale_by_temperature_squared": [False, True],
    "over": ["mean", "sum", "none", 17, torch.tensor(11)],  # a reduction, or a mean's normalizer
    "loss_mask": [None, BOOL_MASK, FLOAT_MASK],
    "hard_label_weight": [None, 0.0, 0.4],  # None: no labels either
    "vocab_size": [None, 29],
    "gradient": ["auto", "backward"],
    "infinities": ["drop", "propagate"],
}
ROWS = pairwise(AXES)


@pytest.mark.parametrize("row", range(len(ROWS)))
@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(0.3)], ids=str)
def test_pairs_of_options(divergence, row, backend, device):
    """Any two values of two options meet, with a closed moment and without."""
    options = moved(ROWS[row], device)
    over = options.pop("over")
    options |= {"reduction": over} if isinstance(over, str) else {"normalizer": over}
    if options["hard_label_weight"] is None:
        del options["hard_label_weight"]
    else:
        options["labels"] = LABELS.to(device)
    student, teacher = make_logits((*TOKENS, 33), device=device)
    check(distillation_loss, student, teacher, divergence=divergence, backend=backend, **options)


# V: less than a vector; less than a tile; several tiles and a tail, odd (peeled loads).
# N: a lone row; more rows than programs.
@pytest.mark.covering("dtype n_cols", "n_rows n_cols", "divergence dtype")
@pytest.mark.parametrize("n_cols", [7, 127, 4099])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_shapes_and_dtypes(divergence, dtype, n_rows, n_cols, backend, device):
    student, teacher = make_logits((n_rows, n_cols), dtype=dtype, seed=n_cols, device=device)
    check(distillation_loss, student, teacher, divergence=divergence, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 3])
def test_one_column(n_rows, dtype, backend, device):
    """Both distributions are certain: 0, within the rounding of log(1), and gradient 0 likewise."""
    student, teacher = make_logits((n_rows, 1), dtype=dtype, device=device)
    for divergence in DIVERGENCES:
        ours = run(distillation_loss, student, teacher, divergence=divergence, backend=backend)
        eps = torch.finfo(torch.float32).eps
        if isinstance(divergence, AlphaBeta):  # its powers' rounding is divided by this
            eps /= divergence.alpha * divergence.beta
        assert ours.loss.abs() <= eps
        assert (ours.gradient.abs() <= eps).all()


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_aligned_rows_and_whole_tiles(divergence, backend, device):
    student, teacher = make_logits((5, 4096), dtype=torch.bfloat16, device=device)
    check(distillation_loss, student, teacher, divergence=divergence, backend=backend)


@pytest.mark.covering("dtypes", "divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_dtypes(divergence, dtypes, backend, device):
    student, teacher = make_logits((3, 300), device=device)
    check(
        distillation_loss, student.to(dtypes[0]), teacher.to(dtypes[1]),
        divergence=divergence, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("wide", ["student", "teacher", "both"])
def test_float64_on_the_torch_path(wide):
    student, teacher = make_logits((3, 40))
    student = student if wide == "teacher" else student.double()
    teacher = teacher if wide == "student" else teacher.double()
    for divergence in DIVERGENCES:
        ours = run(distillation_loss, student, teacher, divergence=divergence)
        truth = run_reference(student, teacher, double=True, divergence=divergence)
        assert ours.loss.dtype == torch.float64
        torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=0)
        floor = 8 * torch.finfo(student.dtype).eps * truth.gradient.abs().max().item()
        torch.testing.assert_close(ours.gradient.double(), truth.gradient, rtol=0, atol=floor)


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_shapes(leading, reduction, backend, device):
    student, teacher = make_logits((*leading, 19), device=device)
    for divergence in DIVERGENCES[2:4]:
        ours = check(
            distillation_loss, student, teacher,
            divergence=divergence, backend=backend, reduction=reduction,
        )  # fmt: skip
        assert ours.gradient.shape == student.shape


@pytest.mark.covering("student_view n_cols", "student_view teacher_view")
@pytest.mark.parametrize("n_cols", [24, 37])
@pytest.mark.parametrize("student_view", VIEWS)
@pytest.mark.parametrize("teacher_view", ["same", "contiguous"])
def test_strides(n_cols, student_view, teacher_view, backend, device):
    student, teacher = make_logits((2, 6, n_cols), device=device)
    student, teacher = VIEWS[student_view](student), VIEWS[student_view](teacher)
    if teacher_view == "contiguous":
        teacher = teacher.contiguous()
    check(distillation_loss, student, teacher, divergence="jensen_shannon", backend=backend)


def test_what_lies_between_strided_rows_is_not_read(backend, device):
    student, teacher = make_logits((2, 4, 21), device=device)
    student[:, -1] = teacher[:, -1] = float("nan")
    ours = run(distillation_loss, student[:, :-1], teacher[:, :-1], backend=backend)
    assert ours.loss.isfinite()
    assert ours.gradient.isfinite().all()


@pytest.mark.covering("divergence.operands gradient")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_dropped_tokens_are_not_read(divergence, gradient, backend, device):
    """NaN and infinity in tokens of weight 0 leak nowhere; masked equals sliced."""
    student, teacher = make_logits((6, 50), device=device)
    mask = torch.tensor([1, 0, 1, 0, 0, 1], device=device)
    student[1], student[3], teacher[4] = float("nan"), float("inf"), float("nan")
    options = {"divergence": divergence, "gradient": gradient, "backend": backend}
    ours = run(distillation_loss, student, teacher, loss_mask=mask, **options)
    kept = mask.bool()
    sliced = run(distillation_loss, student[kept], teacher[kept], **options)
    assert (ours.gradient[~kept] == 0).all()
    # not the same bits: at an odd vocabulary a row's place in memory decides the order of its sums
    eps = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.loss, sliced.loss, rtol=eps, atol=0)
    floor = eps * sliced.gradient.abs().max().item()
    torch.testing.assert_close(ours.gradient[kept], sliced.gradient, rtol=0, atol=floor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_mask": torch.zeros(3)},
        {"labels": torch.full((3,), -100)},
        {"labels": torch.full((3,), -100), "hard_label_weight": 0.5},
        {"labels": torch.full((3,), -100), "hard_label_weight": 1.0},
    ],
    ids=["mask", "labels", "hard", "hard_only"],
)
def test_no_kept_token(reduction, options, backend, device):
    student, teacher = make_logits((3, 20), device=device)
    student[0] = float("nan")
    ours = run(
        distillation_loss, student, teacher, reduction=reduction, backend=backend,
        **moved(options, device),
    )  # fmt: skip
    assert (ours.loss == 0).all()
    assert (ours.gradient == 0).all()


def test_a_zero_normalizer_without_kept_tokens(backend, device):
    student, teacher = make_logits((3, 20), device=device)
    for normalizer in (0, torch.tensor(0, device=device)):
        ours = run(
            distillation_loss, student, teacher, backend=backend, normalizer=normalizer,
            loss_mask=torch.zeros(3, device=device),
        )  # fmt: skip
        assert ours.loss == 0
        assert (ours.gradient == 0).all()


def test_weights_that_cancel_are_not_an_empty_batch(backend, device):
    student, teacher = make_logits((2, 20), device=device)
    mask = torch.tensor([1.0, -1.0], device=device)
    loss = distillation_loss(student, teacher, loss_mask=mask, backend=backend)
    assert not loss.isfinite()
    check(distillation_loss, student, teacher, loss_mask=mask, normalizer=2.0, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "weights", [(0.0, None), (0.3, None), (1.0, None), (0.0, 2.5), (1.5, -2.0)], ids=str
)
def test_components(reduction, weights, backend, device):
    student, teacher = make_logits((*TOKENS, 33), device=device)
    options = {
        "labels": LABELS.to(device), "reduction": reduction, "temperature": 2.0,
        "hard_label_weight": weights[0], "soft_weight": weights[1],
        "scale_by_temperature_squared": True, "divergence": "reverse_kl",
    }  # fmt: skip
    student.requires_grad_()
    ours = distillation_loss(student, teacher, return_components=True, backend=backend, **options)
    eager = distill_ops.reference.distillation_loss(
        student, teacher, return_components=True, **options
    )
    truth = distill_ops.reference.distillation_loss(
        student.double(), teacher.double(), return_components=True, **options
    )
    assert ours.loss.requires_grad
    assert not ours.divergence.requires_grad
    assert not ours.hard_label.requires_grad
    for name, mine, theirs, true in zip(ours._fields, ours, eager, truth, strict=True):
        assert_close(name, mine.detach(), theirs.detach(), true.detach())


def test_a_term_without_weight_is_not_computed(backend, device):
    """Infinite, it would make the sum NaN; and there may be no teacher for it."""
    student, teacher = make_logits((3, 21), device=device)
    student[:, 4] = float("-inf")
    labels = torch.tensor([4, 4, 4], device=device)
    check(distillation_loss, student, teacher, labels=labels, soft_weight=2.0, backend=backend)
    options = {"labels": labels - 1, "hard_label_weight": 0.7, "backend": backend}
    alone = distillation_loss(student, None, soft_weight=0, **options)
    assert alone == distillation_loss(student, teacher, soft_weight=0.0, **options)
    with pytest.raises(
        ValueError, match="teacher_logits is None, which needs soft_weight=0, got 0.3"
    ):
        distillation_loss(student, None, soft_weight=0.3, **options)


def test_many_short_blocks(backend, device):
    """A shifted view of many short sequences: rows that two strides reach."""
    student, teacher = make_logits((16, 3, 40), device=device)
    mask = (torch.arange(32, device=device) % 3 > 0).view(16, 2)
    for options in ({}, {"loss_mask": mask}, {"reduction": "none", "loss_mask": mask}):
        check(distillation_loss, student[:, :-1], teacher[:, 1:], backend=backend, **options)


def test_no_token_at_all(backend, device):
    labels = torch.zeros(2, 0, dtype=torch.int64, device=device)
    student, teacher = make_logits((2, 0, 7), device=device)
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        result = distillation_loss(
            student, teacher, reduction=reduction, return_components=True, labels=labels,
            hard_label_weight=0.5, backend=backend,
        )  # fmt: skip
        assert result.divergence.shape == result.loss.shape
        result.loss.sum().backward()
        assert result.loss.sum() == 0
    for normalizer in (0, torch.tensor(0.0, device=device)):
        loss = distillation_loss(student, teacher, normalizer=normalizer, backend=backend)
        assert loss == 0


@pytest.mark.covering("divergence.operands", "offset")
@pytest.mark.parametrize("offset", [300.0, -3e4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_logits_far_from_zero(divergence, offset, backend, device):
    """Folding the normaliser into one number would cost all of the value here.

    Over several rows: the logits' own spacing is 2**-9 at 3e4, and a single one may be lucky."""
    student, teacher = make_logits((32, 257), offset=offset, device=device)
    check(distillation_loss, student, teacher, divergence=divergence, backend=backend)
