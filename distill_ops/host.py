"""The CPU path: chunks of rows that stay in cache, and no temporary of the logits' size.

A chunk's float32 buffers are allocated once a call and reused, and the gradient is written
straight to its place; rows of weight 0 are skipped. The module runs on any device, so it also
serves where Triton does not (float64 on a GPU), though there it waits for the device.
"""

import math
from collections.abc import Iterator

import torch

from .chunks import BUFFERS, GUARDS, ROW_BY_ROW, UNGUARDED, Chunk, Terms

CHUNK_ELEMENTS = 1 << 19  # of one buffer: 2 MiB in float32, about what the L2 caches hold
BUFFER_BYTES = 24 << 20  # of all buffers together, whatever the vocabulary and thread count


def rows_in_chunk(n_rows: int, n_cols: int, itemsize: int, n_threads: int) -> int:
    """Rows a chunk: enough to fill the cache, a whole number a thread, within BUFFER_BYTES."""
    rows = max(1, CHUNK_ELEMENTS // n_cols)
    rows = -(-rows // n_threads) * n_threads
    return max(1, min(n_rows, rows, BUFFER_BYTES // (BUFFERS * n_cols * itemsize)))


def row_blocks(*tensors: torch.Tensor | None, size: int) -> Iterator[list[torch.Tensor | None]]:
    """The tensors ``[..., V]`` as matrices of rows, whatever their strides.

    Where no single stride reaches the rows, as in ``logits[:, :-1]``, a block is what one does
    reach; blocks of fewer than ``size`` rows are copied into matrices of about that many."""
    if tensors[0].dim() == 2:
        yield list(tensors)
        return
    try:
        matrices = [t if t is None else t.view(-1, t.shape[-1]) for t in tensors]
    except RuntimeError:
        n_parts = len(tensors[0])
        rows_a_part = tensors[0][0].numel() // tensors[0].shape[-1]
        together = max(1, size // max(rows_a_part, 1))
        n_blocks = -(-n_parts // together)
        parts = [[None] * n_blocks if t is None else t.split(together) for t in tensors]
        for part in zip(*parts, strict=True):
            if together > 1:
                yield [t if t is None else t.reshape(-1, t.shape[-1]) for t in part]
            else:
                yield from row_blocks(*[t if t is None else t[0] for t in part], size=size)
    else:
        yield matrices


def row_groups(rows: list[int] | range, size: int) -> Iterator[slice | list[int]]:
    """Groups of at most ``size`` rows: slices, which cost no copy, where the rows are neighbours."""
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        neighbours = group[-1] - group[0] + 1 == len(group)
        yield slice(group[0], group[-1] + 1) if neighbours else list(group)


def _rows(tensor, rows):
    """Rows of a per-row tensor; a number or 0-d tensor serves every row."""
    return tensor[rows] if isinstance(tensor, torch.Tensor) and tensor.dim() else tensor


def dense(
    terms: Terms,
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor | None,  # [..., V]
    labels: torch.Tensor | None,  # [N]
    weights: torch.Tensor | None,  # [N]; None: every row counts
    scale: float | torch.Tensor,  # or [N, 1]: factor of the divergence's gradient, 1 / T included
    hard_scale: float | torch.Tensor,
    parameters: list[float | torch.Tensor],  # of the divergence: numbers, [] or [N, 1]
    n_cols: int,
    gradient: torch.Tensor | None,  # like student
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Per-row divergence and cross-entropy ``[N]``, unweighted; fills ``gradient``."""
    n_rows = student.numel() // student.shape[-1]
    size = rows_in_chunk(n_rows, n_cols, terms.dtype.itemsize, torch.get_num_threads())
    shape, kind = (size, n_cols), {"dtype": terms.dtype, "device": student.device}
    buffers = tuple(torch.empty(shape, **kind) for _ in range(BUFFERS))
    sums = [None, None]  # per-row divergence and cross-entropy, as far as they are wanted
    whole = n_cols == student.shape[-1] and (teacher is None or n_cols == teacher.shape[-1])

    def run(block, first, rows, guards):
        """One group of a block's rows, which begins at row ``first`` of the call. Returns whether
        every divergence came out finite."""
        copied = not isinstance(rows, slice)
        if copied:
            n, out = len(rows), torch.tensor(rows, device=student.device) + first
        else:
            n, out = rows.stop - rows.start, slice(first + rows.start, first + rows.stop)
        group = block
        if copied or n < n_rows or not whole:
            group = [None if matrix is None else matrix[rows, :n_cols] for matrix in block]
        chunk = Chunk(
            terms, group[0], group[1], _rows(labels, out), _rows(scale, out), _rows(hard_scale, out),
            [_rows(value, out) for value in parameters], buffers if n == size else tuple(b[:n] for b in buffers), guards,
        )  # fmt: skip
        results = chunk.losses(group[2])
        for i, losses in enumerate(results):
            if losses is None:
                continue
            if n == n_rows:
                sums[i] = losses
            else:
                if sums[i] is None:
                    sums[i] = torch.zeros(n_rows, **kind)
                sums[i][out] = losses
        if copied and gradient is not None:
            block[2][rows, :n_cols] = group[2]
        return results[0] is None or math.isfinite(results[0].sum())

    guards = UNGUARDED
    first = 0
    for block in row_blocks(student, teacher, gradient, size=size):
        end = first + block[0].shape[0]
        kept = range(end - first)
        if weights is not None:
            keep = weights[first:end] != 0
            kept = keep.nonzero().squeeze(-1).tolist()
        if gradient is not None:
            if n_cols < gradient.shape[-1]:
                block[2][:, n_cols:] = 0
            if len(kept) < end - first:
                block[2].index_fill_(0, (~keep).nonzero().squeeze(-1), 0)
        all_finite = True
        for rows in row_groups(kept, size):
            finite = run(block, first, rows, guards)
            if not finite and guards == UNGUARDED and terms.has_guards:
                guards = GUARDS  # where one chunk holds infinities, the next ones will
                finite = run(block, first, rows, guards)
            all_finite &= finite
        if not all_finite:
            infinite = (~sums[0][first:end].isfinite()).nonzero().squeeze(-1)
            for rows in row_groups(infinite.tolist(), size):
                run(block, first, rows, ROW_BY_ROW)
        first = end
    if sums[0] is None and terms.divergence is not None:  # no row was kept
        sums[0] = torch.zeros(n_rows, **kind)
    if sums[1] is None and terms.hard:
        sums[1] = torch.zeros(n_rows, **kind)
    return sums[0], sums[1]
