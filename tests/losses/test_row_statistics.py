"""Statistics of parts of a row: any split gives the whole row's, and its loss and D by the oracle."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ops import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    reference,
)
from distill_ops.reference.dense import no_maximum, outcome_terms, student_log_probs
from distill_ops.row_statistics import RowStatistics
from tests.support.helpers import make_logits

INF = float("inf")
MAXIMA = ("student_max", "teacher_max", "label_max", "label_logit")
CLOSED = [SoftCrossEntropy(), ForwardKL(), ReverseKL(), SymmetricKL(0.3)]

closed = pytest.mark.parametrize("divergence", CLOSED, ids=lambda x: x.name)
search = settings(max_examples=12, deadline=None, derandomize=True, database=None)

# columns of each part: of none, of one, and more; at least one column in all
splits = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any)
seeds = st.integers(0, 2**31 - 1)


class Rows(NamedTuple):
    """Rows of logits to split: whole multiples of 1/64 plus an offset, so exact in float32 too."""

    student: torch.Tensor  # [n, V], without the offset
    teacher: torch.Tensor
    labels: torch.Tensor  # [n]
    up: torch.Tensor  # [n, 1], the student's offset
    teacher_up: torch.Tensor

    @classmethod
    def of(cls, widths, seed, n=24, infinite=True):
        """Flat, peaked and offset rows; with ``infinite``, of columns and of whole parts too."""
        generator = torch.Generator().manual_seed(seed)
        pair = make_logits((n, sum(widths)), seed=seed, scale=1.0)
        scale = torch.tensor([0.2, 1.0, 20.0]).repeat(n // 3)[:, None]
        pair = [((x * scale * 64).round() / 64).double() for x in pair]
        ups = [(torch.rand(n, 1, generator=generator) * 3 - 1.5).round() * 3e4 for _ in pair]
        if infinite:
            part = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
            for x in pair:
                dead = torch.rand(n, len(widths), generator=generator) < 0.2
                x[dead[:, part]] = -INF
                x[torch.rand(x.shape, generator=generator) < 0.1] = -INF
            student, teacher = pair  # and rows without a softmax
            student[0] = teacher[1] = -INF
            student[2, ::2] = teacher[2, 1::2] = -INF
        labels = torch.randint(sum(widths), (n,), generator=generator)
        return cls(*pair, labels, *(x.double() for x in ups))

    def parts(self, widths, divergence, temperature=2.0, dtype=torch.float64):
        """The statistics of each part."""
        student = (self.student + self.up).to(dtype).split(widths, -1)
        teacher = (self.teacher + self.teacher_up).to(dtype).split(widths, -1)
        offsets = [sum(widths[:i]) for i in range(len(widths))]
        return [
            RowStatistics.of(*pair, divergence, temperature, self.labels, offset)
            for *pair, offset in zip(student, teacher, offsets, strict=True)
        ]

    def whole(self, divergence, temperature=2.0, dtype=torch.float64):
        return self.parts([self.student.shape[-1]], divergence, temperature, dtype)[0]

    def scale(self, divergence, temperature=2.0):
        """``[n]``: what rounding every exponent and logarithm by a unit costs the statistics, in
        units."""
        student = self.student
        if divergence.infinite_at_teacher_zero:
            student = student.masked_fill(self.teacher == -INF, -INF)
        total = 0.0
        for x, y, t in [
            (student, self.teacher, temperature),
            (self.teacher, student, temperature),
            (self.student, self.student, 1.0),  # the hard label's
        ]:
            x, y = ((z - z.amax(-1, keepdim=True)) / t for z in (x, y))
            sizes = [z.abs().masked_fill(~z.isfinite(), 0.0) for z in (x, y)]
            total = total + (x.exp().nan_to_num(0.0) * (1 + sizes[0] + sizes[1])).sum(-1)
        return total


def assert_same(ours, truth, tolerance):
    """The statistics: the maxima exactly, the others within ``tolerance``, ``[n]``."""
    for name, a, b in zip(RowStatistics._fields, ours, truth, strict=True):
        if name in MAXIMA:
            assert torch.equal(a, b), name
        else:
            assert ((a - b).abs() <= tolerance).all(), name


def whole_rows(statistics, divergence):
    """L, D and the hard label's loss, of which a row without a softmax is NaN or +inf."""
    return *statistics.loss_and_slope(divergence), statistics.hard_label_loss()


@closed
@given(splits, seeds)
@search
def test_any_split_is_the_whole(divergence, widths, seed):
    rows = Rows.of(widths, seed)
    parts = rows.parts(widths, divergence)
    whole = rows.whole(divergence)
    ours = RowStatistics.combine(parts, divergence, 2.0)
    tolerance = 1e-12 * rows.scale(divergence)
    assert_same(ours, whole, tolerance)
    for a, b in zip(whole_rows(ours, divergence), whole_rows(whole, divergence), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    if len(parts) > 1:  # the others first
        others = RowStatistics.combine(parts[:0:-1], divergence, 2.0)
        ours = RowStatistics.combine([others, parts[0]], divergence, 2.0)
        assert_same(ours, whole, tolerance)


def oracle(rows, divergence, temperature):
    """L of the oracle, and D: the sum over columns of the derivatives of its terms by log q."""
    student, teacher = rows.student, rows.teacher
    zeros = student == -INF, teacher == -INF
    excluded = zeros[1] & divergence.infinite_at_teacher_zero
    log_q, poison = student_log_probs(student, excluded, no_maximum(teacher), temperature)
    log_q.requires_grad_()
    log_p = torch.log_softmax(teacher / temperature, -1)
    terms = outcome_terms(log_q, log_p, *zeros, divergence) + poison
    (slope,) = torch.autograd.grad(terms.sum(), log_q)
    loss = reference.distillation_loss(
        student, teacher, divergence=divergence, temperature=temperature, reduction="none"
    )
    return loss, slope.sum(-1) + poison[:, 0]


@closed
@pytest.mark.parametrize("infinite", [False, True], ids=["finite", "infinite"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_loss_and_slope_are_the_oracles(divergence, infinite, temperature):
    widths = [4, 1, 0, 9, 6]
    rows = Rows.of(widths, seed=3, n=60, infinite=infinite)
    ours = RowStatistics.combine(
        rows.parts(widths, divergence, temperature), divergence, temperature
    )
    loss, slope = oracle(rows, divergence, temperature)
    labels = reference.distillation_loss(
        rows.student, None, labels=rows.labels, hard_label_weight=1.0, reduction="none"
    )
    assert loss.isfinite().sum() > 40
    if infinite:
        assert loss[:2].isnan().all()
        assert labels.isinf().any()
    for a, b in zip(whole_rows(ours, divergence), (loss, slope, labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_parameters_of_rows():
    rows = Rows.of([9], seed=5)
    weights = torch.linspace(0, 1, len(rows.labels))
    divergence = SymmetricKL(weights)
    ours = rows.whole(divergence, dtype=torch.float32).loss_and_slope(divergence)
    for i in (0, 7, 23):
        alone = SymmetricKL(weights[i].item())
        theirs = rows.whole(alone, dtype=torch.float32).loss_and_slope(alone)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[i], b[i], equal_nan=True)


@closed
@pytest.mark.parametrize(
    "widths", [[40] * 8, [1, 300, 0, 2, 17], [1] * 64], ids=["even", "uneven", "columns"]
)
def test_float32_costs_rounding_alone(divergence, widths):
    """In units of what rounding costs a row: whole rows err by few, whatever their offset, and the
    split ones by at most twice as many and one."""
    rows = Rows.of(widths, seed=7, n=90)
    scale = torch.finfo(torch.float32).eps * rows.scale(divergence, 3.0)
    truth = rows.whole(divergence, 3.0)
    wanted = truth.loss_and_slope(divergence)

    def errors(statistics):
        pairs = [*zip(statistics, truth, strict=True)]
        pairs += zip(statistics.loss_and_slope(divergence), wanted, strict=True)
        units = [((a.double() - b).abs() / scale).masked_fill(~b.isfinite(), 0.0) for a, b in pairs]
        return torch.stack(units).max().item()

    whole = errors(rows.whole(divergence, 3.0, torch.float32))
    parts = rows.parts(widths, divergence, 3.0, torch.float32)
    split = errors(RowStatistics.combine(parts, divergence, 3.0))
    assert whole <= 3
    assert split <= 2 * whole + 1


@closed
def test_every_rank_has_the_same_bits(divergence):
    widths = [5, 1, 0, 8, 3]
    rows = Rows.of(widths, seed=11)
    parts = rows.parts(widths, divergence, dtype=torch.float32)
    ours = RowStatistics.combine(parts, divergence, 2.0)
    gathered = torch.stack([part.pack() for part in parts])
    assert gathered.shape == (len(widths), 12, len(rows.labels))
    for _ in parts:
        copies = [RowStatistics.unpack(packed) for packed in gathered.clone()]
        theirs = RowStatistics.combine(copies, divergence, 2.0)
        assert torch.equal(theirs.pack().view(torch.int32), ours.pack().view(torch.int32))


@closed
@pytest.mark.parametrize("bad", [float("nan"), INF], ids=str)
@pytest.mark.parametrize("column", [0, 8], ids=["first part", "last part"])
def test_a_bad_logit_spoils_its_row_alone(divergence, bad, column):
    widths = [3, 2, 4]
    rows = Rows.of(widths, seed=13, n=12, infinite=False)
    good = whole_rows(
        RowStatistics.combine(rows.parts(widths, divergence), divergence, 2.0), divergence
    )
    rows.student[0, column] = bad
    rows.teacher[1, column] = bad
    ours = RowStatistics.combine(rows.parts(widths, divergence), divergence, 2.0)
    for a, b in zip(whole_rows(ours, divergence), good, strict=True):
        assert a[0].isnan()
        assert torch.equal(a[2:], b[2:])
    assert all(x[1].isnan() for x in ours.loss_and_slope(divergence))
    assert ours.hard_label_loss()[1].isfinite()


def test_a_logit_at_the_lowest_float_is_finite():
    """Masks written with it, at a temperature under which its quotient is not finite."""
    logits = torch.tensor([[torch.finfo(torch.float32).min, 1.0, 2.0]])
    parts = [RowStatistics.of(x, x, ForwardKL(), 0.5) for x in logits.split([1, 2], -1)]
    loss, slope = RowStatistics.combine(parts, ForwardKL(), 0.5).loss_and_slope(ForwardKL())
    assert loss == 0
    assert slope == -1


def test_normalisers_of_a_divergence_without_moments():
    widths = [4, 0, 5]
    rows = Rows.of(widths, seed=17, infinite=False)
    ours = RowStatistics.combine(rows.parts(widths, JensenShannon()), JensenShannon(), 2.0)
    for logits, up, maximum, total in [
        (rows.student, rows.up, ours.student_max, ours.student_sum),
        (rows.teacher, rows.teacher_up, ours.teacher_max, ours.teacher_sum),
    ]:
        log = (logits + up - maximum[:, None]) / 2.0 - total.log()[:, None]
        torch.testing.assert_close(log, torch.log_softmax(logits / 2.0, -1), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="jensen_shannon has no closed moment"):
        ours.loss_and_slope(JensenShannon())


def test_what_a_part_tells_of_its_logits_and_label():
    logits = torch.tensor([[0.0, 1.0], [0.0, -INF]])
    part = RowStatistics.of(logits, logits, ForwardKL(), labels=torch.tensor([4, 1]), offset=3)
    none = RowStatistics.of(*[logits[:, :0]] * 2, ForwardKL(), labels=torch.tensor([4, 1]))
    for of_row in (part, RowStatistics.combine([none, part, none], ForwardKL())):
        assert of_row.fast.tolist() == [1, 0]
        assert of_row.label_found.tolist() == [1, 0]
    assert torch.equal(RowStatistics.empty(2, logits, torch.float32).pack(), none.pack())
    without = RowStatistics.unpack(part.pack(hard=False))
    assert torch.equal(without.pack(), torch.stack([*part[:8], *none[8:]]))


def test_half_precision_is_computed_in_float32():
    student, teacher = make_logits((3, 8), dtype=torch.bfloat16)
    ours = RowStatistics.of(student, teacher, ForwardKL())
    wide = RowStatistics.of(student.float(), teacher.float(), ForwardKL())
    assert torch.equal(ours.pack(), wide.pack())
    assert not ours.label_sum.any()
