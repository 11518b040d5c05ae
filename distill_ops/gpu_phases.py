"""The phases of a loss of rows whose columns ranks split (``vocab_parallel/rows.py``), by the kernels.
``cpu/phases.py`` is its twin."""

import math

import torch

from .gpu import formula_of, on
from .kernels import combine, dense, pair, phases, statistics, token
from .kernels.launch import STATISTICS, TOKEN_STATISTICS
from .problem import Options
from .row_statistics import OF_DIVERGENCE, RowStatistics
from .rows import IGNORED, Tokens


def fills(options: Options, student, gradient: torch.Tensor, n_cols: int) -> bool:
    return False


def normalise(
    options: Options,
    tokens: Tokens,
    student,
    teacher,
    n_cols: int,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
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


def combined(options: Options, tokens: Tokens, parts: torch.Tensor, sums: torch.Tensor | None):
    """Weighted losses ``[n]``, their components ``[2, n]`` (or ``[0, n]``) and the kept numbers."""
    n_rows, new = parts.shape[-1], parts.new_empty
    losses, kept = new(n_rows), new((n_rows, KEPT))
    components = new((2 if options.hard else 0, n_rows))
    with on(parts):
        combine.run(
            formula_of(options, tokens.parameters), parts, sums, tokens.weights, tokens.denominator,
            kept=kept, losses=losses, components=components,
        )  # fmt: skip
    return losses, components, kept


def reduce(options: Options, tokens: Tokens, student, teacher, n_cols: int, kept) -> torch.Tensor:
    sums = kept.new_empty((3, len(kept)))
    with on(student):
        phases.reduce(
            formula_of(options, tokens.parameters), student, teacher, n_cols, kept=kept, sums=sums,
            teacher_rows=tokens.teacher_rows,
        )  # fmt: skip
    return sums


def differentiate(
    options: Options,
    tokens: Tokens,
    student,
    teacher,
    n_cols: int,
    kept,
    upstream,
    out,
    filled: bool = False,
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


def token_part(
    logits: torch.Tensor,  # [..., width]
    ids: torch.Tensor,  # [n]: rows of IGNORED are not read
    n_cols: int,  # all of the width
    temperature: float,
    entropy: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``cpu.token_phases.token_part``."""
    new = ids.new_zeros
    if n_cols == 0:
        maximum, total, moment = new((3, len(ids)), dtype=torch.float32)
        return maximum.fill_(-math.inf), total, moment
    log_probs = new(len(ids), dtype=torch.float32)  # of this part, which nobody asks for
    entropies = new(len(ids), dtype=torch.float32) if entropy else None
    kept = new((len(ids), TOKEN_STATISTICS), dtype=torch.float32)
    with on(logits):
        token.run(
            logits, ids, temperature, IGNORED, log_probs=log_probs, entropies=entropies,
            statistics=kept,
        )  # fmt: skip
    return exact_part(*kept.unbind(-1), entropy)


def exact_part(maximum, total, entropies, entropy: bool = True):
    """Of what the token kernel finds: the maximum of columns without a finite logit, 0 there, is -inf; and
    the moment, of the entropies."""
    empty = total == 0
    moment = torch.zeros_like(total)
    if entropy:
        moment = ((total.log() - entropies) * total).masked_fill(empty, 0.0)
    return maximum.masked_fill(empty, -math.inf), total, moment


def token_gradient(
    logits: torch.Tensor,  # [..., width]
    ids: torch.Tensor,  # [n]
    kept: torch.Tensor,  # [n, 3]
    temperature: float,
    upstream: torch.Tensor,  # [n]
    upstream_entropy: torch.Tensor | None,  # [n]
    out: torch.Tensor,
) -> None:
    """Fill the gradient, which may be over the logits."""
    if logits.shape[-1] == 0:
        return
    with on(logits):
        token.run(
            logits, ids, temperature, IGNORED, statistics=kept, gradient=out, upstream=upstream,
            upstream_entropy=upstream_entropy,
        )  # fmt: skip


def pair_part(
    student: torch.Tensor,  # [..., width]
    teacher: torch.Tensor,  # [..., width]
    ids: torch.Tensor | None,  # [n]
    n_cols: int,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As ``cpu.pair_phases.pair_part``."""
    n_rows = math.prod(student.shape[:-1])
    numbers = student.new_empty((pair.N_NUMBERS, n_rows), dtype=torch.float32)
    with on(student):
        pair.run(student, teacher, ids, IGNORED, n_cols, temperature, numbers)
    return torch.stack([*exact_part(*numbers[:3]), *exact_part(*numbers[3:6]), numbers[6]])


def statistics_gradient(
    options: Options,
    parameters: tuple[float | torch.Tensor, ...],
    student: torch.Tensor,  # [..., width]
    teacher: torch.Tensor,  # [..., width]
    ids: torch.Tensor,  # [n]
    kept: tuple[torch.Tensor, torch.Tensor],  # [n, 9], [n, 3]
    upstream: torch.Tensor,  # [5, n]
    out: torch.Tensor,
) -> None:
    if student.shape[-1] == 0:
        return
    with on(student):
        statistics.run(
            formula_of(options, parameters), student, teacher, ids, IGNORED, statistics=kept,
            gradient=out, upstream=upstream,
        )  # fmt: skip


def pair_sums(
    student: torch.Tensor,  # [..., width]
    teacher: torch.Tensor,  # [..., width]
    n_cols: int,
    temperature: float,
    kept: torch.Tensor,  # [4, n]
) -> torch.Tensor:
    """As ``cpu.pair_phases.pair_sums``."""
    sums = kept.new_empty((pair.N_SUMS, kept.shape[1]))
    with on(student):
        pair.run_sums(student, teacher, n_cols, temperature, kept, sums)
    return sums
