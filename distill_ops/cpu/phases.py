"""The phases of a loss of rows whose columns ranks split (``vocab_parallel/rows.py``), on the CPU.

Chunks of rows as in ``dense.py``. A chunk is done at first as if every logit were finite; rows whose
numbers are not, or that another rank found to hold an infinity, are done with all rules.
"""

import math
from collections.abc import Iterator

import torch

from ..divergences.base import Divergence, column_parameters
from ..problem import Options, working_dtype
from ..row_statistics import CLOSED, UNDER_STUDENT, UNDER_TEACHER, RowStatistics
from ..rows import Tokens
from .parts import FAST, PART_ELEMENTS, SCALE, Gradient, chunk_elements, sums_of_columns
from .parts import KEPT as KEPT
from .parts import kept_rows as kept_rows
from .rows import (
    N_BUFFERS,
    ChosenRows,
    exponents,
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
        elements: int = PART_ELEMENTS, dtype: torch.dtype | None = None,
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


def _moment(options: Options) -> str:
    """That of the divergence where it is used: :func:`reduce` sums what others need."""
    return options.kind().moment if options.soft and options.kind().moment in CLOSED else "none"


def _finite_part(
    student, teacher, options: Options, labels, buffers, dtype: torch.dtype, room=None
) -> RowStatistics:
    """RowStatistics of columns that hold no infinity; numbers that are not finite where they do. In ``room``
    the teacher's softmax stays.

    The sums come from PyTorch's softmax, whose exponential takes less time than the one alone."""
    kind, temperature = options.kind(), options.temperature
    moment = _moment(options)
    a, q, b, p, _ = buffers
    p = p if room is None else room
    number = RowStatistics.empty(len(student), student, dtype)._asdict()
    student_max = student.amax(-1).to(dtype)
    if kind is not None:
        teacher_max = teacher.amax(-1).to(dtype)
        x, y = student, teacher
        if moment != "none" or temperature != 1 or x.dtype != dtype:
            x = exponents(student, student_max, temperature, a)
        if moment not in ("none", "soft") or temperature != 1 or y.dtype != dtype:
            y = exponents(teacher, teacher_max, temperature, b)
        torch.softmax(x, -1, out=q)
        torch.softmax(y, -1, out=p)
        # of exponentials to probabilities, and their sums: PyTorch's loses the small ones of a peaked row
        student_one, teacher_one = q.amax(-1).reciprocal(), p.amax(-1).reciprocal()
        number["student_max"], number["student_sum"] = student_max, row_sums(q).mul_(student_one)
        number["teacher_max"], number["teacher_sum"] = teacher_max, row_sums(p).mul_(teacher_one)
        number["kept_sum"] = number["teacher_sum"]
        if moment != "none":
            measured = x if moment == "soft" else torch.sub(x, y, out=b)
            if moment in UNDER_TEACHER:
                products = torch.mul(p, measured, out=q)
                number["teacher_moment"] = row_sums(products).mul_(teacher_one)
            if moment in UNDER_STUDENT:
                number["student_moment"] = row_sums(q.mul_(measured)).mul_(student_one)
    if labels is not None:
        number["label_max"] = student_max
        if kind is None or temperature != 1:
            torch.softmax(exponents(student, student_max, 1.0, a), -1, out=q)
            number["label_sum"] = row_sums(q).div_(q.amax(-1))
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
    if options.soft and _moment(options) == "none":  # whose sums do not tell of a -inf
        bad |= (student.amin(-1) == NEG_INF) | (teacher.amin(-1) == NEG_INF)
    return bad


def normalise(
    options: Options,
    tokens: Tokens,
    student,
    teacher,
    n_cols: int,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = Rows(options, tokens, student, teacher, n_cols, room, PART_ELEMENTS)
    hard, kind = options.hard, options.kind()
    empty = RowStatistics.empty(rows.n_rows, student, rows.dtype).pack(hard)
    if n_cols == 0:
        return empty
    keep = None if tokens.weights is None else tokens.weights != 0
    for places, of_student, of_teacher, target, buffers in rows.chunks(keep):
        labels = tokens.labels[places] if hard else None
        part = _finite_part(of_student, of_teacher, options, labels, buffers, rows.dtype, target)
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


def reduce(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept: torch.Tensor
) -> torch.Tensor:
    rows = Rows(options, tokens, student, teacher, n_cols, elements=chunk_elements(options))
    sums = kept.new_zeros((3, rows.n_rows))
    sums[2] = 1
    if n_cols == 0:
        return sums
    parameters = column_parameters(tokens.parameters, rows.dtype)
    for places, of_student, of_teacher, _, buffers in rows.chunks(kept[:, SCALE] != 0):
        sums[:, places] = sums_of_columns(
            options, of_student, of_teacher, kept[places], per_row(parameters, places), buffers
        )
    return sums


def differentiate(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept: torch.Tensor,
    upstream: torch.Tensor, out: torch.Tensor, filled: bool = False,
) -> None:  # fmt: skip
    rows = Rows(options, tokens, student, teacher, n_cols, out, chunk_elements(options))
    if n_cols == 0:
        out.zero_()
        return
    parameters = column_parameters(tokens.parameters, rows.dtype)
    direct = out is not student and out.dtype == rows.dtype
    scale = torch.where(kept[:, SCALE] == 0, 0.0, kept[:, SCALE] * upstream.reshape(-1))
    for places, of_student, of_teacher, target, buffers in rows.chunks(kept[:, SCALE] != 0):
        here, of_row = kept[places], per_row(parameters, places)
        if filled:
            buffers[1] = target
        elif direct and target.is_contiguous():  # else softmax would not heed its strides
            buffers[0] = target
        gradient = Gradient(options, here, scale[places], buffers)
        bad = ~(here[:, FAST] > 0)
        again = None
        if bad.any():
            again = gradient.of_infinite(of_student, of_teacher, per_row(of_row, bad), bad)
        found = gradient.of_finite(of_student, of_teacher, of_row, filled)
        if again is not None:
            found[bad] = again
        if options.hard:
            labels = tokens.labels[places]
            here = ((labels >= 0) & (labels < n_cols)).nonzero().squeeze(-1)
            found[here, labels[here]] -= gradient.hard_scale[here]
        if found is not target:
            target.copy_(found)
