"""The phases of the top-k loss of rows whose columns ranks split (``vocab_parallel/topk.py``), by the kernels.
``cpu/topk_phases.py`` is its twin."""

import math

import torch

from .gpu import formula_of, on
from .kernels import topk_combine, topk_gradient, topk_part, topk_phases
from .problem import Options
from .rows import Tokens

KEPT = topk_part.KEPT


def _slots(options: Options, tokens: Tokens, student, teacher) -> topk_part.Slots:
    log_probs, ids, offset = teacher
    if not isinstance(offset, torch.Tensor):
        offset = torch.full((), offset, dtype=torch.int64, device=student.device)
    return topk_part.Slots(
        log_probs, ids, offset, *options.tail_options, teacher_rows=tokens.teacher_rows
    )


def normalise(options: Options, tokens: Tokens, student, teacher, n_cols: int) -> torch.Tensor:
    n_numbers = topk_phases.ALL_NUMBERS if options.hard else topk_phases.NUMBERS
    parts = student.new_empty((n_numbers, math.prod(student.shape[:-1])), dtype=torch.float32)
    with on(student):
        topk_phases.normalise(
            formula_of(options, tokens.parameters), _slots(options, tokens, student, teacher), student,
            tokens.labels, n_cols, parts=parts, weights=tokens.weights,
        )  # fmt: skip
    return parts


def combined(
    options: Options,
    tokens: Tokens,
    parts: torch.Tensor,
    used: torch.Tensor,
    sums: torch.Tensor | None,
):
    """Weighted losses ``[n]``, their components ``[2, n]`` (or ``[0, n]``), both None without the sums, and
    the kept numbers."""
    n_rows, new = parts.shape[-1], parts.new_empty
    kept, losses, components = new((n_rows, KEPT)), None, None
    if sums is not None:
        losses, components = new(n_rows), new((2 if options.hard else 0, n_rows))
    with on(parts):
        topk_combine.run(
            formula_of(options, tokens.parameters), parts, used, sums, tokens.weights,
            tokens.denominator, kept=kept, losses=losses, components=components,
        )  # fmt: skip
    return losses, components, kept


def reduce(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, with_rest: bool
) -> torch.Tensor:
    sums = kept.new_empty((topk_phases.SUMS, len(kept)))
    with on(student):
        topk_phases.reduce(
            formula_of(options, tokens.parameters), _slots(options, tokens, student, teacher), student,
            n_cols, kept=kept, sums=sums, with_rest=with_rest,
        )  # fmt: skip
    return sums


def differentiate(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, upstream, out
) -> None:
    upstream = upstream.reshape(-1) if upstream.dim() else upstream
    with on(student):
        topk_gradient.differentiate(
            formula_of(options, tokens.parameters), _slots(options, tokens, student, teacher), student,
            tokens.labels, n_cols, kept=kept, upstream=upstream, gradient=out,
        )  # fmt: skip
