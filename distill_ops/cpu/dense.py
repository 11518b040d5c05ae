"""The CPU path: chunks of rows that stay in cache, and no temporary of the logits' size.

A chunk's float32 buffers are allocated once a call and reused, and the gradient is written
straight to its place; rows of weight 0 are skipped. The module runs on any device, so it also
serves where Triton does not (float64 on a GPU), though there it waits for the device.
"""

import math
from collections.abc import Iterator

import torch

from .chunks import BUFFERS, GUARDS, ROW_BY_ROW, UNGUARDED, Chunk, Terms
from .closed_forms import CLOSED_FORMS

CHUNK_ELEMENTS = 1 << 18  # of one buffer: 1 MiB in float32, so that a few fit the L2 caches
GENERAL_ELEMENTS = 1 << 16  # of a temporary of a declared divergence: small enough for the heap
BUFFER_BYTES = 24 << 20  # of all buffers together, whatever the vocabulary and thread count


def rows_in_chunk(
    n_rows: int, n_cols: int, itemsize: int, n_threads: int, elements: int = CHUNK_ELEMENTS
) -> int:
    """Rows a chunk: about ``elements``, a whole number a thread, within BUFFER_BYTES."""
    rows = max(1, elements // n_cols)
    rows = -(-rows // n_threads) * n_threads
    return max(1, min(n_rows, rows, BUFFER_BYTES // (BUFFERS * n_cols * itemsize)))


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


Rows = slice | torch.Tensor


def kept_groups(
    keep: torch.Tensor | None,  # [N] bool; None: every row counts
    *tensors: torch.Tensor | None,  # each [..., V]
    gradient: torch.Tensor | None,  # likewise
    size: int,
    copies: bool,
) -> Iterator[tuple[list[torch.Tensor | None], Rows, Rows]]:
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


def per_row(values: list, rows: Rows) -> list:
    """Values at these rows: those of per-row tensors; a number, 0-d tensor or None serves every row."""
    return [v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for v in values]


class _Run:
    """One call of :func:`dense`: what serves all its chunks, and the rows' sums so far."""

    def __init__(self, terms, n_rows, n_cols, device, per_row, inplace):
        self.terms, self.n_rows, self.n_cols, self.inplace = terms, n_rows, n_cols, inplace
        self.per_row = per_row  # labels, scale, hard_scale, parameters
        name = None if terms.divergence is None else terms.divergence.name
        self.form = CLOSED_FORMS.get(name)
        # below temperature 1 the division may overflow, which takes more care than theirs
        self.has_guards = self.form is not None and terms.temperature >= 1 and not terms.propagate
        self.kind = {"dtype": terms.dtype, "device": device}
        elements = CHUNK_ELEMENTS if name is None or self.form else GENERAL_ELEMENTS
        threads = torch.get_num_threads()
        self.size = rows_in_chunk(n_rows, n_cols, terms.dtype.itemsize, threads, elements)
        self.buffers = tuple(torch.empty(self.size, n_cols, **self.kind) for _ in range(BUFFERS))
        self.sums = [None, None]  # divergence and cross-entropy, as far as they are wanted

    def chunk(self, group, places, n, guards) -> Chunk:
        """The matrices of ``n`` rows whose places in the call are a slice or a tensor."""
        labels, scale, hard_scale, parameters = self.per_row
        return Chunk(
            self.terms, group[0], group[1], *per_row([labels, scale, hard_scale], places),
            per_row(parameters, places),
            self.buffers if n == self.size else tuple(b[:n] for b in self.buffers), guards,
        )  # fmt: skip

    def store(self, i, places, losses) -> None:
        if losses is None:
            return
        if isinstance(places, slice) and losses.shape[0] == self.n_rows:
            self.sums[i] = losses
        else:
            if self.sums[i] is None:
                self.sums[i] = torch.zeros(self.n_rows, **self.kind)
            self.sums[i][places] = losses

    def rows(self, group, places, n, guards) -> int:
        """Losses and gradient of a group of rows; returns the guards that it took."""
        chunk = self.chunk(group, places, n, guards)
        write, bad = None, ()
        if self.terms.divergence is not None:
            losses, write = chunk.divergence(self.form)
            finite = math.isfinite(losses.sum())
            if not finite and guards == UNGUARDED and self.has_guards:
                chunk.guards = GUARDS
                losses, write = chunk.divergence(self.form)
                finite = math.isfinite(losses.sum())
            self.store(0, places, losses)
            if not finite and guards != ROW_BY_ROW:
                bad = (~losses.isfinite()).nonzero().squeeze(-1)
                # these rows come again: copied before a gradient overwrites them
                again = [None if matrix is None else matrix[bad] for matrix in group]
        self.store(1, places, chunk.finish(write, group[2], self.inplace))
        if len(bad):
            if isinstance(places, slice):
                places = torch.arange(places.start, places.stop, device=bad.device)
            self.rows(again, places[bad], len(bad), ROW_BY_ROW)
            if group[2] is not None:
                group[2][bad] = again[2]
        return chunk.guards

    def group(self, block, rows, places, guards) -> int:
        """Rows of a block, whose places in the call are ``places``."""
        copied = not isinstance(rows, slice)
        n = len(rows) if copied else rows.stop - rows.start
        group = block
        whole = all(m is None or m.shape == (n, self.n_cols) for m in block)
        if copied or not whole:
            group = [None if matrix is None else matrix[rows, : self.n_cols] for matrix in block]
        guards = self.rows(group, places, n, guards)
        if copied and block[2] is not None:
            block[2][rows, : self.n_cols] = group[2]
        return guards


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
    gradient: torch.Tensor | None,  # like student, or the student itself: overwritten
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Per-row divergence and cross-entropy ``[N]``, unweighted; fills ``gradient``."""
    n_rows = student.numel() // student.shape[-1]
    of_rows = labels, scale, hard_scale, parameters
    run = _Run(terms, n_rows, n_cols, student.device, of_rows, gradient is student)
    keep = None if weights is None else weights != 0
    groups = kept_groups(
        keep, student, teacher, gradient=gradient, size=run.size, copies=not run.inplace
    )
    guards = UNGUARDED
    for block, rows, places in groups:
        guards = run.group(block, rows, places, guards)  # infinities here: in the next, too
    if gradient is not None and n_cols < gradient.shape[-1]:
        gradient[..., n_cols:] = 0
    sums = run.sums
    if sums[0] is None and terms.divergence is not None:  # no row was kept
        sums[0] = torch.zeros(n_rows, **run.kind)
    if sums[1] is None and terms.hard:
        sums[1] = torch.zeros(n_rows, **run.kind)
    return sums[0], sums[1]
