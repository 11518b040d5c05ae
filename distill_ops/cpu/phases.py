"""The phases of a loss of rows whose columns ranks split (``vocab_parallel/rows.py``), on the CPU.

Chunks of rows as in ``dense.py``. A chunk is done at first as if every logit were finite; rows whose
numbers are not, or that another rank found to hold an infinity, are done with all rules.
"""

import math
from collections.abc import Iterator

import torch

from ..divergences.base import Divergence, column_parameters
from ..problem import Options, working_dtype
from ..row_statistics import UNDER_STUDENT, UNDER_TEACHER, RowStatistics
from ..rows import Tokens
from .rows import (
    CHUNK_ELEMENTS,
    GENERAL_ELEMENTS,
    N_BUFFERS,
    ChosenRows,
    kept_groups,
    per_row,
    row_sums,
    rows_in_chunk,
)
from .token_phases import exponents as _distances

NEG_INF = float("-inf")


class Rows:
    """Chunks of the rows that count: this rank's columns of both models.

    ``buffers`` are matrices in the working dtype for a chunk's work."""

    def __init__(
        self, options: Options, tokens: Tokens, student, teacher, n_cols: int, gradient=None,
        elements: int = CHUNK_ELEMENTS, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.options, self.tokens, self.n_cols, self.gradient = options, tokens, n_cols, gradient
        self.student = student
        self.teacher = teacher if options.soft else None
        self.dtype = working_dtype(student, self.teacher) if dtype is None else dtype
        self.n_rows = math.prod(student.shape[:-1])
        threads = torch.get_num_threads()
        self.size = rows_in_chunk(
            self.n_rows, max(n_cols, 1), self.dtype.itemsize, threads, elements
        )
        kind = {"dtype": self.dtype, "device": student.device}
        self.buffers = tuple(torch.empty(self.size, n_cols, **kind) for _ in range(N_BUFFERS))

    def chunks(self, keep: torch.Tensor | None) -> Iterator[tuple]:
        """Places in the call, student, teacher and gradient of the chunk, each ``[n, n_cols]``, and the
        buffers; the gradient comes back to its place when the next chunk is asked for."""
        teacher, chosen = self.teacher, None
        if teacher is not None and self.tokens.teacher_rows is not None:
            chosen = ChosenRows(teacher[..., : self.n_cols], self.tokens.teacher_rows, self.size)
            teacher = None
        inplace = self.gradient is self.student
        groups = kept_groups(
            keep, self.student, teacher, gradient=self.gradient, size=self.size, copies=not inplace
        )
        for block, rows, places in groups:
            student, of_teacher, gradient = (
                None if x is None else x[rows, : self.n_cols] for x in block
            )
            if chosen is not None:
                of_teacher = chosen.at(places)
            yield places, student, of_teacher, gradient, [b[: len(student)] for b in self.buffers]
            if gradient is not None and not isinstance(rows, slice):
                block[-1][rows, : self.n_cols] = gradient
        if self.gradient is not None and self.n_cols < self.gradient.shape[-1]:
            self.gradient[..., self.n_cols :] = 0


def _finite_part(
    student, teacher, options: Options, labels, buffers, dtype: torch.dtype
) -> RowStatistics:
    """RowStatistics of columns that hold no infinity; numbers that are not finite where they do.

    The sums come from PyTorch's softmax, whose exponential takes less time than the one alone."""
    kind, temperature = options.kind(), options.temperature
    a, q, b, p, _ = buffers
    number = RowStatistics.empty(len(student), student, dtype)._asdict()
    student_max = student.amax(-1).to(dtype)
    if kind is not None:
        teacher_max = teacher.amax(-1).to(dtype)
        x, y = student, teacher
        if kind.moment != "none" or temperature != 1 or x.dtype != dtype:
            x = _distances(student, student_max, temperature, a)
        if kind.moment not in ("none", "soft") or temperature != 1 or y.dtype != dtype:
            y = _distances(teacher, teacher_max, temperature, b)
        torch.softmax(x, -1, out=q)
        torch.softmax(y, -1, out=p)
        student_sum, teacher_sum = q.amax(-1).reciprocal(), p.amax(-1).reciprocal()
        number["student_max"], number["student_sum"] = student_max, student_sum
        number["teacher_max"], number["teacher_sum"] = teacher_max, teacher_sum
        number["kept_sum"] = teacher_sum
        if kind.moment != "none":
            measured = x if kind.moment == "soft" else torch.sub(x, y, out=b)
            if kind.moment in UNDER_TEACHER:
                number["teacher_moment"] = row_sums(p.mul_(measured)).mul_(teacher_sum)
            if kind.moment in UNDER_STUDENT:
                number["student_moment"] = row_sums(q.mul_(measured)).mul_(student_sum)
    if labels is not None:
        number["label_max"] = student_max
        if kind is None or temperature != 1:
            torch.softmax(_distances(student, student_max, 1.0, a), -1, out=q)
            number["label_sum"] = q.amax(-1).reciprocal()
        else:
            number["label_sum"] = number["student_sum"]
        elsewhere = (labels < 0) | (labels >= student.shape[-1])
        found = student.gather(-1, labels.masked_fill(elsewhere, 0)[:, None])[:, 0].to(dtype)
        number["label_logit"] = found.masked_fill(elsewhere, NEG_INF)
        number["label_found"] = (~elsewhere).to(dtype)
    return RowStatistics(**number)


def _holds_infinity(part: RowStatistics, student, teacher, options: Options) -> torch.Tensor:
    """``[n]``: which rows are to be done with all rules."""
    checked = part.student_max + part.teacher_max + part.teacher_moment + part.student_moment
    sums = part.student_sum + part.teacher_sum
    if not options.soft:
        checked, sums = part.label_max, part.label_sum
    bad = ~((checked + sums).isfinite() & (sums > 0))
    kind = options.kind()
    if kind is not None and kind.moment == "none":  # whose sums do not tell of a -inf
        bad |= (student == NEG_INF).any(-1) | (teacher == NEG_INF).any(-1)
    return bad


def normalise(options: Options, tokens: Tokens, student, teacher, n_cols: int) -> torch.Tensor:
    rows = Rows(options, tokens, student, teacher, n_cols)
    hard, kind = options.hard, options.kind()
    empty = RowStatistics.empty(rows.n_rows, student, rows.dtype).pack(hard)
    if n_cols == 0:
        return empty
    keep = None if tokens.weights is None else tokens.weights != 0
    for places, of_student, of_teacher, _, buffers in rows.chunks(keep):
        labels = tokens.labels[places] if hard else None
        part = _finite_part(of_student, of_teacher, options, labels, buffers, rows.dtype)
        packed = part.pack(hard)
        bad = _holds_infinity(part, of_student, of_teacher, options)
        if bad.any():
            both = of_student[bad], (of_student if of_teacher is None else of_teacher)[bad]
            again = RowStatistics.of(
                *both,
                kind or Divergence,
                options.temperature,
                None if labels is None else labels[bad],
            )
            packed[:, bad] = again._replace(fast=torch.zeros_like(again.fast)).pack(hard)
        empty[:, places] = packed
    return empty


# numbers that are kept of a row: maxima and sums, D, the hard label's maximum and sum, whether the row has
# no infinity, the factor of its gradient; of this rank's columns the factors that make of their own
# softmax the row's: of student, teacher and hard label
KEPT = 12
SLOPE, FAST, SCALE, FACTORS = 4, 7, 8, 9


def kept_rows(
    options: Options, row: RowStatistics, slope, scale, parts: torch.Tensor
) -> torch.Tensor:
    own = RowStatistics.unpack(parts)

    def factor(name: str, temperature: float) -> torch.Tensor:
        maximum, total = f"{name}_max", f"{name}_sum"
        finite = getattr(row, maximum).masked_fill(getattr(row, maximum) == NEG_INF, 0.0)
        moved = ((getattr(own, maximum) - finite) / temperature).exp()
        return moved * getattr(own, total) / getattr(row, total)

    return torch.stack(
        [
            row.student_max, row.student_sum, row.teacher_max, row.teacher_sum, slope,
            row.label_max, row.label_sum, row.fast, scale,
            factor("student", options.temperature), factor("teacher", options.temperature),
            factor("label", 1.0),
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
        self.log_q = _distances(student, student_max, temperature, buffers[0])
        self.log_q.sub_(student_sum.log()[:, None])
        self.log_p = _distances(teacher, teacher_max, temperature, buffers[1])
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

    def gradient(self, slope_sum: torch.Tensor, parameters) -> torch.Tensor:
        """``slope - q D``."""
        _, slope = self.terms(parameters)
        return torch.addcmul(slope, self.log_q.exp(), slope_sum[:, None], value=-1)


def reduce(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept: torch.Tensor
) -> torch.Tensor:
    rows = Rows(options, tokens, student, teacher, n_cols, elements=GENERAL_ELEMENTS)
    sums = kept.new_zeros((3, rows.n_rows))
    sums[2] = 1
    if n_cols == 0:
        return sums
    parameters = column_parameters(tokens.parameters, rows.dtype)
    for places, of_student, of_teacher, _, buffers in rows.chunks(kept[:, SCALE] != 0):
        here, of_row = kept[places], per_row(parameters, places)
        columns = _Columns(options, of_student, of_teacher, here, buffers, False)
        value, slope = map(row_sums, columns.terms(of_row))
        bad = ~((value + slope).isfinite() & (here[:, FAST] > 0))
        if bad.any():
            again = _guarded(options, of_student, of_teacher, here, bad).terms(per_row(of_row, bad))
            value[bad], slope[bad] = map(row_sums, again)
        sums[:, places] = torch.stack([value, slope, (~bad).to(value.dtype)])
    return sums


def _guarded(options: Options, student, teacher, kept, rows: torch.Tensor) -> _Columns:
    """Of some rows of a chunk, which are few."""
    kept = kept[rows]
    buffers = [kept.new_empty((len(kept), student.shape[-1])) for _ in range(2)]
    return _Columns(options, student[rows], teacher[rows], kept, buffers, True)


class _Gradient:
    """The gradient of a chunk's rows, ``scale (slope - q D)`` of the divergence and ``hard_scale (q - onehot)``
    of the label, both scales ``[n]``."""

    def __init__(self, options: Options, kept, scale, buffers):
        self.options, self.kept, self.buffers = options, kept, buffers
        self.scale = scale * (options.soft_weight * options.divergence_scale / options.temperature)
        self.hard_scale = scale * options.hard_label_weight
        self.hard_sum = torch.where(kept[:, 6] > 0, 1.0, math.nan)

    def softmax(self, logits, out: torch.Tensor) -> torch.Tensor:
        """Of this rank's columns alone; the row's is it times a kept factor."""
        x, temperature = logits, self.options.temperature
        if x.dtype != out.dtype or temperature != 1:
            x = _distances(logits, logits.amax(-1).to(out.dtype), temperature, out)
        return torch.softmax(x, -1, out=out)

    def of_finite(self, student, teacher, parameters) -> torch.Tensor:
        """Of rows without an infinity."""
        a, b, c, *_ = self.buffers
        kept, kind = self.kept, self.options.kind()
        of_student, of_teacher, of_label = kept[:, FACTORS:].unbind(-1)
        together = self.options.temperature == 1  # the hard label has the divergence's softmax
        slope = kept[:, SLOPE]
        if kind is None:
            found = a
            torch.softmax(_distances(student, student.amax(-1).to(a.dtype), 1.0, a), -1, out=a)
            a.mul_((of_label * self.hard_scale)[:, None])
        elif kind.moment in ("soft", "forward"):  # slope -p
            factor = -slope * self.scale
            if together and self.options.hard:
                factor = factor + self.hard_scale
            found = self.softmax(student, a).mul_((of_student * factor)[:, None])
            p = self.softmax(teacher, b)
            found.addcmul_(p, (of_teacher * self.scale)[:, None], value=-1)
        else:
            if kind.moment == "reverse":  # slope q (log(q / p) + 1), D is L + 1
                q = self.softmax(student, a)
                ratio = _distances(student, kept[:, 0], self.options.temperature, b)
                ratio.sub_(_distances(teacher, kept[:, 2], self.options.temperature, c))
                ratio.sub_((slope - 1 + (kept[:, 1] / kept[:, 3]).log())[:, None])
                found = q.mul_((of_student * self.scale)[:, None]).mul_(ratio)
            else:
                columns = _Columns(self.options, student, teacher, kept, self.buffers, False)
                found = columns.gradient(slope, parameters).mul_(self.scale[:, None])
            if together and self.options.hard:
                q = self.softmax(student, self.buffers[4])
                found.addcmul_(q, (of_student * self.hard_scale)[:, None])
        if self.options.hard and kind is not None and not together:
            q = self.softmax_of_label(student, self.buffers[4])
            found.addcmul_(q, self.hard_scale[:, None])
        return found

    def softmax_of_label(self, student, out) -> torch.Tensor:
        """At temperature 1; NaN in a row without a finite logit."""
        label_max, label_sum = self.kept[:, 5], self.kept[:, 6]
        finite = label_max.masked_fill(label_max == NEG_INF, 0.0)
        over = self.hard_sum / label_sum
        return _distances(student, finite, 1.0, out).exp_().mul_(over[:, None])

    def of_infinite(self, student, teacher, parameters, rows: torch.Tensor) -> torch.Tensor:
        """Of some rows, by all rules."""
        part = _Gradient(self.options, self.kept[rows], self.scale[rows], None)
        part.scale, part.hard_scale = self.scale[rows], self.hard_scale[rows]
        found = student.new_zeros((len(part.kept), student.shape[-1]), dtype=self.kept.dtype)
        if self.options.soft:
            columns = _guarded(self.options, student, teacher, self.kept, rows)
            found = columns.gradient(part.kept[:, SLOPE], parameters).mul_(part.scale[:, None])
        if self.options.hard:
            q = part.softmax_of_label(student[rows], torch.empty_like(found))
            found.addcmul_(q, part.hard_scale[:, None])
        return found


def differentiate(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept: torch.Tensor,
    upstream: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    general = options.soft and options.kind().moment in ("none", "symmetric")
    elements = GENERAL_ELEMENTS if general else CHUNK_ELEMENTS
    rows = Rows(options, tokens, student, teacher, n_cols, out, elements)
    if n_cols == 0:
        out.zero_()
        return
    parameters = column_parameters(tokens.parameters, rows.dtype)
    direct = out is not student and out.dtype == rows.dtype
    scale = torch.where(kept[:, SCALE] == 0, 0.0, kept[:, SCALE] * upstream.reshape(-1))
    for places, of_student, of_teacher, target, buffers in rows.chunks(kept[:, SCALE] != 0):
        here, of_row = kept[places], per_row(parameters, places)
        if direct and target.is_contiguous():  # else softmax would not heed its strides
            buffers[0] = target
        gradient = _Gradient(options, here, scale[places], buffers)
        bad = ~(here[:, FAST] > 0)
        again = None
        if bad.any():
            again = gradient.of_infinite(of_student, of_teacher, per_row(of_row, bad), bad)
        found = gradient.of_finite(of_student, of_teacher, of_row)
        if again is not None:
            found[bad] = again
        if options.hard:
            labels = tokens.labels[places]
            here = ((labels >= 0) & (labels < n_cols)).nonzero().squeeze(-1)
            found[here, labels[here]] -= gradient.hard_scale[here]
        if found is not target:
            target.copy_(found)
