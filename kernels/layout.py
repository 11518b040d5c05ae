"""Rows of a tensor with any leading dimensions, as the kernels address them."""

import math
from typing import NamedTuple

import torch

ALIGNMENT = 8  # elements: 16 bytes in half precision, and a multiple of them in single


class RowLayout(NamedTuple):
    """``base[start + (row // n_inner) * outer + (row % n_inner) * inner + column]``."""

    base: torch.Tensor
    start: int
    outer: int
    inner: int

    def offsets(self) -> tuple[int, int, int]:
        return self[1:]

    def arguments(self, name: str) -> dict[str, torch.Tensor | int]:
        """As a kernel takes them, for its tensor of this name."""
        parts = ("ptr", "start", "outer", "inner")
        return {f"{name}_{part}": value for part, value in zip(parts, self, strict=True)}

    def is_in(self, tensor: torch.Tensor) -> bool:
        """Whether the rows lie in this tensor's memory, and are no copy."""
        return self.base.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def aligned(self) -> bool:
        """Every row begins at a multiple of 16 bytes."""
        return all(x % ALIGNMENT == 0 for x in self.offsets())

    def matches(self, other: "RowLayout") -> bool:
        """Every row is as far from such a multiple as the other tensor's."""
        pairs = zip(self.offsets(), other.offsets(), strict=True)
        return all((a - b) % ALIGNMENT == 0 for a, b in pairs)

    def matches_at_any_row(self, other: "RowLayout") -> bool:
        """Likewise, of whichever row beside whichever: both are as far from it in all rows."""
        strides = self.outer, self.inner, other.outer, other.inner
        return all(x % ALIGNMENT == 0 for x in (*strides, self.start - other.start))


def single_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride of these dimensions taken as one, or None."""
    dims = [(n, stride) for n, stride in zip(shape, strides, strict=True) if n != 1]
    for (_, left), (n, right) in zip(dims, dims[1:], strict=False):
        if left != n * right:
            return None
    return dims[-1][1] if dims else 0


def _based(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Memory that begins at a boundary, and the place of the tensor's first element in it."""
    start = tensor.storage_offset() % ALIGNMENT
    if start == 0:
        return tensor, 0
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - start), start


def uniform_rows(tensor: torch.Tensor, n_inner: int) -> RowLayout:
    """The rows of a tensor ``[..., V]`` whose rows lie one stride apart, ``n_inner`` to an outer
    step."""
    base, start = _based(tensor)
    stride = tensor.stride(-2) if tensor.dim() > 1 else tensor.shape[-1]
    return RowLayout(base, start, n_inner * stride, stride)


def row_layouts(*tensors: torch.Tensor) -> tuple[int, list[RowLayout]]:
    """``n_inner`` and the rows of each tensor ``[..., V]``; leading shapes are equal.

    Leading dimensions are taken as two where one stride does not reach all rows (a shifted view
    ``logits[:, :-1]``). A tensor that needs three, or whose columns are not contiguous, is copied.
    """
    leading = tensors[0].shape[:-1]
    if 0 in leading:  # no row is addressed
        return 1, [RowLayout(t, 0, 0, 0) for t in tensors]
    tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]

    def split_at(t, k):
        outer = single_stride(leading[:k], t.stride()[:k])
        inner = single_stride(leading[k:], t.stride()[k:-1])
        return None if outer is None or inner is None else (outer, inner)

    splits = range(len(leading) + 1)
    split = next((k for k in splits if all(split_at(t, k) for t in tensors)), None)
    if split is None:
        return row_layouts(*(t.contiguous() for t in tensors))
    layouts = []
    for t in tensors:
        base, start = _based(t)
        layouts.append(RowLayout(base, start, *split_at(t, split)))
    return max(1, math.prod(leading[split:])), layouts
