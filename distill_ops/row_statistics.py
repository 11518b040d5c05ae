"""Statistics of a part of each row, a range of its columns, and how parts combine to the whole row's.

They are what ranks exchange that split the vocabulary among them: each takes those of its own
columns, one all-gather carries them, and every rank combines them in rank order, so that all have the
same bits. The gradient is then local. ``vocab_parallel/`` is what uses it.

A part's exponentials are relative to the part's own maxima. Where the maxima move, from (m_s, m_t) of
a part to (m_s', m_t') of the row, a sum l over the student becomes ``exp((m_s - m_s') / T) * l``, and
a moment of the differences of logarithms, of semantics.md, section 9,

    a = sum(exp((s - m_s) / T) * ((s - m_s) - (t - m_t)) / T)

becomes ``exp((m_s - m_s') / T) * (a + l * ((m_s - m_s') - (m_t - m_t')) / T)``: as the lanes of
``kernels/sweeps.py`` combine. Offsets of the logits cancel before anything is rounded by them.

Infinite logits are dropped as ``infinities="drop"`` does (semantics.md, section 3).
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from .divergences.base import Divergence
from .problem import working_dtype

NEG_INF = float("-inf")
OF_DIVERGENCE = 8  # of the numbers, the first ones; those that follow are the hard label's
UNDER_TEACHER = ("soft", "forward", "symmetric")  # which divergences have a moment under p
UNDER_STUDENT = ("reverse", "symmetric")  # ... and under q
CLOSED = "soft", "forward", "reverse"  # moments from which ranks that split rows take L and D


def distance(x: torch.Tensor, maximum: torch.Tensor, temperature: float) -> torch.Tensor:
    """``(x - maximum) / temperature``: at most 0, finite where it would be -inf, as of a part without
    a finite logit, so that 0 times it is 0. NaN and +inf make NaN."""
    finite = torch.where(maximum == NEG_INF, 0.0, maximum)
    # a quarter: differences of two, and sums of such differences, stay finite too
    return ((x - finite) / temperature).clamp_(min=torch.finfo(x.dtype).min / 4)


def _measured(divergence: Divergence, of_student: torch.Tensor, of_teacher: torch.Tensor):
    """What the divergence's moments are moments of, from distances to the maxima."""
    return of_student if divergence.moment == "soft" else of_student - of_teacher


def _joined(name: str):
    """How the numbers of that name of two parts with the same maxima become one."""
    if name == "fast":
        return torch.minimum
    return torch.maximum if name.endswith(("_max", "_logit")) else torch.add


def in_two(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers in float64 as the sum of two: where a gradient is the small difference of a row's slope and its
    sum D, float32's rounding of D would be all that is left."""
    rounded = x.to(dtype)
    return rounded, (x - rounded.to(x.dtype)).to(dtype)


class RowStatistics(NamedTuple):
    """Of some columns of n rows: twelve numbers a row, each ``[n]``, float32 or float64.

    Maxima are logits as they came, exponents are divided by the temperature T, moments are in nats.
    With ``d`` a column's distance ``(x - maximum) / T``, moments are of ``d_student`` (soft
    cross-entropy) or of ``d_student - d_teacher``, and 0 where the divergence has none.

    The student is restricted to the teacher's support where the divergence restricts it, but not for
    the hard label. Columns without a finite logit are an empty part, which adds nothing: maximum
    -inf, sum 0, moment 0.

    Every divergence's normalisers are here. L and D follow from the moments (:meth:`loss_and_slope`);
    a divergence without any, and symmetric KL of nearly equal rows, sums them over the columns in one
    more reduction.
    """

    student_max: torch.Tensor
    student_sum: torch.Tensor  # sum(exp(d_student))
    teacher_max: torch.Tensor
    teacher_sum: torch.Tensor  # sum(exp(d_teacher))
    kept_sum: torch.Tensor  # the same over the columns that the divergence keeps
    teacher_moment: torch.Tensor  # sum(exp(d_teacher) * ...) over those
    student_moment: torch.Tensor  # sum(exp(d_student) * ...)
    fast: (
        torch.Tensor
    )  # 1 where no logit is infinite or NaN, so that loops without guards serve, else 0
    label_max: torch.Tensor  # of the whole student
    label_sum: torch.Tensor  # sum(exp(student - label_max)): at temperature 1
    label_logit: torch.Tensor  # the student's; -inf where the label is in no column of the part
    label_found: torch.Tensor  # 1 where it is in one, else 0

    @classmethod
    def of(
        cls,
        student: torch.Tensor,
        teacher: torch.Tensor,
        divergence: Divergence,
        temperature: float = 1.0,
        labels: torch.Tensor | None = None,
        offset: int = 0,
    ) -> "RowStatistics":
        """Of a part's logits.

        Args:
            student, teacher: logits ``[n, v]`` of the same columns, v of any size, 0 too; what is
                not float64 is computed in float32.
            divergence: decides the restriction, the columns kept and the moments.
            temperature: of the divergence.
            labels: ``[n]``, counted from the row's first column. None: the hard label's numbers are
                those of the empty part.
            offset: the row's columns before this part.
        """
        dtype = working_dtype(student, teacher)
        if student.shape[-1] == 0:
            return cls.empty(len(student), student, dtype)
        student, teacher = student.to(dtype), teacher.to(dtype)
        zero = torch.zeros_like(student[:, 0])
        label_max, label_sum, label_logit, label_found = zero + NEG_INF, zero, zero + NEG_INF, zero
        if labels is not None:
            label_max = student.amax(-1)
            label_sum = distance(student, label_max[:, None], 1.0).exp_().sum(-1)
            column = labels.long() - offset
            elsewhere = (column < 0) | (column >= student.shape[-1])
            of_label = student.gather(-1, column.masked_fill(elsewhere, 0)[:, None])[:, 0]
            label_logit = of_label.masked_fill(elsewhere, NEG_INF)
            label_found = (~elsewhere).to(dtype)
        fast = (student.isfinite() & teacher.isfinite()).all(-1).to(dtype)

        if divergence.infinite_at_teacher_zero:
            student = student.masked_fill(teacher == NEG_INF, NEG_INF)
        student_max, teacher_max = student.amax(-1), teacher.amax(-1)
        of_student = distance(student, student_max[:, None], temperature)
        of_teacher = distance(teacher, teacher_max[:, None], temperature)
        student_exp, teacher_exp = of_student.exp(), of_teacher.exp()
        teacher_sum = kept_sum = teacher_exp.sum(-1)
        if divergence.infinite_at_student_zero:
            teacher_exp.masked_fill_(student == NEG_INF, 0.0)
            kept_sum = teacher_exp.sum(-1)
        teacher_moment = student_moment = zero
        measured = _measured(divergence, of_student, of_teacher)
        if divergence.moment in UNDER_TEACHER:
            teacher_moment = (teacher_exp * measured).sum(-1)
        if divergence.moment in UNDER_STUDENT:
            student_moment = (student_exp * measured).sum(-1)
        return cls(
            student_max, student_exp.sum(-1), teacher_max, teacher_sum, kept_sum,
            teacher_moment, student_moment, fast, label_max, label_sum, label_logit, label_found,
        )  # fmt: skip

    @staticmethod
    def combine(
        parts: Sequence["RowStatistics"], divergence: Divergence, temperature: float = 1.0
    ) -> "RowStatistics":
        """Of the columns of all parts, which are one or more and share divergence and temperature.

        The sums run in the order of the parts: the same order gives the same bits, and another one,
        or parts that were combined before, differs by rounding."""
        student_max = reduce(torch.maximum, [part.student_max for part in parts])
        teacher_max = reduce(torch.maximum, [part.teacher_max for part in parts])
        label_max = reduce(torch.maximum, [part.label_max for part in parts])

        def moved(part: "RowStatistics") -> "RowStatistics":
            of_student = distance(part.student_max, student_max, temperature)
            of_teacher = distance(part.teacher_max, teacher_max, temperature)
            of_label = distance(part.label_max, label_max, 1.0)
            student_factor, teacher_factor = of_student.exp(), of_teacher.exp()
            shift = _measured(divergence, of_student, of_teacher)
            teacher_moment, student_moment = part.teacher_moment, part.student_moment
            # by the factor first: a distance to logits near the lowest float times a sum overflows
            if divergence.moment in UNDER_TEACHER:
                teacher_moment = teacher_moment * teacher_factor
                teacher_moment = teacher_moment + part.kept_sum * teacher_factor * shift
            if divergence.moment in UNDER_STUDENT:
                student_moment = student_moment * student_factor
                student_moment = student_moment + part.student_sum * student_factor * shift
            return RowStatistics(
                student_max, part.student_sum * student_factor,
                teacher_max, part.teacher_sum * teacher_factor, part.kept_sum * teacher_factor,
                teacher_moment, student_moment, part.fast,
                label_max, part.label_sum * of_label.exp(), part.label_logit, part.label_found,
            )  # fmt: skip

        numbers = zip(RowStatistics._fields, *map(moved, parts), strict=True)
        return RowStatistics(*(reduce(_joined(name), of_parts) for name, *of_parts in numbers))

    def pack(self, hard: bool = True) -> torch.Tensor:
        """As one tensor ``[12, n]``, for a collective: each number's rows lie together. Without a hard
        label, ``[8, n]``."""
        return torch.stack(self if hard else self[:OF_DIVERGENCE])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "RowStatistics":
        """What :meth:`pack` made: views of it; without a hard label, that of the empty part."""
        numbers = packed.unbind(0)
        if len(numbers) == OF_DIVERGENCE:
            zero = torch.zeros_like(numbers[0])
            numbers = *numbers, zero + NEG_INF, zero, zero + NEG_INF, zero
        return cls(*numbers)

    @classmethod
    def empty(cls, n_rows: int, like: torch.Tensor, dtype: torch.dtype) -> "RowStatistics":
        """Of rows without columns, on the device of ``like``."""
        zero = like.new_zeros(n_rows, dtype=dtype)
        of_none = {
            name: zero + NEG_INF for name in cls._fields if name.endswith(("_max", "_logit"))
        }
        return cls(**dict.fromkeys(cls._fields, zero) | of_none | {"fast": zero + 1})

    def loss_and_slope(self, divergence: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss L of whole rows and D, the sum of its slopes, each ``[n]`` (nats).

        NaN for a row of which the student, as restricted, or the teacher has no finite logit. Both are
        rounded absolutely: near L = 0 sum the columns' terms where L itself matters, and, of
        symmetric KL, where D does. A ValueError where the divergence has no closed moment.
        """
        if divergence.moment == "none":
            raise ValueError(f"{divergence.name} has no closed moment: sum its value and slope")
        alive = (self.student_sum > 0) & (self.teacher_sum > 0)  # not where a sum is NaN
        kept = torch.where(alive, self.kept_sum / self.teacher_sum, float("nan"))
        of_teacher = self.teacher_moment / self.teacher_sum
        if divergence.moment == "soft":
            return kept * self.student_sum.log() - of_teacher, -kept
        log_sums = torch.log(self.student_sum / self.teacher_sum)
        forward = kept * log_sums - of_teacher
        if divergence.moment == "forward":
            return forward, -kept
        reverse = self.student_moment / self.student_sum - log_sums
        if divergence.moment == "reverse":
            return reverse, reverse + 1
        weight = divergence.map_tensors(lambda x: x.to(forward.dtype)).weight  # a number, [] or [n]
        loss = (1 - weight) * forward + weight * reverse
        return loss, weight * (reverse + 1) - (1 - weight) * kept

    def hard_label_loss(self) -> torch.Tensor:
        """The cross-entropy with the labels of whole rows, ``[n]`` (nats).

        +inf where the label's logit is -inf, and for a label that no part has, such as an ignored
        one."""
        return self.label_sum.log() + (self.label_max - self.label_logit)
