"""The statistics of all parts of rows as the rows' losses and what their gradient needs: one launch between
two collectives, over ``[N]`` numbers alone. The parts are added in the order of the ranks, as
``distill_ops/row_statistics.py`` does, whose formulas these are."""

import torch
import triton
import triton.language as tl

from . import launch
from .math import INFINITY, LOG2E
from .phases import ALL_NUMBERS, SUMS
from .rows import RUN_TIME, Formula
from .running import finite_or_zero
from .sweeps import FORWARD_MOMENT, MOMENTS, NO_MOMENT, REVERSE_MOMENT, SOFT_MOMENT
from .terms import excess, log_quotient

STATISTICS = tl.constexpr(launch.STATISTICS)
FARTHEST = tl.constexpr(-8e37)  # a distance: a difference of two, and sums of such, stay finite
BLOCK, NUM_WARPS = 128, 4  # one row a thread, so that few rows fill more than one multiprocessor


@triton.jit
def number_of(parts_ptr, part, i, rows, n_rows, inside, N_NUMBERS: tl.constexpr):
    """A number of some rows in a part."""
    offset = tl.cast(part * N_NUMBERS + i, tl.int64) * n_rows
    return tl.load(parts_ptr + offset + rows, mask=inside, other=0.0)


@triton.jit
def distance(m, row_m, over_t):
    """Of a part's maximum from the row's: at most 0, finite of a part without a finite logit."""
    return tl.maximum((m - finite_or_zero(row_m)) * over_t, FARTHEST)


@triton.jit
def largest(
    parts_ptr, i, rows, n_rows, n_parts, inside, N_NUMBERS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of the parts' numbers ``i``."""
    found = tl.full([BLOCK], -INFINITY, tl.float32)
    for part in range(n_parts):
        found = tl.maximum(found, number_of(parts_ptr, part, i, rows, n_rows, inside, N_NUMBERS))
    return found


@triton.jit
def sum_for_loops(m, l, c, fast):
    """A row's maximum and sum as the loops take them: those without guards subtract ``m * c`` as it is
    rounded."""
    m = finite_or_zero(m)
    return m, tl.where(fast > 0.0, l * tl.exp2(excess(m, c)), l)


@triton.jit(do_not_specialize=[*RUN_TIME, "n_parts"])
def combine_kernel(
    parts_ptr, sums_ptr, weights_ptr, denominator, kept_ptr, losses_ptr, components_ptr, n_rows, n_parts,
    over_t, divergence_scale, soft_weight, hard_weight,
    MOMENT: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, DENOMINATOR_IN_MEMORY: tl.constexpr, N_NUMBERS: tl.constexpr,
    N_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighted losses, their components and the kept numbers of ``n_rows`` rows, of ``n_parts`` parts' numbers
    ``[n_parts, N_NUMBERS, n_rows]`` and with HAS_SUMS their sums ``[n_parts, N_SUMS, n_rows]``. Without either
    closed moments or sums, L and D are 0: what is kept serves ``reduce``."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    zero = tl.zeros([BLOCK], tl.float32)
    none = tl.full([BLOCK], -INFINITY, tl.float32)
    m_s, m_t, m_h, logit = none, none, none, none
    l_s, l_t, l_h, kept_sum, moment_t, moment_s, found = zero, zero, zero, zero, zero, zero, zero
    fast = zero + 1.0
    loss = zero
    slope = zero
    if DIVERGENCE:
        m_s = largest(parts_ptr, 0, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
        m_t = largest(parts_ptr, 2, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
    if HARD:
        m_h = largest(parts_ptr, 8, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
        logit = largest(parts_ptr, 10, rows, n_rows, n_parts, inside, N_NUMBERS, BLOCK)
    for part in range(n_parts):
        fast = tl.minimum(fast, number_of(parts_ptr, part, 7, rows, n_rows, inside, N_NUMBERS))
        if DIVERGENCE:
            d_s = distance(
                number_of(parts_ptr, part, 0, rows, n_rows, inside, N_NUMBERS), m_s, over_t
            )
            d_t = distance(
                number_of(parts_ptr, part, 2, rows, n_rows, inside, N_NUMBERS), m_t, over_t
            )
            factor_s = tl.exp(d_s)
            factor_t = tl.exp(d_t)
            part_l_s = number_of(parts_ptr, part, 1, rows, n_rows, inside, N_NUMBERS)
            part_kept = number_of(parts_ptr, part, 4, rows, n_rows, inside, N_NUMBERS)
            if MOMENT != NO_MOMENT:
                shift = d_s if MOMENT == SOFT_MOMENT else d_s - d_t
                if MOMENT != REVERSE_MOMENT:
                    moment = number_of(parts_ptr, part, 5, rows, n_rows, inside, N_NUMBERS)
                    moment_t += moment * factor_t + part_kept * factor_t * shift
                if MOMENT == REVERSE_MOMENT:
                    moment = number_of(parts_ptr, part, 6, rows, n_rows, inside, N_NUMBERS)
                    moment_s += moment * factor_s + part_l_s * factor_s * shift
            l_s += part_l_s * factor_s
            l_t += number_of(parts_ptr, part, 3, rows, n_rows, inside, N_NUMBERS) * factor_t
            kept_sum += part_kept * factor_t
        if HARD:
            d_h = distance(number_of(parts_ptr, part, 8, rows, n_rows, inside, N_NUMBERS), m_h, 1.0)
            l_h += number_of(parts_ptr, part, 9, rows, n_rows, inside, N_NUMBERS) * tl.exp(d_h)
            found += number_of(parts_ptr, part, 11, rows, n_rows, inside, N_NUMBERS)
        if HAS_SUMS:
            loss += number_of(sums_ptr, part, 0, rows, n_rows, inside, N_SUMS)
            slope += number_of(sums_ptr, part, 1, rows, n_rows, inside, N_SUMS)
            fast = tl.minimum(fast, number_of(sums_ptr, part, 2, rows, n_rows, inside, N_SUMS))

    if DIVERGENCE and (HAS_SUMS or MOMENT != NO_MOMENT):
        if not HAS_SUMS:
            share = tl.fdiv(kept_sum, l_t)
            if MOMENT == SOFT_MOMENT:
                loss = share * tl.log(l_s) - tl.fdiv(moment_t, l_t)
                slope = -share
            elif MOMENT == FORWARD_MOMENT:
                loss = share * log_quotient(l_s, l_t) - tl.fdiv(moment_t, l_t)
                slope = -share
            elif MOMENT == REVERSE_MOMENT:
                loss = tl.fdiv(moment_s, l_s) - log_quotient(l_s, l_t)
                slope = loss + 1.0
        alive = (l_s > 0.0) & (l_t > 0.0)  # not where a sum is NaN
        loss = tl.where(alive, loss, float("nan"))
        slope = tl.where(alive, slope, float("nan"))
    hard_loss = zero
    if HARD:
        hard_loss = tl.where(found == 1.0, tl.log(l_h) + (m_h - logit), float("nan"))

    weight = zero + 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    over = tl.load(denominator).to(tl.float32) if DENOMINATOR_IN_MEMORY else denominator
    counts = weight != 0.0
    loss = tl.where(counts, loss * (weight * divergence_scale), 0.0)
    hard_loss = tl.where(counts, hard_loss * weight, 0.0)
    mixed = zero
    if DIVERGENCE:
        mixed += soft_weight * loss
    if HARD:
        mixed += hard_weight * hard_loss
        tl.store(components_ptr + rows, loss, mask=inside)
        tl.store(components_ptr + n_rows + rows, hard_loss, mask=inside)
    tl.store(losses_ptr + rows, mixed, mask=inside)

    c = over_t * LOG2E
    m_s, l_s = sum_for_loops(m_s, l_s, c, fast)
    m_t, l_t = sum_for_loops(m_t, l_t, c, fast)
    m_h, l_h = sum_for_loops(m_h, l_h, tl.cast(LOG2E, tl.float32), fast)
    scale = tl.where(counts, tl.fdiv(weight, zero + over), 0.0)
    numbers = (m_s, l_s, m_t, l_t, slope, m_h, l_h, fast, scale)
    kept = kept_ptr + tl.cast(rows, tl.int64) * STATISTICS
    for i in tl.static_range(STATISTICS):
        tl.store(kept + i, numbers[i], mask=inside)


def run(
    formula: Formula,
    parts: torch.Tensor,  # [P, 8 or 12, N]
    sums: torch.Tensor | None,  # [P, SUMS, N]
    weights: torch.Tensor | None,  # [N]
    denominator: torch.Tensor | float,
    *,
    kept: torch.Tensor,  # [N, STATISTICS]
    losses: torch.Tensor,  # [N]
    components: torch.Tensor,  # [2, N], or [0, N] without a hard label
) -> None:
    """Launch the kernel: weighted losses and what is kept of the rows, from gathered parts."""
    n_parts, n_numbers, n_rows = parts.shape
    if n_rows == 0:
        return
    # the symmetric moments alone are not accurate enough, so that its sums are added
    moment = "none" if formula.moment == "symmetric" else formula.moment
    combine_kernel[(triton.cdiv(n_rows, BLOCK),)](
        parts, parts if sums is None else sums, parts if weights is None else weights, denominator, kept,
        losses, components if formula.hard_label_weight != 0 else losses, n_rows, n_parts,
        1.0 / formula.temperature, float(formula.divergence_scale), float(formula.soft_weight),
        float(formula.hard_label_weight),
        MOMENT=MOMENTS[moment],
        DIVERGENCE=formula.value_and_slope is not None,
        HARD=n_numbers == ALL_NUMBERS,
        HAS_SUMS=sums is not None,
        HAS_WEIGHTS=weights is not None,
        DENOMINATOR_IN_MEMORY=isinstance(denominator, torch.Tensor),
        N_NUMBERS=n_numbers,
        N_SUMS=SUMS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
