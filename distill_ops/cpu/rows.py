"""Rows of logits on the CPU: chunks that stay in cache, whatever the strides, without those that do not
count.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..kernels.layout import single_stride

CHUNK_ELEMENTS = 1 << 18  # of one buffer: 1 MiB in float32, so that a few fit the L2 caches
GENERAL_ELEMENTS = 1 << 16  # of a temporary of a declared divergence: small enough for the heap
N_BUFFERS = 5  # of a chunk: matrices in the working dtype
LOWEST = -1e30  # a logarithm of 0: with room for a factor before it is multiplied by that 0
BUFFER_BYTES = 24 << 20  # of all buffers together, whatever the vocabulary and thread count


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of the rows: the same bits for a row alone, which PyTorch would split across threads."""
    if values.shape[0] == 1:
        return values.expand(2, -1).sum(-1)[:1]
    return values.sum(-1)


def exponents(
    logits: torch.Tensor, maximum: torch.Tensor, temperature: float, out: torch.Tensor
) -> torch.Tensor:
    """``(logits - maximum) / temperature`` in the dtype of ``out``, which is filled."""
    if logits.dtype == out.dtype:
        torch.sub(logits, maximum[:, None], out=out)
    else:
        out.copy_(logits).sub_(maximum[:, None])
    return out if temperature == 1 else out.div_(temperature)


def rows_in_chunk(
    n_rows: int, n_cols: int, itemsize: int, n_threads: int, elements: int = CHUNK_ELEMENTS
) -> int:
    """Rows a chunk: about ``elements``, a whole number a thread, within BUFFER_BYTES."""
    rows = max(1, elements // n_cols)
    rows = -(-rows // n_threads) * n_threads
    return max(1, min(n_rows, rows, BUFFER_BYTES // (N_BUFFERS * n_cols * itemsize)))


def row_blocks(
    *tensors: torch.Tensor | None, size: int, copies: bool
) -> Iterator[list[torch.Tensor | None]]:
    """The tensors ``[..., V]`` as matrices of rows, whatever their strides.

    Where no single stride reaches the rows, as in ``logits[:, :-1]``, a block is what one does
    reach; where ``copies`` may be made, blocks of fewer than ``size`` rows are copied into matrices
    of about that many."""
    if tensors[0].dim() == 2:
        yield list(tensors)
        return
    try:
        matrices = [t if t is None else t.view(-1, t.shape[-1]) for t in tensors]
    except RuntimeError:
        n_parts = len(tensors[0])
        rows_a_part = tensors[0][0].numel() // tensors[0].shape[-1]
        together = max(1, size // max(rows_a_part, 1)) if copies else 1
        n_blocks = -(-n_parts // together)
        parts = [[None] * n_blocks if t is None else t.split(together) for t in tensors]
        for part in zip(*parts, strict=True):
            if together > 1:
                yield [t if t is None else t.reshape(-1, t.shape[-1]) for t in part]
            else:
                inner = [t if t is None else t[0] for t in part]
                yield from row_blocks(*inner, size=size, copies=copies)
    else:
        yield matrices


def row_groups(rows: list[int] | range, size: int) -> Iterator[slice | list[int]]:
    """Groups of at most ``size`` rows: slices, which cost no copy, where the rows are neighbours."""
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        neighbours = group[-1] - group[0] + 1 == len(group)
        yield slice(group[0], group[-1] + 1) if neighbours else list(group)


Places = slice | torch.Tensor


def kept_groups(
    keep: torch.Tensor | None,  # [N] bool; None: every row counts
    *tensors: torch.Tensor | None,  # each [..., V]
    gradient: torch.Tensor | None,  # likewise
    size: int,
    copies: bool,
) -> Iterator[tuple[list[torch.Tensor | None], Places, Places]]:
    """Groups of at most ``size`` rows that count: the block of matrices that holds them, the gradient's
    last, their places in it and in the call. The gradient of the others becomes 0."""
    first = 0
    for block in row_blocks(*tensors, gradient, size=size, copies=copies):
        end = first + block[0].shape[0]
        kept = range(end - first)
        if keep is not None:
            here = keep[first:end]
            kept = here.nonzero().squeeze(-1).tolist()
            if gradient is not None and len(kept) < end - first:
                block[-1].index_fill_(0, (~here).nonzero().squeeze(-1), 0)
        for rows in row_groups(kept, size):
            if isinstance(rows, slice):
                yield block, rows, slice(first + rows.start, first + rows.stop)
            else:
                rows = torch.tensor(rows, device=block[0].device)
                yield block, rows, rows + first
        first = end


class ChosenRows:
    """Rows of a tensor ``[..., V]`` that an index chooses, gathered a chunk at a time: the tensor is not
    copied, whatever its strides.

    Args:
        tensor: whose rows are counted over its leading dimensions.
        index: ``[N]``, the row of each token; it is not looked at where a token does not count.
        size: rows of a chunk at most.
    """

    def __init__(self, tensor: torch.Tensor, index: torch.Tensor, size: int):
        self.index, self.tensor, self.buffer = index, tensor, None
        if single_stride(tensor.shape[:-1], tensor.stride()[:-1]) is not None:
            self.tensor = tensor.view(-1, tensor.shape[-1])
            self.buffer = tensor.new_empty(size, tensor.shape[-1])

    def at(self, places: Places) -> torch.Tensor:
        """Those of the tokens at these places, ``[n, V]``, until they are asked for again."""
        index = self.index[places]
        if self.buffer is None:
            return self.tensor[torch.unravel_index(index, self.tensor.shape[:-1])]
        return torch.index_select(self.tensor, 0, index, out=self.buffer[: len(index)])


def per_row(values: list, rows: Places) -> list:
    """Values at these rows: those of per-row tensors; a number, 0-d tensor or None serves every row."""
    return [v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for v in values]


class PerRow(NamedTuple):
    """What rows of logits come with: ``[N, ...]``, or a number or 0-d tensor for all of them."""

    labels: torch.Tensor | None  # [N]
    scale: float | torch.Tensor  # or [N, 1]: factor of the divergence's gradient, 1 / T included
    hard_scale: float | torch.Tensor
    parameters: list[float | torch.Tensor]  # of the divergence: numbers, [] or [N, 1]

    def at(self, rows: Places) -> "PerRow":
        return PerRow(*per_row(list(self[:3]), rows), per_row(self.parameters, rows))
