"""Losses of a language-model head's logits, which are formed a block of tokens at a time.

This engine knows of no particular loss: a function that is handed some rows of logits computes
their losses and writes the gradient of the total with respect to them. From it come the gradients
of hidden states, weight and bias, in two more matrix products.

A block of tokens holds the gradient of its logits, in the dtype of the products; within it the
logits themselves are formed for fewer rows at a time. Where logits and gradient have one dtype and
no softcap's derivative needs the logits afterwards, they share their memory. All buffers together
take at most ``memory_budget`` bytes; the sum of the weight's gradient over several blocks, where it has
a wider dtype than the weight (``products.sum_dtype``), is on top (``blocks.split``).

Where ranks split the vocabulary (``projection.ranks``) all rows of a block are under work at once, so that
a loss's collectives run once a block, and the blocks are those of the rank with most columns. In the end
the ranks sum the gradient of the hidden states.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..problem import Wanted
from .blocks import CPU_BUDGET, GPU_BUDGET, Blocks, split
from .products import has_product, on_gpu, row_stride, rows_buffer, sum_dtype
from .projection import Projection, WeightGradient


class Gradients(NamedTuple):
    hidden: torch.Tensor | None  # [n, d]
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def of(self, hidden: torch.Tensor) -> "Gradients":
        """For hidden states ``[..., d]``."""
        of_hidden = None if self.hidden is None else self.hidden.view(hidden.shape)
        return self._replace(hidden=of_hidden)


# (logits [c, V], their rows among the selected, gradient [c, V] to write or None; it may be logits)
RowLoss = Callable[[torch.Tensor, slice, torch.Tensor | None], None]


class Engine:
    """One head's losses and gradients over blocks of tokens.

    Args:
        projection: of the head.
        logits_dtype: in which the row loss gets the logits.
        wanted: which gradients; none of them: the row loss gets no gradient to write.
        memory_budget: bytes, None for the default.
        other_row_bytes: what the row loss holds itself for a row under work.
        kept_bytes: what it would hold in place of these from the first row to the last; ``keeps`` says
            whether it may: they are at most half of the budget.
    """

    def __init__(
        self,
        projection: Projection,
        logits_dtype: torch.dtype,
        wanted: Wanted,
        memory_budget: int | None,
        other_row_bytes: int,
        kept_bytes: int | None = None,
    ):
        self.projection, self.logits_dtype, self.wanted = projection, logits_dtype, wanted
        head, dtype = projection.head, projection.dtype
        stride = row_stride(projection.widest, projection.triton)
        dim = head.hidden.shape[1]
        self.shared = any(wanted) and logits_dtype == dtype and head.softcap is None
        token_bytes = dim * dtype.itemsize
        if any(wanted):  # the gradient of the logits, and that of a hidden state on its way
            token_bytes += stride * dtype.itemsize + dim * dtype.itemsize
        row_bytes = other_row_bytes
        if not self.shared:
            row_bytes += stride * logits_dtype.itemsize
        if not has_product(logits_dtype, dtype, projection.device):
            row_bytes += stride * torch.float32.itemsize
        spare = 0
        wide = sum_dtype(dtype)
        if wanted.weight and head.weight.dtype != wide:
            spare = projection.widest * dim * wide.itemsize
        gpu = on_gpu(projection.device)
        budget = memory_budget or (GPU_BUDGET if gpu else CPU_BUDGET)
        self.keeps = False
        if kept_bytes is not None:
            least = token_bytes + row_bytes - other_row_bytes
            self.keeps = kept_bytes <= min(budget // 2, budget - least)
        if self.keeps:
            budget, row_bytes = budget - kept_bytes, row_bytes - other_row_bytes
        self.blocks = split(
            projection.selection.n_rows, token_bytes, max(row_bytes, 1), budget, spare, gpu=gpu,
            pieces=head.weight.dtype == dtype,  # else each would upcast the weight again
            whole=projection.ranks is not None,
        )  # fmt: skip
        if not any(wanted):
            self.blocks = Blocks(self.blocks.rows, self.blocks.rows)

    def buffer(self, n_rows: int, dtype: torch.dtype) -> torch.Tensor:
        projection = self.projection
        return rows_buffer(n_rows, projection.n_cols, dtype, projection.device, projection.triton)

    def run(self, row_loss: RowLoss) -> Gradients:
        """Call ``row_loss`` on all selected rows; returns the gradients that are wanted."""
        projection, blocks = self.projection, self.blocks
        head, n_rows = projection.head, projection.selection.n_rows
        student = held = None
        if any(self.wanted):
            held = self.buffer(min(blocks.tokens, n_rows), projection.dtype)
        if not self.shared:
            student = self.buffer(min(blocks.rows, n_rows), self.logits_dtype)
        of_hidden = of_weight = of_bias = None
        if self.wanted.hidden:
            whole = projection.selection.index is None
            new = head.hidden.new_empty if whole else head.hidden.new_zeros
            of_hidden = new(head.hidden.shape)
        if self.wanted.weight:
            of_weight = WeightGradient(projection, n_rows > blocks.tokens)
        if self.wanted.bias:
            wide = torch.promote_types(projection.dtype, torch.float32)
            of_bias = head.bias.new_zeros(head.bias.shape, dtype=wide)
        for first in range(0, n_rows, blocks.tokens):
            block = slice(first, min(first + blocks.tokens, n_rows))
            hidden = projection.hidden(block)
            gradient = None if held is None else held[: len(hidden)]
            for start in range(0, len(hidden), blocks.rows):
                rows = slice(start, min(start + blocks.rows, len(hidden)))
                part = None if gradient is None else gradient[rows]
                logits = part if self.shared else student[: rows.stop - rows.start]
                projection.logits(hidden[rows], logits)
                row_loss(logits, slice(first + start, first + rows.stop), part)
                if part is not None:
                    projection.through_softcap_(part, logits)
            if of_hidden is not None:
                projection.hidden_gradient(gradient, block, of_hidden)
            if of_weight is not None:
                of_weight.add(gradient, hidden)
            if of_bias is not None:
                of_bias[: projection.n_cols] += gradient.sum(0, dtype=of_bias.dtype)
        del student, held
        if of_hidden is not None and projection.ranks is not None:
            of_hidden = projection.ranks.summed(of_hidden)
        if of_bias is not None:
            of_bias = (of_bias * head.logit_scale).to(head.bias.dtype)
        return Gradients(of_hidden, None if of_weight is None else of_weight.result(), of_bias)
