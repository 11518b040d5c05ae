"""The phases of a loss of rows whose columns ranks split (``vocab_parallel/rows.py``), by the kernels.
``cpu/phases.py`` is its twin."""

import math

import torch

from .gpu import formula_of, on
from .kernels import dense, phases
from .kernels.launch import STATISTICS
from .problem import Options
from .row_statistics import OF_DIVERGENCE, RowStatistics
from .rows import Tokens


def normalise(options: Options, tokens: Tokens, student, teacher, n_cols: int) -> torch.Tensor:
    n_rows = math.prod(student.shape[:-1])
    n_numbers = len(RowStatistics._fields) if options.hard else OF_DIVERGENCE
    parts = student.new_empty((n_numbers, n_rows), dtype=torch.float32)
    with on(student):
        phases.normalise(
            formula_of(options, tokens.parameters), student, teacher if options.soft else None,
            tokens.labels, n_cols, parts=parts, weights=tokens.weights, teacher_rows=tokens.teacher_rows,
        )  # fmt: skip
    return parts


KEPT = STATISTICS


def kept_rows(options: Options, row: RowStatistics, slope, scale, parts) -> torch.Tensor:
    return phases.kept_rows(row, slope, scale, options.temperature)


def reduce(options: Options, tokens: Tokens, student, teacher, n_cols: int, kept) -> torch.Tensor:
    sums = kept.new_empty((3, len(kept)))
    with on(student):
        phases.reduce(
            formula_of(options, tokens.parameters), student, teacher, n_cols, kept=kept, sums=sums,
            teacher_rows=tokens.teacher_rows,
        )  # fmt: skip
    return sums


def differentiate(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, upstream, out
) -> None:
    if n_cols == 0:
        out.zero_()
        return
    upstream = upstream.reshape(-1) if upstream.dim() else upstream
    with on(student):
        dense.run(
            formula_of(options, tokens.parameters), student, teacher, tokens.labels, n_cols,
            statistics=kept, gradient=out, upstream=upstream, teacher_rows=tokens.teacher_rows,
        )  # fmt: skip
