"""The numbers of all parts of rows against a top-k teacher as the rows' losses and what their gradient needs:
one launch between two collectives, over ``[N]`` numbers alone, as ``combine.py`` for whole teachers. The
parts are added in the order of the ranks, as ``distill_ops/vocab_parallel/topk.py`` does.
"""

import torch
import triton
import triton.language as tl

from .combine import BLOCK, NUM_WARPS, distance, largest, number_of
from .rows import RUN_TIME, Formula
from .topk_part import STATISTICS
from .topk_phases import ALL_NUMBERS, SUMS


@triton.jit
def moved_sum(
    parts_ptr, i, m, rows, n_rows, n_parts, over_t, inside, N_NUMBERS: tl.constexpr,
    WITHOUT_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts' sums ``i + 1`` as relative to the largest of their maxima ``i``; WITHOUT_FIRST: each is
    without the 1 of its maximum, and so is the row's."""
    total = tl.zeros([BLOCK], tl.float32)
    seen = rows < 0
    for part in range(n_parts):
        part_m = number_of(parts_ptr, part, i, rows, n_rows, inside, N_NUMBERS)
        factor = tl.exp(distance(part_m, m, over_t))
        total += number_of(parts_ptr, part, i + 1, rows, n_rows, inside, N_NUMBERS) * factor
        if WITHOUT_FIRST:
            first = (part_m == m) & (seen == 0)
            seen = seen | first
            total += tl.where(first, 0.0, factor)
    return total


@triton.jit(do_not_specialize=[*RUN_TIME, "n_parts"])
def topk_combine_kernel(
    parts_ptr, used_ptr, sums_ptr, weights_ptr, denominator, kept_ptr, losses_ptr, components_ptr, n_rows,
    n_parts, over_t, divergence_scale, soft_weight, hard_weight,
    HARD: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    DENOMINATOR_IN_MEMORY: tl.constexpr, N_NUMBERS: tl.constexpr, N_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The kept numbers of ``n_rows`` rows, of ``n_parts`` parts' numbers ``[n_parts, N_NUMBERS, n_rows]`` (in
    the place of how many slots are used, whether there are columns outside) and that number ``used``; and
    with HAS_SUMS, of the parts' sums ``[n_parts, N_SUMS, n_rows]``, weighted losses and their components.
    NaN of a row with an id that no part has."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    zero = tl.zeros([BLOCK], tl.float32)
    m_r = largest(parts_ptr, 0, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
    l_r = moved_sum(
        parts_ptr, 0, m_r, rows, n_rows, n_parts, over_t, inside, N_NUMBERS, False, BLOCK
    )
    m_k = largest(parts_ptr, 2, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
    more = moved_sum(
        parts_ptr, 2, m_k, rows, n_rows, n_parts, over_t, inside, N_NUMBERS, True, BLOCK
    )
    outside = largest(parts_ptr, 5, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
    m_h = zero
    l_h = zero
    logit = zero
    if HARD:
        m_h = largest(parts_ptr, 6, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
        l_h = moved_sum(
            parts_ptr, 6, m_h, rows, n_rows, n_parts, 1.0, inside, N_NUMBERS, False, BLOCK
        )
        logit = largest(parts_ptr, 8, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
    found = zero
    labels_found = zero
    loss = zero
    slope = tl.zeros([BLOCK], tl.float64)
    for part in range(n_parts):
        found += number_of(parts_ptr, part, 4, rows, n_rows, inside, N_NUMBERS)
        if HARD:
            labels_found += number_of(parts_ptr, part, 9, rows, n_rows, inside, N_NUMBERS)
        if HAS_SUMS:
            loss += number_of(sums_ptr, part, 0, rows, n_rows, inside, N_SUMS)
            slope += number_of(sums_ptr, part, 1, rows, n_rows, inside, N_SUMS).to(tl.float64)
            slope += number_of(sums_ptr, part, 2, rows, n_rows, inside, N_SUMS).to(tl.float64)

    weight = zero + 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    over = tl.load(denominator).to(tl.float32) if DENOMINATOR_IN_MEMORY else denominator
    counts = weight != 0.0
    scale = tl.where(counts, tl.fdiv(weight, zero + over), 0.0)
    if HAS_SUMS:
        missing = found != tl.load(used_ptr + rows, mask=inside, other=0.0)
        loss = tl.where(missing, float("nan"), loss)
        slope = tl.where(missing, float("nan"), slope)
        loss = tl.where(counts, loss * (weight * divergence_scale), 0.0)
        mixed = soft_weight * loss
        if HARD:
            hard_loss = tl.where(labels_found == 1.0, tl.log(l_h) + (m_h - logit), float("nan"))
            hard_loss = tl.where(counts, hard_loss * weight, 0.0)
            mixed += hard_weight * hard_loss
            tl.store(components_ptr + rows, loss, mask=inside)
            tl.store(components_ptr + n_rows + rows, hard_loss, mask=inside)
        tl.store(losses_ptr + rows, mixed, mask=inside)
    rounded = slope.to(tl.float32)
    left = (slope - rounded.to(tl.float64)).to(tl.float32)
    numbers = (m_k, more, m_r, l_r, rounded, m_h, l_h, outside, scale, left)
    kept = kept_ptr + tl.cast(rows, tl.int64) * STATISTICS
    for i in tl.static_range(STATISTICS):
        tl.store(kept + i, numbers[i], mask=inside)


def run(
    formula: Formula,
    parts: torch.Tensor,  # [P, NUMBERS or ALL_NUMBERS, N]
    used: torch.Tensor,  # [N]
    sums: torch.Tensor | None,  # [P, SUMS, N]
    weights: torch.Tensor | None,  # [N]
    denominator: torch.Tensor | float,
    *,
    kept: torch.Tensor,  # [N, KEPT]
    losses: torch.Tensor | None = None,  # [N]: with sums
    components: torch.Tensor | None = None,  # [2, N]: with sums and a hard label
) -> None:
    """Launch the kernel: what is kept of the rows and, with the sums, their weighted losses."""
    n_parts, n_numbers, n_rows = parts.shape
    if n_rows == 0:
        return
    of_losses = (x if x is not None and len(x) else kept for x in (losses, components))
    topk_combine_kernel[(triton.cdiv(n_rows, BLOCK),)](
        parts, used, parts if sums is None else sums, parts if weights is None else weights, denominator,
        kept, *of_losses, n_rows, n_parts, 1.0 / formula.temperature, float(formula.divergence_scale),
        float(formula.soft_weight), float(formula.hard_label_weight),
        HARD=n_numbers == ALL_NUMBERS,
        HAS_SUMS=sums is not None,
        HAS_WEIGHTS=weights is not None,
        DENOMINATOR_IN_MEMORY=isinstance(denominator, torch.Tensor),
        N_NUMBERS=n_numbers,
        N_SUMS=SUMS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
