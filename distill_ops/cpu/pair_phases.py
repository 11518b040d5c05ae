"""The phases of statistics and metrics of rows whose columns ranks split (``vocab_parallel/statistics.py``,
``vocab_parallel/metrics.py``), on the CPU: both models' softmax at once."""

import math

import torch

from ..problem import Options
from ..rows import IGNORED, Tokens
from .metrics import pair_terms
from .phases import differentiate
from .rows import (
    GENERAL_ELEMENTS,
    exponents,
    kept_groups,
    per_row,
    row_blocks,
    row_groups,
    rows_in_chunk,
)
from .token_phases import finite_maximum, token_gradient_of_chunk, token_part
from .tokens import Buffers

N_SUMS = 5  # both KLs, Jensen-Shannon, total variation, sum of min(p, q)


def pair_part(
    student: torch.Tensor,  # [..., width]
    teacher: torch.Tensor,  # [..., width]
    ids: torch.Tensor | None,  # [n]: rows of IGNORED are not read; None: all are
    n_cols: int,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``[7, n]``: of each model what ``token_part`` gives, and 1 where the first of both models' maxima
    is one column."""
    numbers = [
        x for logits in (student, teacher) for x in token_part(logits, ids, n_cols, temperature, True, dtype)
    ]  # fmt: skip
    agree = torch.zeros_like(numbers[0])
    if n_cols > 0:
        tops = (x[..., :n_cols].argmax(-1).reshape(-1) for x in (student, teacher))
        agree += torch.eq(*tops)
    return torch.stack([*numbers, agree])


def statistics_gradient(
    options: Options,
    parameters: tuple[float | torch.Tensor, ...],
    student: torch.Tensor,  # [..., width]
    teacher: torch.Tensor,  # [..., width]
    ids: torch.Tensor,  # [n], counted from the first column
    kept: tuple[torch.Tensor, torch.Tensor],  # [n, 9] of the divergence, [n, 3] of the token
    upstream: torch.Tensor,  # [5, n]
    out: torch.Tensor,  # like the student
) -> None:
    """Fill the gradient of divergence, log-probability and entropy together, 0 where the token is
    ignored."""
    width, temperature = student.shape[-1], options.temperature
    if width == 0:
        return
    of_divergence, of_token = kept
    dtype, parameters = of_token.dtype, list(parameters)
    buffers = Buffers(len(ids), width, dtype, student.device)
    part = torch.empty_like(buffers.pair[0])
    for (logits, of_teacher, target), rows, places in kept_groups(
        ids != IGNORED, student, teacher, gradient=out, size=buffers.size, copies=False
    ):
        to_divergence, to_log_prob, _, to_entropy, _ = upstream[:, places]
        chunk = logits[rows]
        first, second = buffers(len(chunk))
        total = token_gradient_of_chunk(
            chunk, ids[places], of_token[places], temperature, to_log_prob, to_entropy,
            (first, second), first,
        )  # fmt: skip
        if to_divergence.any():
            here = of_divergence[places].clone()
            here[:, 8] = torch.where(here[:, 8] == 0, 0.0, here[:, 8] * to_divergence)
            of_rows = Tokens(None, None, 1.0, tuple(per_row(parameters, places)))
            of_terms, one = part[: len(chunk)], here.new_ones(())
            differentiate(options, of_rows, chunk, of_teacher[rows], width, here, one, of_terms)
            total += of_terms
        target[rows] = total.to(target.dtype)


def pair_sums(
    student: torch.Tensor,  # [..., width]
    teacher: torch.Tensor,  # [..., width]
    n_cols: int,
    temperature: float,
    kept: torch.Tensor,  # [4, n]: maxima and sums of exponentials of whole rows, the student's first
) -> torch.Tensor:
    """``[5, n]``: the metrics' sums over these columns."""
    n_rows, dtype = kept.shape[1], kept.dtype
    sums = kept.new_zeros((N_SUMS, n_rows))
    if n_cols == 0:
        return sums
    threads = torch.get_num_threads()
    size = rows_in_chunk(n_rows, n_cols, dtype.itemsize, threads, GENERAL_ELEMENTS)
    first = 0
    for block in row_blocks(student, teacher, size=size, copies=True):
        for rows in row_groups(range(block[0].shape[0]), size):
            places = slice(first + rows.start, first + rows.stop)
            logs = []
            for matrix, (maximum, total) in zip(block, kept[:, places].view(2, 2, -1), strict=True):
                chunk = matrix[rows, :n_cols]
                work = chunk.new_empty(chunk.shape, dtype=dtype)
                logs.append(exponents(chunk, finite_maximum(maximum), temperature, work))
                logs[-1].sub_(torch.where(total > 0, total, math.nan).log()[:, None])
            found = pair_terms(*logs, logs[0].exp(), logs[1].exp())
            sums[:, places] = torch.stack([x.sum(-1) for x in found])
        first += block[0].shape[0]
    return sums
