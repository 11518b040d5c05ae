"""Launches over parts of rows: each part's statistics, and what they combine to.

Ranks are a plain loop here. Truth is :class:`RowStatistics` of a part and the reference of whole rows,
in float64 on the same inputs."""

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from distill_ops.kernels import dense, phases
from distill_ops.kernels.math import LOG2E

from distill_ops import JensenShannon, SymmetricKL
from distill_ops.arguments import LossArguments
from distill_ops.divergences.base import Divergence, as_divergence
from distill_ops.divergences.built_in import BUILT_IN
from distill_ops.gpu import formula_of
from distill_ops.problem import Options
from distill_ops.row_statistics import OF_DIVERGENCE, RowStatistics
from tests.conftest import HAS_GPU
from tests.support.declared import chi_squared, declared_but_finite
from tests.support.helpers import Result, assert_close, make_logits, run_reference

pytestmark = pytest.mark.interpreter

INF, NAN = math.inf, math.nan
HALF, WIDE = torch.bfloat16, torch.float32
DIVERGENCE, LABEL = RowStatistics._fields[:OF_DIVERGENCE], RowStatistics._fields[OF_DIVERGENCE:]
DEVICE = "cuda" if HAS_GPU else "cpu"

# rows by what is in them
PLAIN, UP, FAR, STUDENT_SHARD, TEACHER_SHARD, BOTH_SHARD, STUDENT_SOME, TEACHER_SOME = range(8)
UNREAD, NOT_A_NUMBER, PLUS_INFINITY, NEAR, DEAD, BETWEEN, LOWEST, MISSING, N_ROWS = range(8, 17)
GUARDED = {
    STUDENT_SHARD: 1, TEACHER_SHARD: 1, BOTH_SHARD: 0, NOT_A_NUMBER: 0, PLUS_INFINITY: 1, DEAD: 0,
}  # fmt: skip


class Case(NamedTuple):
    """A divergence, its options, and how ``sum(used)`` columns of ``sum(widths)`` are split."""

    divergence: Divergence | None
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    widths: tuple[int, ...] = (37, 150, 41)
    used: tuple[int, ...] = (37, 150, 33)
    dtypes: tuple[torch.dtype, torch.dtype] = (WIDE, WIDE)
    chosen: bool = False  # teacher rows by an index, of which one is out of range
    contiguous: bool = False

    def __str__(self) -> str:
        name = "label" if self.divergence is None else self.divergence.name
        return f"{name}-T{self.temperature:g}-h{self.hard_label_weight:g}"


class Numbers(NamedTuple):
    student: torch.Tensor  # [n, sum(widths)]
    teacher: torch.Tensor
    labels: torch.Tensor  # [n]
    weights: torch.Tensor
    upstream: torch.Tensor
    teacher_rows: torch.Tensor | None
    truth_teacher: torch.Tensor  # the teacher row by row


class Found(NamedTuple):
    parts: list[RowStatistics]
    sums: list[torch.Tensor]
    loss: torch.Tensor
    gradient: torch.Tensor


def kept_rows(
    temperature: float,
    statistics: RowStatistics,  # of whole rows, [N] each
    slope: torch.Tensor,  # [N]: D
    scale: torch.Tensor,  # [N]: weight / denominator; 0: the row is not read
) -> torch.Tensor:
    """``[N, STATISTICS]`` float32, as ``reduce`` and the dense kernel's backward launch read it.

    Where the fast loops serve, the sums become relative to the rounded products ``m * c`` that these
    subtract; the product's error is exact in float64."""
    base = np.float32(LOG2E.value)  # c as the kernels have it

    def of_loops(maximum, total, c):
        maximum = maximum.masked_fill(maximum.isneginf(), 0.0)
        excess = maximum.double() * c - (maximum * c).double()
        return maximum, torch.where(statistics.fast > 0, (total * excess.exp2()).float(), total)

    c = float(np.float32(1.0 / temperature) * base)
    numbers = (
        *of_loops(statistics.student_max, statistics.student_sum, c),
        *of_loops(statistics.teacher_max, statistics.teacher_sum, c),
        slope,
        *of_loops(statistics.label_max, statistics.label_sum, float(base)),
        statistics.fast,
        scale,
    )
    return torch.stack(numbers, dim=1)


def numbers(case: Case) -> Numbers:
    """Rows of every kind, logits in any of which a column's exponent is rounded."""
    ends = [sum(case.widths[: i + 1]) for i in range(3)]
    student, teacher = make_logits((N_ROWS, ends[-1]), seed=len(str(case)), scale=2.0)
    generator = torch.Generator().manual_seed(1)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)
    student[NEAR] = teacher[NEAR] + 1e-3 * student[NEAR]
    student[UP] += 300.3
    teacher[UP] -= 299.7
    student[FAR] -= 29987.0
    teacher[FAR] += 30011.0
    student[STUDENT_SHARD, ends[0] : ends[1]] = -INF
    teacher[TEACHER_SHARD, ends[0] : ends[1]] = -INF
    student[BOTH_SHARD, : ends[0]] = teacher[BOTH_SHARD, : ends[0]] = -INF
    student[STUDENT_SOME, ends[0] : ends[1] : 3] = -INF
    teacher[TEACHER_SOME, ends[0] + 5 : ends[1] : 2] = -INF
    student[BETWEEN, ends[0] : ends[1] : 3] = -INF
    teacher[BETWEEN, ends[0] : ends[1] : 2] = -INF
    student[BETWEEN] += 300.3
    teacher[BETWEEN] -= 29987.0
    # what stands for -inf where there is none
    student[LOWEST, ends[0] : ends[1]] = teacher[LOWEST, ends[0] : ends[1]] = -3e38
    student[UNREAD] = teacher[UNREAD] = NAN
    student[NOT_A_NUMBER, 3] = NAN
    teacher[PLUS_INFINITY, ends[0] + 7] = INF
    student[DEAD] = -INF
    n_cols = sum(case.used)
    labels = torch.randint(n_cols, (N_ROWS,), generator=generator)
    labels[STUDENT_SOME], labels[BETWEEN] = ends[0] + 1, 2
    labels[STUDENT_SHARD], labels[LOWEST] = n_cols - 1, 0
    labels[UNREAD] = -100
    weights = 0.5 + uniform(N_ROWS)
    weights[UNREAD] = 0.0
    student, teacher = (
        x.to(dtype) for x, dtype in zip((student, teacher), case.dtypes, strict=True)
    )
    truth_teacher, teacher_rows = teacher.clone(), None
    if case.chosen:
        order = torch.randperm(N_ROWS, generator=generator)
        teacher = torch.cat([teacher[:1], teacher[order]])
        teacher_rows = 1 + order.argsort()
        teacher_rows[MISSING] = len(teacher)
        truth_teacher[MISSING] = NAN
    upstream = 0.5 + uniform(N_ROWS)
    found = student, teacher, labels, weights, upstream, teacher_rows, truth_teacher
    return Numbers(*(x if x is None else x.to(DEVICE) for x in found))


def shards(case: Case, x: torch.Tensor) -> list[torch.Tensor]:
    """As a head makes them: of their own memory; or views at any column of one tensor."""
    return [part.contiguous() if case.contiguous else part for part in x.split(case.widths, -1)]


@functools.cache
def launched(case: Case) -> Found:
    """The phases one after the other, each on every shard."""
    given = numbers(case)
    options = LossArguments(
        case.divergence or BUILT_IN["soft_cross_entropy"](),
        temperature=case.temperature, hard_label_weight=case.hard_label_weight, reduction="none",
    )  # fmt: skip
    options = Options.of(options, sum(case.used), "triton")
    parameters = () if case.divergence is None else case.divergence.parameters
    parameters = tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in parameters)
    formula = formula_of(options, parameters)
    hard = case.hard_label_weight != 0
    students, teachers = shards(case, given.student), shards(case, given.teacher)
    teacher_rows = given.teacher_rows
    starts = [sum(case.widths[:i]) for i in range(3)]
    ranks = list(zip(students, teachers, case.used, starts, strict=True))
    labels = [given.labels - start if hard else None for start in starts]
    new = lambda *shape: torch.full(shape, 77.0, device=DEVICE)

    parts = []
    for (student, teacher, n_cols, _), own_labels in zip(ranks, labels, strict=True):
        packed = new(phases.ALL_NUMBERS if hard else phases.DIVERGENCE_NUMBERS, N_ROWS)
        phases.normalise(
            formula, student, teacher, own_labels, n_cols, parts=packed, weights=given.weights,
            teacher_rows=teacher_rows,
        )  # fmt: skip
        parts.append(RowStatistics.unpack(packed))
    divergence = case.divergence or as_divergence("soft_cross_entropy")
    whole = RowStatistics.combine(parts, divergence, case.temperature)

    sums = []
    loss = slope = torch.zeros_like(given.weights)
    keep = lambda: kept_rows(case.temperature, whole, slope, given.weights)
    if case.divergence is not None and case.divergence.moment in ("none", "symmetric"):
        sums = [new(phases.SUMS, N_ROWS) for _ in range(3)]
        for (student, teacher, n_cols, _), out in zip(ranks, sums, strict=True):
            phases.reduce(
                formula, student, teacher, n_cols, kept=keep(), sums=out,
                teacher_rows=teacher_rows,
            )  # fmt: skip
        loss, slope = sum(sums)[:2]
        served = torch.stack(sums)[:, 2].amin(0)
        whole = whole._replace(fast=torch.minimum(whole.fast, served))
    elif case.divergence is not None:
        loss, slope = whole.loss_and_slope(divergence)
    of_label = whole.hard_label_loss() if hard else 0.0
    loss = formula.soft_weight * loss + formula.hard_label_weight * of_label
    loss = torch.where(given.weights == 0, 0.0, loss * given.weights)
    kept = keep()
    gradients = []
    for (student, teacher, n_cols, _), own_labels in zip(ranks, labels, strict=True):
        gradient = torch.full(student.shape, 77.0, dtype=student.dtype, device=DEVICE)
        if n_cols:
            dense.run(
                formula, student, teacher, own_labels, n_cols, statistics=kept, gradient=gradient,
                upstream=given.upstream, teacher_rows=teacher_rows,
            )  # fmt: skip
        else:
            gradient.zero_()
        gradients.append(gradient)
    return Found(parts, sums, loss, torch.cat(gradients, -1))


MIXED, PADDED = (HALF, WIDE), {"widths": (37, 96, 5), "used": (37, 93, 0)}
EVEN = {"widths": (32, 160, 64), "used": (32, 160, 64), "contiguous": True}
EMPTY = {"widths": (37, 150, 0), "used": (37, 150, 0)}
SHARES = JensenShannon(beta=torch.linspace(0.1, 0.9, N_ROWS))
CASES = [
    Case(BUILT_IN["soft_cross_entropy"](), 1.0, 0.5, **EVEN),
    Case(BUILT_IN["forward_kl"](), 2.0, 0.5),
    Case(BUILT_IN["reverse_kl"](), 0.5, 0.5, chosen=True),
    Case(SymmetricKL(0.3), 2.0, chosen=True, **PADDED),
    Case(SHARES, 0.5, dtypes=(HALF, HALF), **EVEN),
    Case(BUILT_IN["skew_forward_kl"](), 2.0, dtypes=MIXED),
    Case(BUILT_IN["skew_reverse_kl"](), **EMPTY),
    Case(BUILT_IN["total_variation"](), 1.0, 0.3),
    Case(BUILT_IN["alpha_beta"](), 2.0, dtypes=(HALF, HALF)),
    Case(chi_squared(), 2.0),
    Case(declared_but_finite(), 2.0, contiguous=True),
    Case(None, 1.0, 1.0, dtypes=(HALF, WIDE)),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=str)


def of_double(case: Case, given: Numbers, rank: int) -> tuple[RowStatistics, torch.Tensor]:
    """A part's statistics, and what rounding its exponents by a unit costs them, in units."""
    start, used = sum(case.widths[:rank]), case.used[rank]
    columns = slice(start, start + used)
    student, teacher = given.student[:, columns].double(), given.truth_teacher[:, columns].double()
    divergence = case.divergence or as_divergence("soft_cross_entropy")
    labels = given.labels if case.hard_label_weight else None
    truth = RowStatistics.of(student, teacher, divergence, case.temperature, labels, start)
    if used == 0:
        return truth, torch.zeros_like(student.sum(-1))
    distances = [
        ((x - x.amax(-1, keepdim=True)) / case.temperature).nan_to_num(0.0, 0.0, 0.0).abs()
        for x in (student, teacher)
    ]
    size = 1 + sum(distances)
    cost = sum(((-x).exp() * (1 + x) * size).sum(-1) for x in distances)
    return truth, cost + ((-distances[0] * case.temperature).exp() * (1 + size)).sum(-1)


@each
def test_statistics_of_parts(case):
    """As :class:`RowStatistics` takes them, within what float32 rounds; a maximum exactly."""
    given = numbers(case)
    names = () if case.divergence is None else DIVERGENCE[:-1]
    names += LABEL[:-1] if case.hard_label_weight else ()
    read = given.weights != 0
    exists = read.clone()
    exists[MISSING] = not case.chosen
    for rank, ours in enumerate(launched(case).parts):
        truth, cost = of_double(case, given, rank)
        lost = truth.student_sum.isnan() | truth.teacher_sum.isnan()
        if case.divergence is None:
            lost = truth.label_sum.isnan()
        for name in names:
            a, b = getattr(ours, name).double(), getattr(truth, name)
            known = read & ~lost
            if name.endswith("_sum") and name != "kept_sum":
                assert torch.equal(a[exists].isnan(), b[exists].isnan()), name
            if name.endswith(("max", "logit")):
                assert torch.equal(a[known], b[known]), name
            else:
                allowed = 4 * torch.finfo(WIDE).eps * cost
                assert ((a - b).abs() <= allowed)[known].all(), (name, rank)
        for name, empty in zip(DIVERGENCE + LABEL, phases.EMPTY, strict=True):
            assert (getattr(ours, name)[UNREAD] == empty).all(), name
        if case.chosen and case.used[rank]:  # whose teacher's row does not exist
            assert ours.teacher_sum[MISSING].isnan()
            assert ours.label_sum[MISSING].isnan() == (case.hard_label_weight != 0)
        own = given.labels - sum(case.widths[:rank])
        if case.hard_label_weight:
            inside = (own >= 0) & (own < case.used[rank]) & read
            assert torch.equal(ours.label_found, inside.float())


@each
def test_which_loops_serve(case):
    """Parts without an infinity take those without guards, and the others not where it matters."""
    fast = torch.stack([x.fast for x in launched(case).parts])
    assert ((fast == 0) | (fast == 1)).all()
    quick = [PLAIN, UP, FAR, UNREAD, NEAR]
    assert (fast[:, quick] == 1).all()
    if case.divergence is None:
        return
    assert all(fast[rank, row] == 0 for row, rank in GUARDED.items())
    clean = [row for row in range(LOWEST) if GUARDED.get(row, 1) != 0]
    assert (fast[0, clean] == 1).all()
    facts = case.divergence
    if facts.infinite_at_student_zero or facts.infinite_at_teacher_zero or facts.moment != "none":
        shown = [STUDENT_SOME, BETWEEN]
        if facts.moment != "soft":  # of which p = 0 is no special case
            shown.append(TEACHER_SOME)
        assert (fast[1, shown] == 0).all()


@each
def test_loss_and_gradient_of_whole_rows(case):
    """From the combined parts, as the reference has them."""
    given, ours = numbers(case), launched(case)
    options = {"divergence": case.divergence} if case.divergence is not None else {}
    if case.hard_label_weight:
        options |= {"labels": given.labels, "hard_label_weight": case.hard_label_weight}
    columns = torch.cat(
        [
            torch.arange(used, device=DEVICE) + sum(case.widths[:i])
            for i, used in enumerate(case.used)
        ]
    )
    truths = []
    for double in (False, True):
        student, teacher = given.student[:, columns], given.truth_teacher[:, columns]
        truths.append(
            run_reference(
                student,
                None if case.divergence is None else teacher,
                double=double,
                upstream_seed=None,
                reduction="none",
                loss_mask=given.weights * given.upstream,
                temperature=case.temperature,
                **options,
            )  # fmt: skip
        )
    gradient = ours.gradient.clone()
    gradient[:, columns] = 0
    assert not gradient.any()  # of columns that are not used
    for sums in ours.sums:
        assert sums[:, UNREAD].tolist() == [0, 0, 1]
        assert sums[:2, DEAD].isnan().all() == (sums is not ours.sums[-1] or case.used[-1] > 0)
    ours = Result(ours.loss * given.upstream, ours.gradient[:, columns])
    for name in Result._fields:
        values = [getattr(x, name) for x in (ours, *truths)]
        assert_close(name, *values)
