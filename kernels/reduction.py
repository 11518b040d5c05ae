"""Kernels over tokens: their weights, the loss's total, and the incoming gradient's factor.

One program each, summing in a fixed order: the same bits run after run, no float atomics.
"""

import torch
import triton
import triton.language as tl

from .launch import LOAD_BYTES, reduction_block
from .math import from_float32


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def weights_kernel(
    mask_ptr, labels_ptr, weights_ptr, total_ptr, n_rows, ignore_index,
    HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens' weights and their sum, 1 where no token is kept."""
    total = tl.zeros([BLOCK], tl.float32)
    n_kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < n_rows
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_MASK:
            weight = tl.load(mask_ptr + row, mask=inside, other=0).to(tl.float32)
        if HAS_LABELS:
            label = tl.load(labels_ptr + row, mask=inside, other=0)
            weight = tl.where(label == ignore_index, 0.0, weight)
        weight = tl.where(inside, weight, 0.0)
        tl.store(weights_ptr + row, weight, mask=inside)
        total += weight
        n_kept += (weight != 0.0).to(tl.int32)
    tl.store(total_ptr, tl.where(tl.sum(n_kept) == 0, 1.0, tl.sum(total)))


@triton.jit(do_not_specialize=["n_rows", "denominator"])
def total_kernel(
    losses_ptr, components_ptr, loss_ptr, totals_ptr, weights_ptr, denominator, n_rows,
    HAS_WEIGHTS: tl.constexpr, DENOMINATOR_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over the denominator: program 0 of the losses, 1 and 2 of their components."""
    part = tl.program_id(0)
    source = losses_ptr
    target = loss_ptr
    if part > 0:
        source = components_ptr + (part - 1).to(tl.int64) * n_rows
        target = totals_ptr + (part - 1)
    total = tl.zeros([BLOCK], tl.float32)
    n_kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < n_rows
        total += tl.load(source + row, mask=inside, other=0.0)
        if HAS_WEIGHTS:
            n_kept += (tl.load(weights_ptr + row, mask=inside, other=0.0) != 0.0).to(tl.int32)
    loss = tl.sum(total)
    over = tl.load(denominator).to(tl.float32) if DENOMINATOR_IN_MEMORY else denominator
    loss = tl.fdiv(loss, over)
    if HAS_WEIGHTS:  # no token kept: 0, whatever the denominator
        loss = tl.where(tl.sum(n_kept) == 0, 0.0, loss)
    tl.store(target, loss)


@triton.jit
def scale_at(pointers, upstream, inside):
    """``gradient *= upstream`` at these places, rounded once."""
    scaled = tl.load(pointers, mask=inside).to(tl.float32) * upstream
    tl.store(pointers, from_float32(scaled, pointers.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_elements"])
def scale_kernel(
    gradient_ptr, upstream_ptr, n_elements,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``gradient *= upstream`` in place; where upstream is 1 memory is left alone.

    Blocks of ``[VECTORS, WIDTH]`` whole vectors, so that accesses are 16 bytes wide whatever the
    length; the fewer than WIDTH elements behind them are the last program's."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream != 1.0:
        n_vectors = tl.cast(n_elements, tl.int64) // WIDTH
        lane = tl.arange(0, VECTORS)
        for block in range(tl.program_id(0), tl.cdiv(n_vectors, VECTORS), tl.num_programs(0)):
            vector = tl.cast(block, tl.int64) * VECTORS + lane
            position = vector[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            scale_at(gradient_ptr + position, upstream, (vector < n_vectors)[:, None])
        if tl.program_id(0) == tl.num_programs(0) - 1:
            position = n_vectors * WIDTH + lane
            scale_at(gradient_ptr + position, upstream, position < n_elements)


def token_weights(
    loss_mask: torch.Tensor | None,  # [N] bool, int or float
    labels: torch.Tensor | None,  # [N] int64
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[N]`` float32 and their sum ``[]``, 1 where no token is kept."""
    given = labels if loss_mask is None else loss_mask
    if loss_mask is not None and loss_mask.dtype == torch.bool:
        loss_mask = loss_mask.view(torch.uint8)
    weights = torch.empty(given.shape, dtype=torch.float32, device=given.device)
    total = torch.empty((), dtype=torch.float32, device=given.device)
    n_rows = given.numel()
    weights_kernel[(1,)](
        mask_ptr=weights if loss_mask is None else loss_mask,
        labels_ptr=weights if labels is None else labels,
        weights_ptr=weights,
        total_ptr=total,
        n_rows=n_rows,
        ignore_index=ignore_index,
        HAS_MASK=loss_mask is not None,
        HAS_LABELS=labels is not None,
        BLOCK=reduction_block(n_rows),
        num_warps=8,
    )
    return weights, total


def total(
    losses: torch.Tensor,  # [N]
    components: torch.Tensor,  # [2, N], or [0]
    weights: torch.Tensor | None,  # [N]
    denominator: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums ``[]`` and ``[2]`` (or ``[0]``) over the denominator; 0 where no token is kept."""
    n_components = components.shape[0]
    loss = losses.new_empty(())
    totals = losses.new_empty(n_components)
    total_kernel[(1 + n_components,)](
        losses_ptr=losses,
        components_ptr=components,
        loss_ptr=loss,
        totals_ptr=totals,
        weights_ptr=losses if weights is None else weights,
        denominator=denominator,
        n_rows=losses.numel(),
        HAS_WEIGHTS=weights is not None,
        DENOMINATOR_IN_MEMORY=isinstance(denominator, torch.Tensor),
        BLOCK=reduction_block(losses.numel()),
        num_warps=8,
    )
    return loss, totals


def scale_(gradient: torch.Tensor, upstream: torch.Tensor) -> None:
    """``gradient *= upstream`` for a contiguous gradient and a 0-d upstream, read on the device."""
    n_elements = gradient.numel()
    width = LOAD_BYTES // gradient.element_size()
    vectors = 512  # two 16-byte loads a thread
    n_programs = min(triton.cdiv(n_elements, vectors * width), 1024)  # a few a multiprocessor
    if n_programs:
        scale_kernel[(n_programs,)](
            gradient, upstream, n_elements, VECTORS=vectors, WIDTH=width, num_warps=8
        )
