"""A part of the columns of rows, that of one of the ranks that split them: sums of value and slope, and
gradient. ``phases.py`` asks for them, a chunk of rows at a time.

Of rows without an infinity by the divergence's closed form, or else its own text; of others by its
text with all rules.
"""

import math

import torch

from ..problem import Options, working_dtype
from ..row_statistics import RowStatistics
from .chunk import UNGUARDED, Chunk, Row, Terms
from .closed_forms import CLOSED_FORMS
from .rows import CHUNK_ELEMENTS, GENERAL_ELEMENTS, exponents, per_row, row_sums

NEG_INF = float("-inf")

# numbers that are kept of a row: maxima and sums, D, the hard label's maximum and sum, whether the row has
# no infinity, the factor of its gradient; of this rank's columns their share of the row's probability:
# of student, teacher and hard label
KEPT = 12
SLOPE, FAST, SCALE, SHARES = 4, 7, 8, 9

PART_ELEMENTS = (
    2 * CHUNK_ELEMENTS
)  # of a chunk's buffer; the work once a chunk is more than of whole rows


def kept_rows(
    options: Options, row: RowStatistics, slope, scale, parts: torch.Tensor
) -> torch.Tensor:
    own = RowStatistics.unpack(parts)

    def share(name: str, temperature: float) -> torch.Tensor:
        maximum, total = f"{name}_max", f"{name}_sum"
        finite = getattr(row, maximum).masked_fill(getattr(row, maximum) == NEG_INF, 0.0)
        moved = ((getattr(own, maximum) - finite) / temperature).exp()
        return moved * getattr(own, total) / getattr(row, total)

    return torch.stack(
        [
            row.student_max, row.student_sum, row.teacher_max, row.teacher_sum, slope,
            row.label_max, row.label_sum, row.fast, scale,
            share("student", options.temperature), share("teacher", options.temperature),
            share("label", 1.0),
        ],
        -1,
    )  # fmt: skip


class _Columns:
    """Both models' logarithms and the terms of a divergence in some rows' columns."""

    def __init__(self, options: Options, student, teacher, kept, buffers, guarded: bool):
        self.kind, self.guarded = options.kind(), guarded
        student_max, student_sum, teacher_max, teacher_sum = kept.unbind(-1)[:4]
        if guarded:
            student_zero, teacher_zero = student == NEG_INF, teacher == NEG_INF
            self.dead = student_zero & teacher_zero
            if self.kind.infinite_at_teacher_zero:
                student = student.masked_fill(teacher_zero, NEG_INF)
                self.dead = self.dead | teacher_zero
            if self.kind.infinite_at_student_zero:
                self.dead = self.dead | student_zero
            # a row without a finite logit is NaN by its sums
            student_max, teacher_max = (
                x.masked_fill(x == NEG_INF, 0.0) for x in (student_max, teacher_max)
            )
        temperature = options.temperature
        self.log_q = exponents(student, student_max, temperature, buffers[0])
        self.log_q.sub_(student_sum.log()[:, None])
        self.log_p = exponents(teacher, teacher_max, temperature, buffers[1])
        self.log_p.sub_(teacher_sum.log()[:, None])
        if guarded:
            lowest = torch.finfo(kept.dtype).min
            self.alive = ((student_sum > 0) & (teacher_sum > 0))[:, None]
            self.log_q, self.log_p = (
                x.clamp_(min=lowest).masked_fill_(~self.alive, math.nan)
                for x in (self.log_q, self.log_p)
            )

    def terms(self, parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope of the columns."""
        found = self.kind.on_columns(self.log_q, self.log_p, parameters)
        if not self.guarded:
            return found
        return tuple(
            x.masked_fill(self.dead, 0.0).masked_fill(~self.alive, math.nan) for x in found
        )

    def gradient(self, scale: torch.Tensor, of_q: torch.Tensor, parameters) -> torch.Tensor:
        """``scale slope + of_q q``."""
        _, slope = self.terms(parameters)
        return torch.addcmul(slope * scale[:, None], self.log_q.exp(), of_q[:, None])


def _guarded(options: Options, student, teacher, kept, rows: torch.Tensor) -> _Columns:
    """Of some rows of a chunk, which are few."""
    kept = kept[rows]
    buffers = [kept.new_empty((len(kept), student.shape[-1])) for _ in range(2)]
    return _Columns(options, student[rows], teacher[rows], kept, buffers, True)


def _closed_form(options: Options):
    """That of the divergence, if it has one."""
    return CLOSED_FORMS.get(options.kind().name)


def chunk_elements(options: Options) -> int:
    general = options.soft and not _closed_form(options)
    return GENERAL_ELEMENTS if general else PART_ELEMENTS


def fills(options: Options, student, gradient: torch.Tensor, n_cols: int) -> bool:
    """Whether :func:`phases.normalise` may leave the softmax of the teacher's columns in the memory of the
    gradient, of which it is a part: an exponential less."""
    room = gradient is not student and gradient.dtype == working_dtype(student, gradient)
    room = room and gradient.is_contiguous() and gradient.shape[-1] == n_cols
    return room and options.soft and options.kind().moment in ("soft", "forward")


def _row(logits: torch.Tensor, maximum, total, share, temperature: float) -> Row:
    """Of one model's columns; what is kept of the rows is ``[n, 1]``."""
    own, left = maximum, maximum
    if temperature != 1:
        own = logits.amax(-1, True).to(maximum.dtype)
        left = (maximum - own) / temperature
    return Row(own, left, total.log(), share)


def _chunk(
    options: Options, student, teacher, kept, scale, parameters, buffers, lossless, filled=False
) -> Chunk:
    """Some rows' columns for a closed form."""
    terms = Terms(options.kind(), False, options.temperature, False, kept.dtype)
    numbers = kept.t()[:, :, None]
    return Chunk(
        terms, student, teacher, None, scale, None, parameters, buffers, UNGUARDED, None,
        _row(student, *numbers[:2], numbers[SHARES], options.temperature),
        _row(teacher, *numbers[2:4], numbers[SHARES + 1], options.temperature), lossless, filled,
    )  # fmt: skip


def sums_of_columns(options: Options, student, teacher, kept, parameters, buffers) -> torch.Tensor:
    """``[3, n]``: sums of value and slope, and whether the row has no infinity."""
    columns = options, student, teacher, kept
    if form := _closed_form(options):
        value, gradient = form(_chunk(*columns, None, parameters, buffers, False))
        slope = gradient.total()
    else:
        value, slope = map(row_sums, _Columns(*columns, buffers, False).terms(parameters))
    bad = ~((value + slope).isfinite() & (kept[:, FAST] > 0))
    if bad.any():
        again = _guarded(*columns, bad).terms(per_row(parameters, bad))
        value[bad], slope[bad] = map(row_sums, again)
    return torch.stack([value, slope, (~bad).to(value.dtype)])


class Gradient:
    """The gradient of a chunk's rows, ``scale (slope - q D)`` of the divergence and ``hard_scale (q - onehot)``
    of the label, both scales ``[n]``."""

    def __init__(self, options: Options, kept, scale, buffers):
        self.options, self.kept, self.buffers = options, kept, buffers
        self.scale = scale * (options.soft_weight * options.divergence_scale / options.temperature)
        self.hard_scale = scale * options.hard_label_weight
        self.hard_sum = torch.where(kept[:, 6] > 0, 1.0, math.nan)

    def of_finite(self, student, teacher, parameters, filled: bool) -> torch.Tensor:
        """Of rows without an infinity; ``filled``: :func:`fills` was asked before."""
        found, kept = self.buffers[1 if filled else 0], self.kept
        if not self.options.soft:
            logits = exponents(student, student.amax(-1).to(found.dtype), 1.0, found)
            q, share = torch.softmax(logits, -1, out=found), kept[:, SHARES + 2]
            return q.mul_((share * self.hard_scale / row_sums(q))[:, None])
        columns = self.options, student, teacher, kept
        together = self.options.hard and self.options.temperature == 1  # one softmax
        of_q = kept[:, SLOPE] * -self.scale + (self.hard_scale if together else 0.0)
        if form := _closed_form(self.options):
            scale = self.scale[:, None]
            _, gradient = form(_chunk(*columns, scale, parameters, self.buffers, True, filled))
            gradient.of_part(of_q, found)
        else:
            found = _Columns(*columns, self.buffers, False).gradient(self.scale, of_q, parameters)
        if self.options.hard and not together:
            q = self.softmax_of_label(student, self.buffers[4])
            found.addcmul_(q, self.hard_scale[:, None])
        return found

    def softmax_of_label(self, student, out) -> torch.Tensor:
        """At temperature 1; NaN in a row without a finite logit."""
        label_max, label_sum = self.kept[:, 5], self.kept[:, 6]
        finite = label_max.masked_fill(label_max == NEG_INF, 0.0)
        over = self.hard_sum / label_sum
        return exponents(student, finite, 1.0, out).exp_().mul_(over[:, None])

    def of_infinite(self, student, teacher, parameters, rows: torch.Tensor) -> torch.Tensor:
        """Of some rows, by all rules."""
        part = Gradient(self.options, self.kept[rows], self.scale[rows], None)
        part.scale, part.hard_scale = self.scale[rows], self.hard_scale[rows]
        found = student.new_zeros((len(part.kept), student.shape[-1]), dtype=self.kept.dtype)
        if self.options.soft:
            columns = _guarded(self.options, student, teacher, self.kept, rows)
            of_q = part.kept[:, SLOPE] * -part.scale
            found = columns.gradient(part.scale, of_q, parameters)
        if self.options.hard:
            q = part.softmax_of_label(student[rows], torch.empty_like(found))
            found.addcmul_(q, part.hard_scale[:, None])
        return found
