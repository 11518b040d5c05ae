"""The dense loss on the CPU: chunks of rows that stay in cache, and no temporary of the logits' size.

A chunk's float32 buffers are allocated once a call and reused, and the gradient is written
straight to its place; rows of weight 0 are skipped. The module runs on any device, so it also
serves where Triton does not (float64 on a GPU), though there it waits for the device.
"""

import math

import torch

from .chunk import GUARDS, ROW_BY_ROW, UNGUARDED, Chunk, Terms
from .closed_forms import CLOSED_FORMS
from .outputs import RowOutputs
from .rows import (
    CHUNK_ELEMENTS,
    GENERAL_ELEMENTS,
    N_BUFFERS,
    ChosenRows,
    PerRow,
    kept_groups,
    rows_in_chunk,
)


class _Pass:
    """One call of :func:`dense`: what serves all its chunks, and the rows' sums so far."""

    def __init__(self, terms, n_rows, n_cols, device, per_row: PerRow, inplace, outputs):
        self.terms, self.n_rows, self.n_cols, self.inplace = terms, n_rows, n_cols, inplace
        self.per_row, self.outputs = per_row, outputs
        name = None if terms.divergence is None else terms.divergence.name
        self.form = CLOSED_FORMS.get(name)
        # below temperature 1 the division may overflow, which takes more care than theirs
        self.has_guards = self.form is not None and terms.temperature >= 1 and not terms.propagate
        kind = {"dtype": terms.dtype, "device": device}
        elements = CHUNK_ELEMENTS if name is None or self.form else GENERAL_ELEMENTS
        threads = torch.get_num_threads()
        self.size = rows_in_chunk(n_rows, n_cols, terms.dtype.itemsize, threads, elements)
        self.buffers = tuple(torch.empty(self.size, n_cols, **kind) for _ in range(N_BUFFERS))
        self.sums = [None, None]  # divergence and cross-entropy
        self.chosen: ChosenRows | None = None  # of the teacher's rows; None: in order

    def zeros(self) -> torch.Tensor:
        buffer = self.buffers[0]
        return torch.zeros(self.n_rows, dtype=buffer.dtype, device=buffer.device)

    def store(self, i: int, places, losses: torch.Tensor) -> None:
        """Rows' losses; those of all rows at once, as of any small call, are not copied."""
        if isinstance(places, slice) and losses.shape[0] == self.n_rows:
            self.sums[i] = losses
            return
        if self.sums[i] is None:
            self.sums[i] = self.zeros()
        self.sums[i][places] = losses

    def rows(self, group, places, n, guards) -> int:
        """Losses and gradient of ``n`` rows whose places in the call are a slice or a tensor; returns
        the guards that it took."""
        buffers = self.buffers if n == self.size else tuple(b[:n] for b in self.buffers)
        outputs = None if self.outputs is None else self.outputs.at(places)
        chunk = Chunk(self.terms, *group[:2], *self.per_row.at(places), buffers, guards, outputs)
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
        hard_losses = chunk.finish(write, group[2], self.inplace)
        if hard_losses is not None:
            self.store(1, places, hard_losses)
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
        if self.chosen is not None:
            group = [group[0], self.chosen.at(places), *group[2:]]
        guards = self.rows(group, places, n, guards)
        if copied and block[2] is not None:
            block[2][rows, : self.n_cols] = group[2]
        return guards


def dense(
    terms: Terms,
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor | None,  # [..., V]
    per_row: PerRow,
    weights: torch.Tensor | None,  # [N]; None: every row counts
    n_cols: int,
    gradient: torch.Tensor | None,  # like student, or the student itself: overwritten
    outputs: RowOutputs | None = None,
    teacher_rows: torch.Tensor | None = None,  # [N]: the teacher's row of each; None: in order
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Per-row divergence and cross-entropy ``[N]``, unweighted; fills ``gradient`` and the ``outputs`` of
    rows that count."""
    n_rows = student.numel() // student.shape[-1]
    run = _Pass(terms, n_rows, n_cols, student.device, per_row, gradient is student, outputs)
    keep = None if weights is None else weights != 0
    if terms.divergence is None:  # whose rows may be another number
        teacher = None
    if teacher is not None and teacher_rows is not None:
        run.chosen = ChosenRows(teacher[..., :n_cols], teacher_rows, run.size)
        teacher = None
    groups = kept_groups(
        keep, student, teacher, gradient=gradient, size=run.size, copies=not run.inplace
    )
    guards = UNGUARDED
    for block, rows, places in groups:
        guards = run.group(block, rows, places, guards)  # infinities here: in the next, too
    if gradient is not None and n_cols < gradient.shape[-1]:
        gradient[..., n_cols:] = 0
    wanted = terms.divergence is not None, terms.hard
    return tuple(  # None is left where no row was kept
        run.zeros() if asked and losses is None else losses
        for asked, losses in zip(wanted, run.sums, strict=True)
    )
