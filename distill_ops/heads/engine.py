"""Losses of a language-model head's logits, which are formed a block of tokens at a time.

This engine knows of no particular loss: a function that is handed some rows of logits computes
their losses and writes the gradient of the total with respect to them. From it come the gradients
of hidden states, weight and bias, in two more matrix products.

A block of tokens holds the gradient of its logits, in the dtype of the products; within it the
logits themselves are formed for fewer rows at a time. Where logits and gradient have one dtype and
no softcap's derivative needs the logits afterwards, they share their memory. All buffers together
take at most ``memory_budget`` bytes; the sum of the weight's gradient over several blocks, where it has
a wider dtype than the weight (:func:`sum_dtype`), is on top (:func:`split`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

HALF = (torch.bfloat16, torch.float16)

# A block of 64 MiB is 262 tokens of 32000 columns in float32, student and teacher: enough that
# reading the weight, and adding to its gradient, are small beside the products (they are V d entries
# a block, the products V d times the tokens). Larger ones were no faster on two quiet cores.
CPU_BUDGET = 64 << 20
GPU_BUDGET = 1 << 30

# Rows of a product below which reading the weight takes more of an H100's time than multiplying by it:
# 240 of bf16; twice that, so that the products stay bound by the tensor cores.
EFFICIENT_ROWS = 512

# Rows from which a product on a CPU is as fast as one of more; the teacher's logits of as many are
# read back from a nearer cache, and take less memory.
PIECE_ROWS = 128

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


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Wanted(False, False, False)


class Gradients(NamedTuple):
    hidden: torch.Tensor | None  # [n, d]
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def outputs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As an operator returns them, for hidden states ``[..., d]``: empty where not wanted."""
        of_hidden = None if self.hidden is None else self.hidden.view(hidden.shape)
        return tuple(hidden.new_empty(0) if x is None else x for x in (of_hidden, *self[1:]))


def gradient_fakes(tensors: tuple[torch.Tensor | None, ...], wanted: Wanted):
    """The outputs of the gradients of hidden states, weight and bias, for tracing."""
    return tuple(
        x.new_empty(x.shape) if want else tensors[0].new_empty(0)
        for x, want in zip(tensors, wanted, strict=True)
    )


class Selection(NamedTuple):
    """Which tokens are computed, and which of those have hidden states that must not be read."""

    n_rows: int
    index: torch.Tensor | None  # [n_rows] int64; None: all tokens
    unread: torch.Tensor | None  # [n_rows] bool; None: none of them


class Blocks(NamedTuple):
    """Tokens of a block, and rows within it whose logits are formed at once."""

    tokens: int
    rows: int


# (logits [c, V], their rows among the selected, gradient [c, V] to write or None; it may be logits)
RowLoss = Callable[[torch.Tensor, slice, torch.Tensor | None], None]


def _whole(n: int) -> int:
    """``n`` rows rounded down to whole tiles of a product, and to aligned per-row arrays."""
    return next((n // unit * unit for unit in (128, 8) if n >= unit), n)


def split(
    n_rows: int, token_bytes: int, row_bytes: int, budget: int, spare: int = 0, *, gpu: bool,
    pieces: bool = False,
) -> Blocks:  # fmt: skip
    """Blocks that ``budget`` bytes hold.

    Args:
        token_bytes: a token of a block: the gradient of its logits and what its products take.
        row_bytes: a row under work: logits of student and teacher; in all ``n_rows``.
        spare: bytes that a single block of all tokens would save, being the weight gradient's
            accumulator. Where that block takes no more than both it is the choice.
        gpu: rows under work are then an eighth of the budget, but EFFICIENT_ROWS where half of it
            holds them; the rest is the block, because every block reads and writes the weight's
            gradient once. On a CPU the two are one, or with ``pieces`` some PIECE_ROWS are under work.

    Raises:
        ValueError: not even one token fits.
    """
    smallest = token_bytes + row_bytes
    if budget < smallest:
        raise ValueError(
            f"memory_budget={budget} is too small: the logits of one token and their gradient take "
            f"{smallest} bytes"
        )
    n_rows = max(n_rows, 1)
    if not gpu:
        together = n_rows if n_rows * smallest <= budget + spare else budget // smallest
        tokens = _balanced(n_rows, together, 1)
        return Blocks(tokens, -(-tokens // max(1, tokens // PIECE_ROWS)) if pieces else tokens)
    rows = max(budget // 8 // row_bytes, min(EFFICIENT_ROWS, budget // 2 // row_bytes), 1)
    rows = _whole(min(rows, n_rows))
    if n_rows * token_bytes + rows * row_bytes <= budget + spare:
        return Blocks(n_rows, rows)
    tokens = _whole((budget - rows * row_bytes) // token_bytes)
    tokens = _balanced(n_rows, tokens, 128 if tokens >= 128 else 1)
    return Blocks(tokens, min(rows, tokens))


def _balanced(n_rows: int, most: int, unit: int) -> int:
    """Tokens a block: as few blocks as ``most`` allows, of about equal size, in whole units."""
    even = -(-n_rows // -(-n_rows // most))
    return min(most, -(-even // unit) * unit)


def on_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def product_dtype(
    hidden: torch.Tensor, weight: torch.Tensor, wide: bool, autocast: torch.dtype | None
) -> torch.dtype:
    """Of the operands of a head's matrix products: on a CPU, whose half-precision products are slow
    and round their results, float32."""
    if wide:
        return torch.float64
    if not on_gpu(hidden.device):
        return torch.float32
    return autocast or torch.promote_types(hidden.dtype, weight.dtype)


def has_product(out: torch.dtype, operands: torch.dtype, device: torch.device) -> bool:
    """Whether a product of such operands comes in the dtype ``out``."""
    wider = out == torch.float32 and operands in HALF and on_gpu(device)
    return out == operands or wider


def multiply(out, a, b, alpha: float = 1.0, add: bool = False) -> None:
    """``out = alpha a b``, or ``out += alpha a b``; half-precision operands may sum in float32."""
    dtypes = () if out.dtype == a.dtype else (out.dtype,)
    if add or alpha != 1:
        torch.addmm(out, a, b, *dtypes, beta=int(add), alpha=alpha, out=out)
    else:
        torch.mm(a, b, *dtypes, out=out)


class Projection:
    """The products of a head: logits from hidden states, and the gradients from the logits'.

    ``dtype`` is that of the operands. The weight is cast where it has another: on a CPU a slice of
    the vocabulary at a time, on a GPU once, as autocast does.
    """

    def __init__(self, head: Head, selection: Selection, n_cols: int, dtype: torch.dtype, triton):
        self.head, self.selection, self.n_cols, self.dtype = head, selection, n_cols, dtype
        self.triton = triton  # whether the elementwise work is Triton's
        self.device = head.hidden.device
        self.weight = head.weight[:n_cols]
        self.bias = None if head.bias is None else head.bias[:n_cols].contiguous()
        self.upcast = self.scratch = None
        if self.weight.dtype != dtype:
            if on_gpu(self.device):
                self.weight = self.weight.to(dtype)
            else:
                dim = self.weight.shape[1]
                self.upcast = self.weight.new_empty(
                    (min(n_cols, max(1, UPCAST_ENTRIES // dim)), dim), dtype=dtype
                )

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
            from .kernels import head as kernel

            kernel.finish(product, out, self.bias, scale, softcap)
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
            from .kernels import head as kernel

            kernel.softcap_gradient_(gradient, logits, softcap)
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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which products of this dtype are summed over several blocks."""
    return torch.promote_types(dtype, torch.float32)


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


def rows_buffer(
    n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device, padded: bool
) -> torch.Tensor:
    """A matrix whose rows, where ``padded``, begin at multiples of 16 bytes."""
    return torch.empty(n_rows, row_stride(n_cols, padded), dtype=dtype, device=device)[:, :n_cols]


def row_stride(n_cols: int, padded: bool) -> int:
    return -(-n_cols // 8) * 8 if padded else n_cols


class Engine:
    """One head's losses and gradients over blocks of tokens.

    Args:
        projection: of the head.
        logits_dtype: in which the row loss gets the logits.
        wanted: which gradients; none of them: the row loss gets no gradient to write.
        memory_budget: bytes, None for the default.
        other_row_bytes: what the row loss holds itself for a row under work.
    """

    def __init__(
        self,
        projection: Projection,
        logits_dtype: torch.dtype,
        wanted: Wanted,
        memory_budget: int | None,
        other_row_bytes: int,
    ):
        self.projection, self.logits_dtype, self.wanted = projection, logits_dtype, wanted
        head, dtype = projection.head, projection.dtype
        stride = row_stride(projection.n_cols, projection.triton)
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
            spare = projection.n_cols * dim * wide.itemsize
        gpu = on_gpu(projection.device)
        self.blocks = split(
            projection.selection.n_rows, token_bytes, max(row_bytes, 1),
            memory_budget or (GPU_BUDGET if gpu else CPU_BUDGET), spare, gpu=gpu,
            pieces=head.weight.dtype == dtype,  # else each would upcast the weight again
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
        if of_bias is not None:
            of_bias = (of_bias * head.logit_scale).to(head.bias.dtype)
        return Gradients(of_hidden, None if of_weight is None else of_weight.result(), of_bias)


def logits_bytes(projection: Projection, logits_dtype: torch.dtype) -> int:
    """What a row of a head's logits takes beside another's: its buffers and its hidden state."""
    n_bytes = logits_dtype.itemsize
    if not has_product(logits_dtype, projection.dtype, projection.device):
        n_bytes += torch.float32.itemsize
    stride = row_stride(projection.n_cols, projection.triton)
    return stride * n_bytes + projection.head.hidden.shape[1] * projection.dtype.itemsize
