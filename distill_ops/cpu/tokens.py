"""Token log-probabilities on the CPU: chunks of rows in cache, ignored rows not read."""

import math

import torch

from .rows import LOWEST, kept_groups, row_sums, rows_in_chunk


class Buffers:
    """Two matrices that every chunk uses anew: of fresh ones most of the cost is page faults."""

    def __init__(self, n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device):
        self.size = rows_in_chunk(n_rows, n_cols, dtype.itemsize, torch.get_num_threads())
        self.pair = [torch.empty(self.size, n_cols, dtype=dtype, device=device) for _ in range(2)]

    def __call__(self, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.pair
        return first[:n_rows], second[:n_rows]


def tempered(logits: torch.Tensor, temperature: float, work: torch.Tensor) -> torch.Tensor:
    """Logits with the softmax of ``logits / temperature``, in the dtype of ``work``, where they are
    unless it was theirs."""
    if temperature == 1 and logits.dtype == work.dtype:
        return logits
    logits = work.copy_(logits)
    if temperature < 1:  # the maximum goes first: the division could overflow
        logits.sub_(logits.amax(-1, keepdim=True))
    return logits.div_(temperature) if temperature != 1 else logits


def entropy_of(log_q: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    """``-sum(q log q)`` of each row, a probability of 0 making 0. ``log_q`` is used up."""
    q = torch.exp(log_q, out=work)
    return row_sums(q.mul_(log_q.clamp_(min=LOWEST))).neg_()


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
    buffers = Buffers(ids.numel(), logits.shape[-1], dtype, logits.device)
    for (matrix, _), rows, places in kept_groups(
        ids != ignore_index, logits, gradient=None, size=buffers.size, copies=True
    ):
        chunk = matrix[rows]
        work, log_q = buffers(len(chunk))
        torch.log_softmax(tempered(chunk, temperature, work), -1, out=log_q)
        found[places] = log_q.gather(-1, ids[places, None]).squeeze(-1)
        if with_entropy:
            entropies[places] = entropy_of(log_q, work)
    return found, entropies


def log_probs_at(
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N, K], -1 in unused slots
    loss_mask: torch.Tensor | None,  # [N]
    temperature: float,
    n_cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Log-probabilities ``[N, K]`` of K tokens a row: -inf in unused slots and in rows of weight 0,
    NaN for an id outside the vocabulary, which shows what a GPU's host does not look at."""
    found = torch.full(ids.shape, -math.inf, dtype=dtype, device=logits.device)
    keep = None if loss_mask is None else loss_mask != 0
    buffers = Buffers(len(ids), n_cols, dtype, logits.device)
    for (matrix, _), rows, places in kept_groups(
        keep, logits, gradient=None, size=buffers.size, copies=True
    ):
        chunk = matrix[:, :n_cols][rows]
        work, log_q = buffers(len(chunk))
        torch.log_softmax(tempered(chunk, temperature, work), -1, out=log_q)
        slots = ids[places].long()
        used = (slots >= 0) & (slots < n_cols)
        values = log_q.gather(-1, slots.masked_fill(~used, 0)).masked_fill_(~used, math.nan)
        found[places] = values.masked_fill_(slots == -1, -math.inf)
    return found


def write_gradient(
    logits: torch.Tensor,  # [n, V], tempered; they may be in ``out``
    ids: torch.Tensor,  # [n]
    upstream: torch.Tensor,  # [n]
    entropies: torch.Tensor | None,  # [n]
    upstream_entropy: torch.Tensor | None,  # [n]
    temperature: float,
    work: torch.Tensor,  # [n, V]
    out: torch.Tensor,  # [n, V] of the same dtype
) -> torch.Tensor:
    """``(g (1[j = id] - q_j) - h q_j (log q_j + H)) / T`` of a chunk of rows."""
    if upstream_entropy is None:
        q = torch.softmax(logits, -1, out=work)
        gradient = torch.mul(q, (upstream / -temperature)[:, None], out=out)
    else:
        log_q = torch.log_softmax(logits, -1, out=work)
        q = torch.exp(log_q, out=out)
        factor = log_q.clamp_(min=LOWEST).mul_((upstream_entropy / -temperature)[:, None])
        rest = torch.addcmul(upstream, upstream_entropy, entropies).div_(-temperature)
        gradient = q.mul_(factor.add_(rest[:, None]))
    return gradient.scatter_add_(-1, ids[:, None], (upstream / temperature)[:, None])


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
    buffers = Buffers(ids.numel(), logits.shape[-1], dtype, logits.device)
    for (matrix, out), rows, places in kept_groups(
        ids != ignore_index, logits, gradient=gradient, size=buffers.size, copies=False
    ):
        of_entropy = (None, None)
        if upstream_entropy is not None:
            of_entropy = entropies[places], upstream_entropy[places]
        chunk = matrix[rows]
        first, second = buffers(len(chunk))
        target = out[rows] if isinstance(rows, slice) and out.dtype == dtype else first
        write_gradient(
            tempered(chunk, temperature, first), ids[places], upstream[places], *of_entropy,
            temperature, second, target,
        )  # fmt: skip
        if target is first:
            out[rows] = first.to(out.dtype)
