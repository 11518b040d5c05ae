"""Matrix products of a head: their dtypes, and how they are called."""

import torch

HALF = (torch.bfloat16, torch.float16)


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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which products of this dtype are summed over several blocks."""
    return torch.promote_types(dtype, torch.float32)


def rows_buffer(
    n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device, padded: bool
) -> torch.Tensor:
    """A matrix whose rows, where ``padded``, begin at multiples of 16 bytes."""
    return torch.empty(n_rows, row_stride(n_cols, padded), dtype=dtype, device=device)[:, :n_cols]


def row_stride(n_cols: int, padded: bool) -> int:
    return -(-n_cols // 8) * 8 if padded else n_cols
