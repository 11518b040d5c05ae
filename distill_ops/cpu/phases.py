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

NEG_INF = float("-inf")


class Rows:
    """Chunks of the rows that count: this rank's columns of both models.

    ``buffers`` are matrices in the working dtype for a chunk's work."""

    def __init__(
        self, options: Options, tokens: Tokens, student, teacher, n_cols: int, gradient=None,
        elements: int = CHUNK_ELEMENTS,
    ):  # fmt: skip
        self.options, self.tokens, self.n_cols, self.gradient = options, tokens, n_cols, gradient
        self.student = student
        self.teacher = teacher if options.soft else None
        self.dtype = working_dtype(student, self.teacher)
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


def _exponents(logits, maximum, temperature, out: torch.Tensor) -> torch.Tensor:
    """``(logits - maximum) / temperature`` in the working dtype."""
    if logits.dtype == out.dtype:
        torch.sub(logits, maximum[:, None], out=out)
    else:
        out.copy_(logits).sub_(maximum[:, None])
    return out if temperature == 1 else out.div_(temperature)


def _finite_part(
    student, teacher, options: Options, labels, buffers, dtype: torch.dtype
) -> RowStatistics:
    """RowStatistics of columns that hold no infinity; numbers that are not finite where they do."""
    kind, temperature = options.kind(), options.temperature
    x, e_s, y, e_t, room = buffers
    number = dict(RowStatistics.empty(len(student), student, dtype)._asdict())
    student_max = student.amax(-1).to(dtype)
    if kind is not None:
        teacher_max = teacher.amax(-1).to(dtype)
        _exponents(student, student_max, temperature, x)
        _exponents(teacher, teacher_max, temperature, y)
        torch.exp(x, out=e_s)
        torch.exp(y, out=e_t)
        number["student_max"], number["student_sum"] = student_max, row_sums(e_s)
        number["teacher_max"], number["teacher_sum"] = teacher_max, row_sums(e_t)
        number["kept_sum"] = number["teacher_sum"]
        if kind.moment != "none":
            measured = x if kind.moment == "soft" else torch.sub(x, y, out=y)
            if kind.moment in UNDER_TEACHER:
                number["teacher_moment"] = row_sums(torch.mul(e_t, measured, out=room))
            if kind.moment in UNDER_STUDENT:
                number["student_moment"] = row_sums(torch.mul(e_s, measured, out=room))
    if labels is not None:
        number["label_max"] = student_max
        if kind is None or temperature != 1:
            _exponents(student, student_max, 1.0, x)
            number["label_sum"] = row_sums(torch.exp(x, out=room))
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
    bad = ~(checked + sums).isfinite()
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


def kept_rows(options: Options, row: RowStatistics, slope, scale) -> torch.Tensor:
    return torch.stack(
        [
            row.student_max, row.student_sum, row.teacher_max, row.teacher_sum, slope,
            row.label_max, row.label_sum, row.fast, scale,
        ],
        -1,
    )  # fmt: skip


class _Columns:
    """Both models' logarithms and the terms of a divergence in some rows' columns."""

    def __init__(self, options: Options, student, teacher, kept, buffers, guarded: bool):
        self.kind, self.guarded = options.kind(), guarded
        self.student, self.teacher = student, teacher
        student_max, student_sum, teacher_max, teacher_sum = kept.unbind(-1)[:4]
        self.dead = None
        if guarded:
            wide = student.to(kept.dtype)
            student_zero, teacher_zero = student == NEG_INF, teacher == NEG_INF
            self.dead = student_zero & teacher_zero
            if self.kind.infinite_at_teacher_zero:
                student = wide.masked_fill(teacher_zero, NEG_INF)
                self.dead = self.dead | teacher_zero
            if self.kind.infinite_at_student_zero:
                self.dead = self.dead | student_zero
            # a row without a finite logit is NaN by its sums
            student_max, teacher_max = (
                x.masked_fill(x == NEG_INF, 0.0) for x in (student_max, teacher_max)
            )
        temperature = options.temperature
        self.log_q = _exponents(student, student_max, temperature, buffers[0])
        self.log_q.sub_(student_sum.log()[:, None])
        self.log_p = _exponents(teacher, teacher_max, temperature, buffers[1])
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


def reduce(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept: torch.Tensor
) -> torch.Tensor:
    rows = Rows(options, tokens, student, teacher, n_cols, elements=GENERAL_ELEMENTS)
    sums = kept.new_zeros((3, rows.n_rows))
    sums[2] = 1
    if n_cols == 0:
        return sums
    parameters = column_parameters(tokens.parameters, rows.dtype)
    for places, of_student, of_teacher, _, buffers in rows.chunks(kept[:, 8] != 0):
        here, of_row = kept[places], per_row(parameters, places)
        columns = _Columns(options, of_student, of_teacher, here, buffers, False)
        value, slope = map(row_sums, columns.terms(of_row))
        fast = here[:, 7] > 0
        bad = ~((value + slope).isfinite() & fast)
        if bad.any():
            again = _Columns(
                options, of_student[bad], of_teacher[bad], here[bad],
                [b[: int(bad.sum())] for b in buffers], True,
            ).terms(per_row(of_row, bad))  # fmt: skip
            value[bad], slope[bad] = map(row_sums, again)
        sums[:, places] = torch.stack([value, slope, (~bad).to(value.dtype)])
    return sums


def _divergence_gradient(
    options: Options, student, teacher, kept, parameters, buffers, guarded: bool
) -> torch.Tensor:
    """``slope - q D`` of a chunk, which may be one of the buffers."""
    kind, slope_sum = options.kind(), kept[:, 4:5]
    columns = _Columns(options, student, teacher, kept, buffers, guarded)
    log_q, log_p, dead = columns.log_q, columns.log_p, columns.dead
    if kind.moment in ("soft", "forward"):  # slope -p
        p = log_p.exp_()
        if guarded:
            p.masked_fill_(dead, 0.0)
        return log_q.exp_().mul_(-slope_sum).sub_(p)
    if kind.moment == "reverse":  # slope q (log(q / p) + 1), D is L + 1
        q = torch.exp(log_q, out=buffers[2])
        ratio = log_q.sub_(log_p)
        if guarded:
            ratio.masked_fill_(dead, 0.0)
        return ratio.sub_(slope_sum - 1).mul_(q)
    _, slope = columns.terms(parameters)
    return torch.addcmul(slope, log_q.exp_(), slope_sum, value=-1)


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
    scale = kept[:, 8] * upstream.reshape(-1)
    scale = torch.where(kept[:, 8] == 0, 0.0, scale)[:, None]
    of_divergence = options.soft_weight * options.divergence_scale / options.temperature
    for places, of_student, of_teacher, gradient, buffers in rows.chunks(kept[:, 8] != 0):
        here, of_row, factor = kept[places], per_row(parameters, places), scale[places]
        found = None
        if options.soft:
            # before anything is written: the gradient may be over the logits
            hard = (
                _label_gradient(of_student, here, tokens.labels[places], buffers[3:])
                if options.hard
                else None
            )
            bad = ~(here[:, 7] > 0)
            again = None
            if bad.any():
                again = _divergence_gradient(
                    options, of_student[bad], of_teacher[bad], here[bad], per_row(of_row, bad),
                    [torch.empty_like(b[: int(bad.sum())]) for b in buffers[:3]], True,
                )  # fmt: skip
            found = _divergence_gradient(
                options, of_student, of_teacher, here, of_row, buffers, False
            )
            if again is not None:
                found[bad] = again
            found.mul_(factor * of_divergence)
            if hard is not None:
                found.addcmul_(hard, factor * options.hard_label_weight)
        else:
            found = _label_gradient(of_student, here, tokens.labels[places], buffers)
            found.mul_(factor * options.hard_label_weight)
        gradient.copy_(found)


def _label_gradient(student, kept, labels, buffers) -> torch.Tensor:
    """``q - onehot`` at temperature 1 of a chunk; NaN in a row without a softmax."""
    label_max, label_sum = kept[:, 5], kept[:, 6]
    alive = label_sum > 0
    finite = label_max.masked_fill(label_max == NEG_INF, 0.0)
    q = _exponents(student, finite, 1.0, buffers[0]).exp_()
    q.div_(torch.where(alive, label_sum, math.nan)[:, None])
    here = ((labels >= 0) & (labels < student.shape[-1])).nonzero().squeeze(-1)
    q[here, labels[here]] -= 1
    return q
