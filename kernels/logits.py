"""What a language-model head does to logits after its matrix product, in place or on the way to
another dtype: bias, scale and softcap in one read and one write, and the softcap's derivative.

    logits   = softcap(product + bias * scale)    softcap(x) = c tanh(x / c)
    gradient = gradient * (1 - (logits / c)**2)

The product comes scaled. Rows are a multiple of 8 elements apart, and the columns between are the
buffers' own: a program works on whole vectors, and on the same columns of many rows, whose bias it
reads once.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .layout import ALIGNMENT
from .math import from_float32, tanh, to_float32
from .rows import device_facts

VECTOR = tl.constexpr(ALIGNMENT)


@triton.jit
def row_position(row, stride, columns):
    """Element offsets of a row's columns; the stride is a multiple of 8, which the compiler cannot
    know."""
    return tl.cast(row, tl.int64) * (stride // 8 * 8) + columns


@triton.jit
def program_columns(n_cols, LANES: tl.constexpr):
    """The program's columns ``[LANES, 8]``, and which of its vectors begin within a row."""
    vectors = tl.program_id(0) * LANES + tl.arange(0, LANES)
    columns = vectors[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return columns, (vectors < tl.cdiv(n_cols, VECTOR))[:, None]


@triton.jit(do_not_specialize=["n_rows", "n_cols", "product_stride", "logits_stride", "scale", "softcap"])  # fmt: skip
def finish_kernel(
    product_ptr, product_stride, logits_ptr, logits_stride, bias_ptr, n_rows, n_cols, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits from scaled products."""
    columns, inside = program_columns(n_cols, LANES)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < n_cols, other=0.0).to(tl.float32) * scale
    over = 1.0 / softcap
    for row in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        x = tl.load(product_ptr + row_position(row, product_stride, columns), mask=inside)
        x = to_float32(x) + bias
        if HAS_SOFTCAP:
            x = tanh(x * over) * softcap
        x = from_float32(x, logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + row_position(row, logits_stride, columns), x, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "gradient_stride", "logits_stride", "over"])
def softcap_gradient_kernel(
    gradient_ptr, gradient_stride, logits_ptr, logits_stride, n_rows, n_cols, over,
    LANES: tl.constexpr,
):  # fmt: skip
    """The gradient before the softcap from the one after it."""
    columns, inside = program_columns(n_cols, LANES)
    for row in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        position = row_position(row, gradient_stride, columns)
        gradient = to_float32(tl.load(gradient_ptr + position, mask=inside))
        logits = tl.load(logits_ptr + row_position(row, logits_stride, columns), mask=inside)
        share = to_float32(logits) * over
        gradient = gradient * (1.0 - share * share)
        gradient = from_float32(gradient, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + position, gradient, mask=inside)


def _launch(kernel, matrices: dict[str, torch.Tensor], **arguments) -> None:
    """Launch either kernel on matrices ``[n, V]``, by its names for them."""
    first = next(iter(matrices.values()))
    n_rows, n_cols = first.shape
    if first.numel() == 0:
        return
    for name, matrix in matrices.items():
        stride = matrix.stride(0)
        if stride % ALIGNMENT or matrix.storage_offset() % ALIGNMENT or matrix.stride(1) != 1:
            raise ValueError(f"rows must begin at multiples of {ALIGNMENT} elements, got {stride}")
        arguments |= {f"{name}_ptr": matrix, f"{name}_stride": stride}
    choice = launch.head_launch(n_rows, n_cols, device_facts(first.device))
    arguments |= {"LANES": choice.lanes, "num_warps": choice.num_warps}
    kernel[choice.grid](n_rows=n_rows, n_cols=n_cols, **arguments)


def finish(
    product: torch.Tensor,  # [n, V], scaled; rows padded to whole vectors
    logits: torch.Tensor,  # the same, or the product itself
    bias: torch.Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
) -> None:
    """``logits = softcap(product + bias * scale)``."""
    _launch(
        finish_kernel,
        {"product": product, "logits": logits},
        bias_ptr=product if bias is None else bias,
        scale=float(scale),
        softcap=1.0 if softcap is None else float(softcap),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
    )


def softcap_gradient_(
    gradient: torch.Tensor,  # [n, V], rows padded to whole vectors
    logits: torch.Tensor,  # [n, V], likewise
    softcap: float,
) -> None:
    """``gradient *= 1 - (logits / softcap)**2``."""
    matrices = {"gradient": gradient, "logits": logits}
    _launch(softcap_gradient_kernel, matrices, over=1.0 / float(softcap))
