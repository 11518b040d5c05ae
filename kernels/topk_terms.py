"""The terms of a top-k row's outcomes, a vector of lanes: the K slots, then the rest. What is asked for
beside ``terms.py``'s: a rest without a term, a floor of log-probabilities, the masses of a KL. And which
slots repeat an id.
"""

import triton
import triton.language as tl

from .math import INFINITY, LOG2E
from .terms import column_terms, log_quotient

# The divergence whose masses are added, ``factor * (q - p)``: factor 1, -1, or by its weight between
NO_MASSES, FORWARD, REVERSE, SYMMETRIC = map(tl.constexpr, range(4))
MASSES = {"forward": 1, "reverse": 2, "symmetric": 3}  # by Formula.moment

SERIES_BELOW = tl.constexpr(0.35)  # of a logarithm of a ratio


@triton.jit
def without_repeats(used, zero, token_id, log_probs, ids, lane, k):
    """The used slots without those of log-probability -inf (``zero``) whose id stands in a slot above
    -inf, or in an earlier one: of each id one remains, whatever the threads' order."""
    for i in range(k):
        after = tl.where(tl.load(log_probs + i).to(tl.float32) == -INFINITY, i, -1)
        used = used & ((zero & (lane > after) & (token_id == tl.load(ids + i))) == 0)
    return used


@triton.jit
def floored(y_s, y_t, l_s, l_t, floor):
    """Exponents of both, none of a logarithm below the floor but where both probabilities are 0; and
    where the student's was."""
    zero = (y_s == -INFINITY) & (y_t == -INFINITY)
    lowest, lowest_t = floor + tl.log(l_s), floor + tl.log(l_t)
    below = (y_s < lowest) & (zero == 0)
    y_t = tl.where((y_t < lowest_t) & (zero == 0), lowest_t, y_t)
    return tl.where(below, lowest, y_s), y_t, below


@triton.jit
def generalised_kl(d, of_reverse):
    """``(1 - w) (p d - (p - q)) + w (q (-d) + (p - q))`` over q for ``d = log(p / q)``: the series of what
    two terms of first order in d leave, up to d**7; the next term is 7e-7 of the sum at 0.35."""
    forward = 1 / 2 + d * (1 / 3 + d * (1 / 8 + d * (1 / 30 + d * (1 / 144 + d * (1 / 840)))))
    reverse = 1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040)))))
    return d * d * (forward + of_reverse * (reverse - forward))


@triton.jit
def outcome_terms(
    y_s, y_t, l_s, l_t, lane, k, log_prob_floor, row_values, VALUE_AND_SLOPE: tl.constexpr,
    OPERANDS: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr, LEFT_OUT: tl.constexpr,
    MASSES: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Value, slope and student probability of outcomes whose probabilities are ``exp(y_s) / l_s`` and
    ``exp(y_t) / l_t``. LEFT_OUT: the rest, lane k, has a probability alone.

    A student that is restricted (RESTRICT) comes so; of a left out rest p is 0 and q is not."""
    one = tl.cast(1.0, tl.float32)
    own_y = y_s
    if HAS_FLOOR:
        y_s, y_t, below = floored(y_s, y_t, l_s, l_t, log_prob_floor)
    value, slope, q = column_terms(
        y_s, y_t, lane <= k, (one * 0.0, l_s, one * 0.0, l_t, one), row_values, VALUE_AND_SLOPE,
        OPERANDS, False, False, True, DROP, RESTRICT and not LEFT_OUT, False,
    )  # fmt: skip
    if MASSES:
        dead = (y_s == -INFINITY) & (y_t == -INFINITY)
        if DROP:
            dead = y_s == -INFINITY
        difference = tl.exp2(y_t * LOG2E) * tl.fdiv(1.0, l_t) - q  # p - q
        factor = one
        of_reverse = 0.0
        if MASSES == REVERSE:
            factor = -one
            of_reverse = 1.0
        elif MASSES == SYMMETRIC:
            of_reverse = row_values[0]
            factor = 1.0 - 2.0 * of_reverse
        value -= tl.where(dead, 0.0, factor * difference)
        d = (y_t - y_s) + log_quotient(l_s, l_t)
        near = (tl.abs(d) < SERIES_BELOW) & (dead == 0)
        value = tl.where(near, q * generalised_kl(tl.where(near, d, 0.0), of_reverse), value)
        slope += tl.where(dead, 0.0, factor * q)
    if HAS_FLOOR:
        slope = tl.where(below, 0.0, slope)
        q = tl.where(below, tl.exp2(own_y * LOG2E) * tl.fdiv(1.0, l_s), q)
    if LEFT_OUT:
        value = tl.where(lane == k, 0.0, value)
        slope = tl.where(lane == k, 0.0, slope)
    return value, slope, q
