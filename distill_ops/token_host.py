"""Token log-probabilities on the CPU: chunks of rows in cache, ignored rows not read."""

from collections.abc import Iterator

import torch

from . import host
from .chunks import Terms, row_sums
from .host import row_blocks, row_groups, rows_in_chunk

Rows = slice | torch.Tensor

LOWEST = -1e30  # a logarithm of 0: with room for a factor before it is multiplied by that 0


def _chunks(
    ids: torch.Tensor, ignore_index: int, dtype: torch.dtype, *matrices: torch.Tensor
) -> Iterator[tuple[Rows, list[torch.Tensor], Rows]]:
    """Groups of the rows that count: their places in the call, and the matrices' blocks with the
    rows' places there."""
    size = rows_in_chunk(
        ids.numel(), matrices[0].shape[-1], dtype.itemsize, torch.get_num_threads()
    )
    first = 0
    for block in row_blocks(*matrices, size=size, copies=len(matrices) == 1):
        end = first + block[0].shape[0]
        kept = (ids[first:end] != ignore_index).nonzero().squeeze(-1).tolist()
        for rows in row_groups(kept, size):
            if isinstance(rows, slice):
                yield slice(first + rows.start, first + rows.stop), block, rows
            else:
                rows = torch.tensor(rows, device=ids.device)
                yield rows + first, block, rows
        first = end


def log_softmax(logits: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    logits = logits.to(dtype)
    if temperature < 1:  # the maximum goes first: the division could overflow
        logits = logits - logits.amax(-1, keepdim=True)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def entropy_of(log_q: torch.Tensor) -> torch.Tensor:
    """``-sum(q log q)`` of each row, a probability of 0 making 0."""
    return row_sums(log_q.clamp(min=LOWEST).mul_(log_q.exp())).neg_()


def log_probs(
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N]
    temperature: float,
    ignore_index: int,
    dtype: torch.dtype,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities ``[N]`` and entropies ``[N]``."""
    found = torch.zeros(ids.numel(), dtype=dtype, device=logits.device)
    entropies = torch.zeros_like(found) if with_entropy else None
    for places, (matrix,), rows in _chunks(ids, ignore_index, dtype, logits):
        log_q = log_softmax(matrix[rows], temperature, dtype)
        found[places] = log_q.gather(-1, ids[places, None]).squeeze(-1)
        if with_entropy:
            entropies[places] = entropy_of(log_q)
    return found, entropies


def write_gradient(
    log_q: torch.Tensor,  # [n, V], used up
    ids: torch.Tensor,  # [n]
    upstream: torch.Tensor,  # [n]
    entropies: torch.Tensor | None,  # [n]
    upstream_entropy: torch.Tensor | None,  # [n]
    temperature: float,
) -> torch.Tensor:
    """``(g (1[j = id] - q_j) - h q_j (log q_j + H)) / T`` of a chunk of rows."""
    q = log_q.exp()
    if upstream_entropy is None:
        gradient = q.mul_(-upstream[:, None])
    else:
        factor = log_q.clamp_(min=LOWEST).add_(entropies[:, None]).mul_(upstream_entropy[:, None])
        gradient = factor.add_(upstream[:, None]).mul_(q).neg_()
    gradient.scatter_add_(-1, ids[:, None], upstream[:, None])
    return gradient if temperature == 1 else gradient.div_(temperature)


def fill_gradient(
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N]
    entropies: torch.Tensor | None,  # [N]
    upstream: torch.Tensor,  # [N]
    upstream_entropy: torch.Tensor | None,  # [N]
    temperature: float,
    ignore_index: int,
    gradient: torch.Tensor,  # like logits, or the logits themselves: overwritten
) -> None:
    """Write the gradient of all rows, 0 where the token is ignored."""
    dtype = upstream.dtype
    for places, (matrix, out), rows in _chunks(ids, ignore_index, dtype, logits, gradient):
        of_entropy = (None, None)
        if upstream_entropy is not None:
            of_entropy = entropies[places], upstream_entropy[places]
        out[rows] = write_gradient(
            log_softmax(matrix[rows], temperature, dtype), ids[places], upstream[places],
            *of_entropy, temperature,
        ).to(out.dtype)  # fmt: skip
    _zero_ignored(ids, ignore_index, gradient)


def _zero_ignored(ids: torch.Tensor, ignore_index: int, gradient: torch.Tensor) -> None:
    ignored = (ids == ignore_index).view(gradient.shape[:-1])
    if ignored.any():
        gradient.masked_fill_(ignored[..., None], 0.0)


def _of_rows(values: list, places: Rows) -> list:
    """Per-row tensors ``[N, 1]`` at these rows; numbers and 0-d tensors serve every row."""
    return [v[places] if isinstance(v, torch.Tensor) and v.dim() else v for v in values]


def fill_combined_gradient(
    terms: Terms,
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N]
    entropies: torch.Tensor,  # [N], the student's
    upstreams: tuple[torch.Tensor, ...],  # of divergence, log-probability and entropy, each [N]
    parameters: list[float | torch.Tensor],  # of the divergence: numbers, [] or [N, 1]
    ignore_index: int,
    gradient: torch.Tensor,  # like student: overwritten
) -> None:
    """Write the gradient of all three, 0 where the token is ignored."""
    temperature, dtype, n_cols = terms.temperature, terms.dtype, student.shape[-1]
    for places, (logits, of_teacher, out), rows in _chunks(
        ids, ignore_index, dtype, student, teacher, gradient
    ):
        of_divergence, of_log_prob, of_entropy = (x[places] for x in upstreams)
        log_q = log_softmax(logits[rows], temperature, dtype)
        total = write_gradient(
            log_q, ids[places], of_log_prob, entropies[places], of_entropy, temperature
        )
        if of_divergence.any():
            part = torch.empty_like(total)
            host.dense(
                terms, logits[rows], of_teacher[rows], None, of_divergence,
                of_divergence[:, None] / temperature, 0.0, _of_rows(parameters, places), n_cols, part,
            )  # fmt: skip
            total += part
        out[rows] = total.to(out.dtype)
    _zero_ignored(ids, ignore_index, gradient)
