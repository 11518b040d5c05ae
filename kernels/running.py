"""Numbers that run along a sweep, a lane each: a maximum and what is kept relative to it."""

import triton
import triton.language as tl

from .math import INFINITY, fma, rounded_product

NOWHERE = tl.constexpr(2147483647)  # the position of no column
LOWEST = tl.constexpr(-1e30)  # start of a running maximum: finite, so that no inf - inf appears


@triton.jit
def first_maximum(m, top, x, position):
    """Where each lane's maximum is, having been ``m`` at ``top`` before the tile ``x``: the first of
    equals, in whatever order the tiles come."""
    tile_m = tl.max(x, axis=1)
    found = tl.min(tl.where(x == tile_m[:, None], position, NOWHERE), axis=1)
    return tl.where(tile_m > m, found, tl.where(tile_m == m, tl.minimum(found, top), top))


@triton.jit
def move_moment(moment, l, factor, shift, e, y):
    """``sum(e y)`` of an entropy along a running maximum, which moved by ``shift``; no 0 * inf where a
    logit, or the maximum so far, is -inf."""
    moved = factor * (moment + l * tl.maximum(shift, LOWEST))
    return moved + tl.sum(e * tl.maximum(y, LOWEST), axis=1)


@triton.jit
def finite_or_zero(m):
    """A maximum to subtract: 0 where no logit is finite."""
    return tl.where(m == -INFINITY, 0.0, m)


@triton.jit
def rescale(m, l, x, c, GUARDED: tl.constexpr):
    """Move a running (maximum, sum) to cover the tile ``x``.

    Returns the new maximum, the old sum's factor, the base-2 shift and the tile's exponents."""
    new_m = tl.maximum(m, tl.max(x, axis=1))
    if GUARDED:
        safe_m = finite_or_zero(new_m)
        shift = (m - safe_m) * c
        y = (x - safe_m[:, None]) * c
    else:
        scaled = rounded_product(new_m, c)
        shift = rounded_product(m, c) - scaled
        y = fma(x, c, -scaled[:, None])
    return new_m, tl.exp2(shift), shift, y


@triton.jit
def combine_lanes(m, l, c, GUARDED: tl.constexpr):
    """The lanes' (maximum, sum) as the row's, and each lane's factor and base-2 shift."""
    row_m = tl.max(m, axis=0)
    if GUARDED:
        row_m = finite_or_zero(row_m)
        shift = (m - row_m) * c
    else:
        shift = rounded_product(m, c) - rounded_product(row_m, c)
    factor = tl.exp2(shift)
    return row_m, tl.sum(l * factor, axis=0), factor, shift
