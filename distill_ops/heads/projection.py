"""A language-model head: its logits a few rows at a time, and the gradients of hidden states and weight."""

from typing import NamedTuple

import torch

from ..problem import HeadOptions
from .products import (
    has_product,
    multiply,
    on_gpu,
    product_dtype,
    row_stride,
    rows_buffer,
    sum_dtype,
)
from .ranks import Ranks

# Entries of a half-precision weight that the CPU upcasts at a time: 2 MiB in float32. Twice that is
# as fast at 32000 rows and 5% faster at 151936, but the heap then holds up to 12 MiB more at the peak.
UPCAST_ENTRIES = 1 << 19


class Head(NamedTuple):
    """``logits = softcap((hidden weight^T + bias) * logit_scale)``, softcap c being
    ``c tanh(x / c)``."""

    hidden: torch.Tensor  # [n, d]
    weight: torch.Tensor  # [V, d]
    bias: torch.Tensor | None  # [V]
    logit_scale: float
    softcap: float | None


class Selection(NamedTuple):
    """Which tokens are computed, and which of those have hidden states that must not be read."""

    n_rows: int
    index: torch.Tensor | None  # [n_rows] int64; None: all tokens
    unread: torch.Tensor | None  # [n_rows] bool; None: none of them


class Projection:
    """The products of a head: logits from hidden states, and the gradients from the logits'.

    ``dtype`` is that of the operands. The weight is cast where it has another: on a CPU a slice of
    the vocabulary at a time, on a GPU once, as autocast does. ``ranks``, if any, split the vocabulary;
    memory is planned for ``widest`` columns, the same on all of them.
    """

    def __init__(
        self, head: Head, selection: Selection, n_cols: int, dtype: torch.dtype, triton,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        self.head, self.selection, self.n_cols, self.dtype = head, selection, n_cols, dtype
        self.triton = triton  # whether the elementwise work is Triton's
        self.ranks, self.widest = ranks, n_cols if ranks is None else ranks.widest
        self.device = head.hidden.device
        self.weight = head.weight[:n_cols]
        self.bias = None if head.bias is None else head.bias[:n_cols].contiguous()
        self.upcast = self.scratch = None
        if self.weight.dtype != dtype:
            if on_gpu(self.device) or n_cols == 0:
                self.weight = self.weight.to(dtype)
            else:
                dim = self.weight.shape[1]
                self.upcast = self.weight.new_empty(
                    (min(n_cols, max(1, UPCAST_ENTRIES // dim)), dim), dtype=dtype
                )

    @classmethod
    def of(
        cls, hidden, weight, bias, options: HeadOptions, selection: Selection, n_cols: int,
        wide: bool, autocast: torch.dtype | None, triton: bool, ranks: Ranks | None = None,
    ) -> "Projection":  # fmt: skip
        """Of hidden states ``[..., d]``; ``wide``: an input of the call is float64."""
        head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, *options)
        dtype = product_dtype(head.hidden, weight, wide, autocast)
        return cls(head, selection, n_cols, dtype, triton, ranks)

    def slices(self):
        """Columns of the logits with their part of the weight."""
        if self.upcast is None:
            yield slice(0, self.n_cols), self.weight
            return
        size = self.upcast.shape[0]
        for first in range(0, self.n_cols, size):
            part = self.weight[first : first + size]
            yield slice(first, first + len(part)), self.upcast[: len(part)].copy_(part)

    def hidden(self, rows: slice) -> torch.Tensor:
        """Hidden states ``[c, d]`` of selected tokens, as an operand; 0 where they are unread."""
        index, unread = self.selection.index, self.selection.unread
        hidden = self.head.hidden
        hidden = hidden[rows] if index is None else hidden.index_select(0, index[rows])
        hidden = hidden.to(self.dtype)
        return hidden if unread is None else hidden.masked_fill(unread[rows, None], 0.0)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states, written to ``out`` ``[c, n_cols]``."""
        product = out
        if not has_product(out.dtype, self.dtype, self.device):
            if self.scratch is None:  # the first is the largest
                self.scratch = rows_buffer(*out.shape, torch.float32, self.device, self.triton)
            product = self.scratch[: len(out)]
        for columns, weight in self.slices():
            multiply(product[:, columns], hidden, weight.t(), self.head.logit_scale)
        self._finish(product, out)
        return out

    def _finish(self, product: torch.Tensor, out: torch.Tensor) -> None:
        scale, softcap = self.head.logit_scale, self.head.softcap
        if self.triton and (self.bias is not None or softcap is not None):
            from .. import gpu

            gpu.finish_logits(product, out, self.bias, scale, softcap)
            return
        if self.bias is not None:
            product.add_(self.bias.to(product.dtype), alpha=scale)
        if softcap is not None:
            product.div_(softcap).tanh_().mul_(softcap)
        if product is not out:
            out.copy_(product)

    def through_softcap_(self, gradient: torch.Tensor, logits: torch.Tensor) -> None:
        """Make the logits' gradient that of their products, but for ``logit_scale``, which the two
        products that follow take in. The logits are lost."""
        softcap = self.head.softcap
        if softcap is None:
            return
        if self.triton:
            from .. import gpu

            gpu.softcap_gradient_(gradient, logits, softcap)
        else:
            # logits in a dtype without a product are still where their product was
            wide = logits if self.scratch is None else self.scratch[: len(logits)]
            gradient.addcmul_(gradient, wide.div_(softcap).square_(), value=-1.0)

    def hidden_gradient(self, gradient: torch.Tensor, rows: slice, out: torch.Tensor) -> None:
        """Write the gradients of the hidden states of a block to their places in ``out`` [n, d]."""
        index, unread = self.selection.index, self.selection.unread
        direct = index is None and self.upcast is None
        direct = direct and has_product(out.dtype, self.dtype, self.device)
        if direct:
            target = out[rows]
        else:
            target = out.new_empty((len(gradient), out.shape[1]), dtype=self.dtype)
        for columns, weight in self.slices():
            add = columns.start > 0
            multiply(target, gradient[:, columns], weight, self.head.logit_scale, add)
        if unread is not None:  # exactly 0, also where the weight is not finite
            target.masked_fill_(unread[rows, None], 0.0)
        if index is not None:
            out.index_copy_(0, index[rows], target.to(out.dtype))
        elif not direct:
            out[rows] = target


class WeightGradient:
    """``sum over blocks of gradient^T hidden``, in the weight's dtype in the end.

    Several blocks are summed in float32, or in the products' float64, and cast once."""

    def __init__(self, projection: Projection, several: bool):
        head, self.n_cols = projection.head, projection.n_cols
        self.alpha, self.started = head.logit_scale, False
        self.out = head.weight.new_empty(head.weight.shape)
        self.out[self.n_cols :] = 0
        self.sum = self.out[: self.n_cols]
        wide = sum_dtype(projection.dtype)
        if several and self.sum.dtype != wide:
            self.sum = self.sum.new_empty(self.sum.shape, dtype=wide)
        self.direct = has_product(self.sum.dtype, projection.dtype, projection.device)

    def add(self, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        if self.direct:
            multiply(self.sum, gradient.t(), hidden, self.alpha, add=self.started)
        else:  # one block, whose product comes in another dtype: a slice of the vocabulary at a time
            size = max(1, UPCAST_ENTRIES // hidden.shape[1])
            for first in range(0, self.n_cols, size):
                part = self.sum[first : first + size]
                product = part.new_empty(part.shape, dtype=hidden.dtype)
                multiply(product, gradient[:, first : first + size].t(), hidden, self.alpha)
                part.copy_(product)
        self.started = True

    def result(self) -> torch.Tensor:
        target = self.out[: self.n_cols]
        if not self.started:
            target.zero_()
        elif self.sum.dtype != target.dtype:
            target.copy_(self.sum)
        return self.out


def logits_bytes(projection: Projection, logits_dtype: torch.dtype) -> int:
    """What a row of a head's logits takes beside another's: its buffers and its hidden state."""
    n_bytes = logits_dtype.itemsize
    if not has_product(logits_dtype, projection.dtype, projection.device):
        n_bytes += torch.float32.itemsize
    stride = row_stride(projection.widest, projection.triton)
    return stride * n_bytes + projection.head.hidden.shape[1] * projection.dtype.itemsize
