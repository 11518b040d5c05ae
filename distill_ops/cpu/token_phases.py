"""The phases of a token's log-probability and entropy in rows whose columns ranks split
(``vocab_parallel/tokens.py``), on the CPU: chunks of rows as in ``tokens.py``."""

import math

import torch

from ..rows import IGNORED
from .rows import LOWEST, exponents, kept_groups, row_sums
from .tokens import Buffers

NEG_INF = float("-inf")


def finite_maximum(maximum: torch.Tensor) -> torch.Tensor:
    """A maximum to subtract: 0 of columns without a finite logit."""
    return maximum.masked_fill(maximum == NEG_INF, 0.0)


def token_part(
    logits: torch.Tensor,  # [..., width]
    ids: torch.Tensor | None,  # [n]: rows of IGNORED are not read; None: all are
    n_cols: int,
    temperature: float,
    entropy: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximum, ``sum(exp(y))`` and ``sum(exp(y) y)`` (0 where no entropy is asked for) of the first
    columns, y being ``(x - maximum) / temperature``, each ``[n]``; of no columns where a row is not read."""
    n_rows = math.prod(logits.shape[:-1])
    numbers = logits.new_zeros((3, n_rows), dtype=dtype)
    numbers[0] = NEG_INF
    if n_cols == 0:
        return tuple(numbers)
    buffers = Buffers(n_rows, n_cols, dtype, logits.device)
    for (matrix, _), rows, places in kept_groups(
        None if ids is None else ids != IGNORED, logits,
        gradient=None, size=buffers.size, copies=True,
    ):  # fmt: skip
        chunk = matrix[:, :n_cols][rows]
        maximum, y, q = _softmax(chunk, temperature, entropy, buffers(len(chunk)))
        total = _total(maximum, q)
        numbers[0, places], numbers[1, places] = maximum, total
        if entropy:
            moment = row_sums(q.mul_(y.clamp_(min=LOWEST))) * total
            numbers[2, places] = moment.masked_fill(maximum == NEG_INF, 0.0)
    return tuple(numbers)


def _softmax(
    chunk: torch.Tensor,
    temperature: float,
    distances: bool,
    work: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The maxima ``[n]`` of some columns, the distances from them where asked for, and PyTorch's softmax of
    the columns alone, which takes less time than an exponential."""
    first, second = work
    maximum, y, x = chunk.amax(-1).to(first.dtype), None, chunk
    if distances or temperature != 1 or chunk.dtype != first.dtype:
        x = y = exponents(chunk, finite_maximum(maximum), temperature, first)
    return maximum, y, torch.softmax(x, -1, out=second)


def _total(maximum: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``sum(exp(y))`` of the columns, from their softmax; 0 without a finite logit."""
    return q.amax(-1).reciprocal_().masked_fill_(maximum == NEG_INF, 0.0)


def token_gradient_of_chunk(
    chunk: torch.Tensor,  # [n, width]
    ids: torch.Tensor,  # [n], counted from the first column; others match none
    kept: torch.Tensor,  # [n, 3]: maximum, sum of exponentials and entropy of the whole rows
    temperature: float,
    upstream: torch.Tensor,  # [n]
    upstream_entropy: torch.Tensor | None,  # [n]
    work: tuple[torch.Tensor, torch.Tensor],  # [n, width] each
    out: torch.Tensor,  # of the dtype of the work; one of it, or the chunk itself
) -> torch.Tensor:
    """``(g (1[j = id] - q_j) - h q_j (log q_j + H)) / T`` of this rank's columns."""
    maximum, total, entropy = kept.unbind(-1)
    own, y, q = _softmax(chunk, temperature, upstream_entropy is not None, work)
    dead = own == NEG_INF
    if dead.any():
        q[dead] = 0.0
    shift = ((own - finite_maximum(maximum)) / temperature).masked_fill_(dead, 0.0)
    shift.clamp_(min=LOWEST)  # times a factor of 0 it is 0
    over = (
        shift.exp() * _total(own, q) / (total * -temperature)
    )  # of q, in what is asked of the row
    if upstream_entropy is None:
        gradient = torch.mul(q, (upstream * over)[:, None], out=out)
    else:
        rest = entropy - total.log() + shift
        constant = torch.addcmul(upstream, upstream_entropy, rest).mul_(over)
        factor = y.clamp_(min=LOWEST).mul_((upstream_entropy * over)[:, None])
        gradient = torch.mul(q, factor.add_(constant[:, None]), out=out)
    here = (ids >= 0).nonzero().squeeze(-1)
    gradient[here, ids[here]] += upstream[here] / temperature
    return gradient


def token_gradient(
    logits: torch.Tensor,  # [..., width]
    ids: torch.Tensor,  # [n]
    kept: torch.Tensor,  # [n, 3]
    temperature: float,
    upstream: torch.Tensor,  # [n]
    upstream_entropy: torch.Tensor | None,  # [n]
    out: torch.Tensor,  # like the logits, or the logits themselves: overwritten
) -> None:
    """Fill the gradient of all rows, 0 where the token is ignored."""
    dtype, n_cols = kept.dtype, logits.shape[-1]
    if n_cols == 0:
        return
    buffers = Buffers(len(ids), n_cols, dtype, logits.device)
    for (matrix, target), rows, places in kept_groups(
        ids != IGNORED, logits, gradient=out, size=buffers.size, copies=False
    ):
        of_entropy = None if upstream_entropy is None else upstream_entropy[places]
        chunk = matrix[rows]
        first, second = buffers(len(chunk))
        direct = isinstance(rows, slice) and target.dtype == dtype
        found = token_gradient_of_chunk(
            chunk, ids[places], kept[places], temperature, upstream[places], of_entropy,
            (first, second), target[rows] if direct else first,
        )  # fmt: skip
        if not direct:
            target[rows] = found.to(target.dtype)
