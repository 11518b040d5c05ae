"""The dense loss on the CPU: chunks of rows that stay in cache, and no temporary of the logits' size.

A chunk's float32 buffers are allocated once a call and reused, and the gradient is written
straight to its place; rows of weight 0 are skipped. The module runs on any device, so it also
serves where Triton does not (float64 on a GPU), though there it waits for the device.
"""

import math

import torch

from .chunk import GUARDS, ROW_BY_ROW, UNGUARDED, Chunk, Terms
from .closed_forms import CLOSED_FORMS
from .rows import (
    CHUNK_ELEMENTS,
    GENERAL_ELEMENTS,
    N_BUFFERS,
    kept_groups,
    per_row,
    rows_in_chunk,
)


class _Pass:
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
        self.buffers = tuple(torch.empty(self.size, n_cols, **self.kind) for _ in range(N_BUFFERS))
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
    run = _Pass(terms, n_rows, n_cols, student.device, of_rows, gradient is student)
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
