"""Sweeps over the columns of a row outside a set of K, the teacher's tokens (``topk.py``).

Which columns the K are stands in a bitmap, one bit a position of the row, a region of it a program:
``mark`` sets a row's bits, ``unmark`` clears them. A sweep reads a byte for 8 columns and takes the
marked ones as -inf; that is two instructions an element, and no search.

There is one form of each loop, for every row: the maximum is taken from a logit before the scale, so
that neither -inf nor the lowest float needs a guard. NaN and +inf leave sums that are NaN.
"""

import triton
import triton.language as tl

from .math import INFINITY, LOG2E, fma
from .outputs import STUDENT_ARGMAX, STUDENT_ENTROPY
from .running import (
    LOWEST,
    NOWHERE,
    combine_lanes,
    finite_or_zero,
    first_maximum,
    move_moment,
    rescale,
)
from .sweeps import DOWN, UP, UP_FIRST, read, sweep, write
from .terms import column_terms


@triton.jit
def clear(words, n_words, LANES: tl.constexpr):
    """Zero a program's region of the bitmap, whatever it holds."""
    for start in range(0, n_words, LANES):
        word = start + tl.arange(0, LANES)
        tl.store(words + word, tl.zeros([LANES], tl.int32), mask=word < n_words)


@triton.jit
def mark(words, position, used):
    """Set the bits of these positions; several may share a word."""
    tl.debug_barrier()  # the row before has been unmarked
    bit = (tl.zeros_like(position) + 1) << (position & 31)
    tl.atomic_or(words + (position >> 5), bit, mask=used)
    tl.debug_barrier()


@triton.jit
def unmark(words, position, used):
    tl.debug_barrier()  # every thread has read the row's bits
    tl.store(words + (position >> 5), tl.zeros_like(position), mask=used)


@triton.jit
def read_outside(
    student_row, bitmap, k, position, inside, LANES: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile ``k`` of logits, which will be read once more; -inf where marked."""
    x = read(student_row, position, inside, MASKED, True)
    first = k * (LANES * WIDTH) + tl.arange(0, LANES)[:, None] * WIDTH
    bits = tl.load(bitmap + (first >> 3)).to(tl.int32) >> (first & 7)
    mask = tl.full([1, WIDTH], 1, tl.int32) << tl.arange(0, WIDTH)[None, :]
    return tl.where((bits & mask) != 0, -INFINITY, x)


@triton.jit
def sum_tile(
    state, k, position, inside, student_row, bitmap, c, MASKED: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, REST: tl.constexpr, OWN_HARD: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    old_m, l, l_h, moment, top = state
    x = read_outside(student_row, bitmap, k, position, inside, LANES, WIDTH, MASKED)
    if STUDENT_ARGMAX & OUTPUTS:
        top = first_maximum(old_m, top, x, position)
    m, factor, shift, y = rescale(old_m, l, x, c, True)
    if REST:
        e = tl.exp2(y)
        if STUDENT_ENTROPY & OUTPUTS:
            moment = move_moment(moment, l, factor, shift, e, y)
        l = l * factor + tl.sum(e, axis=1)
    if OWN_HARD:
        safe_m = finite_or_zero(m)
        l_h = l_h * tl.exp2((old_m - safe_m) * LOG2E)
        l_h += tl.sum(tl.exp2((x - safe_m[:, None]) * LOG2E), axis=1)
    return m, l, l_h, moment, top


@triton.jit
def sum_outside(
    student_row, bitmap, lead, n_cols, c, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    REST: tl.constexpr, OWN_HARD: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Maximum of the columns outside, 0 where none is finite; their sums of exponentials relative to
    it, at the loss's temperature (REST) and at temperature 1 (OWN_HARD), 0 where there is none; and for
    OUTPUTS the entropy's moment and the place of the maximum."""
    zero = tl.zeros([LANES], tl.float32)
    nowhere = tl.full([LANES], NOWHERE, tl.int32)
    lanes_m, lanes_l, l_h, moment, top = sweep(
        (tl.full([LANES], -INFINITY, tl.float32), zero, zero, zero, nowhere), sum_tile,
        (student_row, bitmap, c), (LANES, WIDTH, REST, OWN_HARD, OUTPUTS), lead, n_cols, LANES, WIDTH, ENDS,
        UP_FIRST, UNROLL,
    )  # fmt: skip
    m, l, factor, shift = combine_lanes(lanes_m, lanes_l, c, True)
    moment = tl.sum(factor * (moment + lanes_l * tl.maximum(shift, LOWEST)), axis=0)
    top = tl.min(tl.where(lanes_m == m, top, NOWHERE), axis=0)
    if OWN_HARD:
        l_h = tl.sum(l_h * tl.exp2((lanes_m - m) * LOG2E), axis=0)
    else:
        l_h = 0.0
    return m, l, l_h, moment, top


@triton.jit
def terms_tile(
    sums, k, position, inside, student_row, bitmap, row, parameters, MASKED: tl.constexpr,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, DROP: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    loss, total_slope = sums
    x = read_outside(student_row, bitmap, k, position, inside, LANES, WIDTH, MASKED)
    value, slope, _ = column_terms(
        x, tl.full([LANES, WIDTH], -INFINITY, tl.float32), inside, row, parameters,
        VALUE_AND_SLOPE, OPERANDS, False, MASKED, True, DROP, False, False,
    )  # fmt: skip
    return loss + tl.sum(value, axis=1), total_slope + tl.sum(slope, axis=1)


@triton.jit
def terms_outside(
    student_row, bitmap, lead, n_cols, row, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, DROP: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Sums of value and slope of the columns outside, p being 0 there: of a divergence that must see
    each of them."""
    zero = tl.zeros([LANES], tl.float32)
    sums = sweep(
        (zero, zero), terms_tile, (student_row, bitmap, row, parameters),
        (VALUE_AND_SLOPE, OPERANDS, DROP, LANES, WIDTH), lead, n_cols, LANES, WIDTH, ENDS, DOWN, 1,
    )  # fmt: skip
    return tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0)


@triton.jit
def spread_tile(
    state, k, position, inside, student_row, gradient_row, c, factors, row, scales, parameters,
    MASKED: tl.constexpr, VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, DROP: tl.constexpr,
    SHARED: tl.constexpr, EACH: tl.constexpr, HARD: tl.constexpr, OWN_HARD: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    m, factor, m_h, hard_factor = factors
    if SHARED or EACH or OWN_HARD:
        x = read(student_row, position, inside, MASKED, False)
    if EACH:
        scale, hard_scale, total_slope, label_position = scales
        _, slope, q = column_terms(
            x, tl.full([LANES, WIDTH], -INFINITY, tl.float32), inside, row, parameters,
            VALUE_AND_SLOPE, OPERANDS, True, MASKED, True, DROP, False, False,
        )  # fmt: skip
        gradient = fma(q, -total_slope, slope) * scale + factor
        if HARD:
            if not OWN_HARD:
                gradient += q * hard_scale
            gradient -= tl.where(position == label_position, hard_scale, 0.0)
    elif SHARED:
        gradient = tl.exp2((x - m) * c) * factor
    else:
        gradient = tl.zeros([LANES, WIDTH], tl.float32) + factor
    if OWN_HARD:
        gradient += tl.exp2((x - m_h) * LOG2E) * hard_factor
    write(gradient_row, position, gradient, inside, MASKED)
    return state


@triton.jit
def spread(
    student_row, gradient_row, lead, n_cols, c, factors, row, scales, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, DROP: tl.constexpr, SHARED: tl.constexpr,
    EACH: tl.constexpr, HARD: tl.constexpr, OWN_HARD: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, ENDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient as if no column were marked, walking against the sweep before: what it
    is there comes over it.

    ``factors`` are ``(m, factor, m_h, hard_factor)``. SHARED: the gradient is the exponential
    relative to m, times the factor. EACH: a column's own terms make it, plus the factor. Neither:
    the factor alone. OWN_HARD adds the exponential at temperature 1, times its factor."""
    sweep(
        tl.cast(0.0, tl.float32), spread_tile, (student_row, gradient_row, c, factors, row, scales, parameters),
        (VALUE_AND_SLOPE, OPERANDS, DROP, SHARED, EACH, HARD, OWN_HARD, LANES, WIDTH), lead, n_cols,
        # of a divergence that sees each column the sweep before walked downward
        LANES, WIDTH, ENDS, UP if EACH else DOWN, 1 if EACH else UNROLL,
    )  # fmt: skip
