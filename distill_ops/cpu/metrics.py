"""Metrics of tokens on the CPU: a chunk of rows, then every sum."""

import math

import torch

from .rows import row_blocks, row_groups, rows_in_chunk

N_SUMS = 7  # both KLs, Jensen-Shannon, total variation, sum of min(p, q), both entropies


def _times(probability: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    return torch.where(probability == 0, 0.0, probability * log)


def _chunk_metrics(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, dtype
) -> tuple:
    """Sums ``[n_sums, rows]`` and agreement of a chunk of rows."""
    top_s, top_t = student.argmax(-1), teacher.argmax(-1)
    # the maximum goes first: the division could overflow
    logs = []
    for logits in (student.to(dtype), teacher.to(dtype)):
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        logs.append(torch.log_softmax(logits, -1))
    log_q, log_p = logs
    q, p = log_q.exp(), log_p.exp()
    sums = *pair_terms(log_q, log_p, q, p), -_times(q, log_q), -_times(p, log_p)
    no_softmax = (log_q.isnan() | log_p.isnan()).any(-1)
    sums = torch.stack([x.sum(-1) for x in sums]).masked_fill(no_softmax, math.nan)
    return sums, (top_s == top_t) & ~no_softmax


def pair_terms(
    log_q: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, p: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The terms of all sums but the entropies."""
    both = (q == 0) & (p == 0)
    log_ratio = (log_p - log_q).masked_fill(both, 0.0)
    log_m = torch.log(0.5 + 0.5 * torch.exp(-log_ratio.abs()))
    of_student = _times(q, log_ratio.clamp(min=0) + log_m)
    of_teacher = _times(p, log_ratio.clamp(max=0) - log_m)
    return (
        _times(p, log_ratio), _times(q, -log_ratio), 0.5 * (of_teacher - of_student),
        0.5 * (q - p).abs(), torch.minimum(q, p),
    )  # fmt: skip


def metrics(
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor,  # [..., V]
    temperature: float,
    n_cols: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums ``[N_SUMS, n]`` and the agreement ``[n]`` of all rows."""
    n_rows = math.prod(student.shape[:-1])
    sums = student.new_empty((N_SUMS, n_rows), dtype=dtype)
    agreement = student.new_empty(n_rows, dtype=torch.bool)
    size = rows_in_chunk(n_rows, n_cols, dtype.itemsize, torch.get_num_threads())
    first = 0
    for block in row_blocks(student, teacher, size=size, copies=True):
        for rows in row_groups(range(block[0].shape[0]), size):
            group = [matrix[rows, :n_cols] for matrix in block]
            out = slice(first + rows.start, first + rows.stop)
            sums[:, out], agreement[out] = _chunk_metrics(*group, temperature, dtype)
        first += block[0].shape[0]
    return sums, agreement
