"""A row's log-probability and entropy at a token, and their gradient.

With ``x`` a logit, ``m`` the row's maximum, ``y = (x - m) / T`` and ``l = sum(exp(y))``, the token's
log-probability is ``y_id - log(l)`` and the entropy ``H = log(l) - sum(exp(y) * y) / l``, in which no
two terms cancel: one sweep. Their gradient (``docs/tokens.md``) is ``exp(y_j) * (a + b * y_j)`` with
numbers ``a`` and ``b`` of the row, but at the token itself, which is written over it.

There is one form of each loop, for every row: taking the maximum from a logit costs one instruction
more than folding it into the scale does, and neither -inf nor the lowest float needs a guard then.
"""

import triton
import triton.language as tl

from .math import INFINITY, LN2, LOG2E, from_float32
from .running import LOWEST, NOWHERE, combine_lanes, first_maximum, move_moment, rescale
from .sweeps import UNROLL, UP, UP_FIRST, read, sweep, write


@triton.jit
def token_tile(
    state, k, position, inside, row, c,
    MASKED: tl.constexpr, KEEP: tl.constexpr, ENTROPY: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    m, l, moment, top = state
    x = read(row, position, inside, MASKED, KEEP)
    if TOP:
        top = first_maximum(m, top, x, position)
    m, factor, shift, y = rescale(m, l, x, c, True)
    e = tl.exp2(y)
    if ENTROPY:
        moment = move_moment(moment, l, factor, shift, e, y)
    return m, l * factor + tl.sum(e, axis=1), moment, top


@triton.jit
def token_sweep(
    row, lead, n_cols, c, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    KEEP: tl.constexpr, ENTROPY: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """A row's maximum, sum of exponentials, entropy in nats (ENTROPY), and the position of the
    first of its maxima (TOP; NOWHERE without a finite logit)."""
    zero = tl.zeros([LANES], tl.float32)
    low = tl.full([LANES], -INFINITY, tl.float32)
    lanes_m, lanes_l, moment, top = sweep(
        (low, zero, zero, tl.full([LANES], NOWHERE, tl.int32)), token_tile, (row, c),
        (KEEP, ENTROPY, TOP), lead, n_cols, LANES, WIDTH, ENDS, UP_FIRST, UNROLL,
    )  # fmt: skip
    m, l, factor, shift = combine_lanes(lanes_m, lanes_l, c, True)
    top = tl.min(tl.where(lanes_m == m, top, NOWHERE), axis=0)
    entropy = 0.0
    if ENTROPY:
        moment = tl.sum(factor * (moment + lanes_l * tl.maximum(shift, LOWEST)), axis=0)
        entropy = tl.log(l) - tl.fdiv(moment, l) * LN2
    return m, l, entropy, top


@triton.jit
def token_log_prob(x, m, l, over_t):
    """Of a logit of the row."""
    return (x.to(tl.float32) - m) * over_t - tl.log(l)


@triton.jit
def token_coefficients(l, entropy, over_t, upstream, upstream_entropy):
    """``a`` and ``b`` of the gradient ``exp2(y) * (a + b * y)``, for ``y`` in base 2."""
    over = tl.fdiv(over_t, l)
    surprise = entropy - tl.log(l)
    return -(upstream + upstream_entropy * surprise) * over, -upstream_entropy * over * LN2


@triton.jit
def token_gradient_tile(x, m, c, a, b, ENTROPY: tl.constexpr):
    """Gradient of a tile of logits, but for the token's own ``upstream / T``."""
    y = (x - m) * c
    e = tl.exp2(y)
    if ENTROPY:
        return e * (tl.maximum(y, LOWEST) * b + a)
    else:
        return e * a


@triton.jit
def write_token_tile(
    state, k, position, inside, row, gradient_row, m, c, a, b, MASKED: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    x = read(row, position, inside, MASKED, False)
    write(gradient_row, position, token_gradient_tile(x, m, c, a, b, ENTROPY), inside, MASKED)
    return state


@triton.jit
def token_gradient(
    row, gradient_row, lead, n_cols, token_id, m, l, entropy, over_t, upstream, upstream_entropy,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient, which may be over its logits."""
    c = over_t * LOG2E
    a, b = token_coefficients(l, entropy, over_t, upstream, upstream_entropy)
    known = (token_id >= 0) & (token_id < n_cols)
    logit = tl.load(row + lead + token_id, mask=known, other=float("nan")).to(tl.float32)
    own = token_gradient_tile(logit, m, c, a, b, ENTROPY) + upstream * over_t
    tl.debug_barrier()  # every thread has read the logit before one overwrites it
    sweep(
        tl.cast(0.0, tl.float32), write_token_tile, (row, gradient_row, m, c, a, b), (ENTROPY,), lead, n_cols,
        LANES, WIDTH, ENDS, UP, UNROLL,
    )  # fmt: skip
    tl.debug_barrier()  # the token's own entry goes over what another thread wrote there
    own = from_float32(own, gradient_row.dtype.element_ty)
    tl.store(gradient_row + lead + token_id, own, mask=known)
