"""What a divergence makes of a tile of columns: value, slope and the student's probability.

A row is ``(m_s, l_s, m_t, l_t, over_t)``: maximum of the logits and sum of exponentials relative to
it, of student and teacher, and 1 / T. What ``value_and_slope`` takes (``divergences.py``) differs by
divergence, because two logarithms rounded each by itself do not cancel where they should.
"""

import triton
import triton.language as tl

from .math import INFINITY, LN2, LOG2E, fma, rounded_product

LOGS = tl.constexpr(0)  # log_q, log_p, q, p
RATIO = tl.constexpr(1)  # log_ratio, q, p
DIFFERENCE = tl.constexpr(2)  # log_ratio, difference, q: for terms in which p and q cancel
POWERS = tl.constexpr(3)  # log2_ratio, log2_larger
PAIR = tl.constexpr(4)  # log2_ratio, ratio, q, p: the smaller probability from the larger
STUDENT = tl.constexpr(5)  # log2_ratio, ratio, q
NAMES = ("logs", "ratio", "difference", "powers", "pair", "student")
OPERANDS = {name: i for i, name in enumerate(NAMES)}

SMALLEST = tl.constexpr(-3.4028234663852886e38)  # of a NaN too: the row's sums tell of it


@triton.jit
def exponent(x, m, c, GUARDED: tl.constexpr):
    """``(x - m) / T`` in base 2, as the normaliser's sum has it."""
    if GUARDED:
        return (x - m) * c
    else:
        return fma(x, c, -(m * c))


@triton.jit
def softmax(x, m, l, over_t, GUARDED: tl.constexpr):
    """Natural logarithm of ``softmax(x / T)`` and the softmax; the compiler hoists what is the row's."""
    log_l = tl.log(l)
    c = (
        over_t * LOG2E
    )  # a float32 by its assignment: the interpreter passes an expression on in float64
    y = exponent(x, m, c, GUARDED)
    prob = tl.exp2(y) * tl.fdiv(1.0, l)
    if GUARDED:
        return tl.maximum((x - m) * over_t - log_l, SMALLEST), prob
    else:
        return fma(y, LN2, -log_l), prob


@triton.jit
def log_of(x, m, l, c):
    """``log softmax(x / T)`` of a logit by what the fast loops sum, which is relative to ``m * c`` as it
    is rounded there (``running.rescale``)."""
    return fma(fma(x.to(tl.float32), c, -rounded_product(m, c)), LN2, -tl.log(l))


@triton.jit
def log_quotient(x, y):
    """``log(x / y)``, without what the division is rounded by: 6e-8, which is much of nearly equal
    rows' losses."""
    quotient = tl.fdiv(x, y)
    return tl.log(quotient) + tl.fdiv(fma(-quotient, y, x), x)


@triton.jit
def both_exponents(x_s, x_t, row, GUARDED: tl.constexpr):
    """Of student and teacher: base-2 exponents, and the sums that normalise them."""
    m_s, l_s, m_t, l_t, over_t = row
    c = over_t * LOG2E
    y_s = exponent(x_s, m_s, c, GUARDED)
    y_t = exponent(x_t, m_t, c, GUARDED)
    return y_s, y_t, l_s, l_t


@triton.jit
def both_softmax(exponents):
    """q and p."""
    y_s, y_t, l_s, l_t = exponents
    return tl.exp2(y_s) * tl.fdiv(1.0, l_s), tl.exp2(y_t) * tl.fdiv(1.0, l_t)


@triton.jit
def log2_of_ratio(exponents, GUARDED: tl.constexpr):
    """``log2(p / q)``, from exponents, which are smaller than logarithms and so rounded less; guarded,
    finite where one or both probabilities are 0."""
    y_s, y_t, l_s, l_t = exponents
    if GUARDED:
        y_s = tl.maximum(y_s, SMALLEST)
        y_t = tl.maximum(y_t, SMALLEST)
    return (y_t - y_s) + log_quotient(l_s, l_t) * LOG2E


@triton.jit
def paired_softmax(exponents, SLOPE_ONLY: tl.constexpr, GUARDED: tl.constexpr):
    """``log2(p / q)``, ``min(p, q) / max(p, q)``, q and p, from two exponentials: the smaller
    probability from the larger, or for the slope, which needs no p, q alone."""
    y_s, y_t, l_s, l_t = exponents
    log_ratio = log2_of_ratio(exponents, GUARDED)
    ratio = tl.exp2(-tl.abs(log_ratio))
    if SLOPE_ONLY:
        q, p = both_softmax(exponents)
        return log_ratio, ratio, q, p
    over_s = tl.fdiv(1.0, l_s)
    over_t = tl.fdiv(1.0, l_t)
    teacher = log_ratio > 0
    larger = tl.exp2(tl.where(teacher, y_t, y_s)) * tl.where(teacher, over_t, over_s)
    smaller = larger * ratio
    return log_ratio, ratio, tl.where(teacher, smaller, larger), tl.where(teacher, larger, smaller)


@triton.jit
def log2_of_larger(exponents):
    """``log2(max(p, q))``."""
    y_s, y_t, l_s, l_t = exponents
    return tl.maximum(y_s - tl.log2(l_s), y_t - tl.log2(l_t))


@triton.jit
def excess(m, c):
    """By how much the exponents of a fast loop are too large: ``m * c`` was rounded there."""
    return fma(m, c, -rounded_product(m, c))


@triton.jit
def log_of_sums(row):
    """``log(l_s / l_t)`` of sums relative to the maxima themselves."""
    m_s, l_s, m_t, l_t, over_t = row
    c = over_t * LOG2E
    return log_quotient(l_s, l_t) - (excess(m_s, c) - excess(m_t, c)) * LN2


@triton.jit
def log_of_ratio(x_s, x_t, row, exponents, EXACT: tl.constexpr, GUARDED: tl.constexpr):
    """``log(p / q)``, as :func:`log2_of_ratio`. EXACT, for two instructions more: rounded only as much
    as it is large, since the distances from the maxima are exact."""
    m_s, l_s, m_t, l_t, over_t = row
    if GUARDED:  # natural exponents: those in base 2 of the lowest float32 are not finite
        student = tl.maximum((x_s - m_s) * over_t, SMALLEST)
        return tl.maximum(fma(x_t - m_t, over_t, log_quotient(l_s, l_t)), SMALLEST) - student
    elif EXACT:
        return fma((x_t - m_t) - (x_s - m_s), over_t, log_of_sums(row))
    else:
        y_s, y_t, _, _ = exponents
        return fma(y_t - y_s, LN2, log_quotient(l_s, l_t))


@triton.jit
def difference_and_softmax(exponents):
    """``p - q``, in which p is not rounded by itself, and q."""
    y_s, y_t, l_s, l_t = exponents
    q = tl.exp2(y_s) * tl.fdiv(1.0, l_s)
    return fma(tl.exp2(y_t), tl.fdiv(1.0, l_t), -q), q


@triton.jit
def column_terms(
    x_s, x_t, inside, row, parameters, VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr,
    SLOPE_ONLY: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr,
):  # fmt: skip
    """Value, slope and student probability of a tile of columns, by the rules for infinities.

    SLOPE_ONLY: the value is not wanted, and may be anything that is infinite where a logit is."""
    m_s, l_s, m_t, l_t, over_t = row
    if GUARDED:
        student_zero = x_s == -INFINITY
        teacher_zero = x_t == -INFINITY
        if RESTRICT and not PROPAGATE:
            x_s = tl.where(teacher_zero, -INFINITY, x_s)
    if OPERANDS == LOGS:
        log_q, q = softmax(x_s, m_s, l_s, over_t, GUARDED)
        log_p, p = softmax(x_t, m_t, l_t, over_t, GUARDED)
        value, slope = VALUE_AND_SLOPE(log_q, log_p, q, p, *parameters)
    else:
        exponents = both_exponents(x_s, x_t, row, GUARDED)
        if OPERANDS == PAIR:
            log_ratio, ratio, q, p = paired_softmax(exponents, SLOPE_ONLY, GUARDED)
            value, slope = VALUE_AND_SLOPE(log_ratio, ratio, q, p, *parameters)
        elif OPERANDS == STUDENT:
            log_ratio, ratio, q, _ = paired_softmax(exponents, True, GUARDED)
            value, slope = VALUE_AND_SLOPE(log_ratio, ratio, q, *parameters)
        elif OPERANDS == DIFFERENCE:
            log_ratio = log_of_ratio(x_s, x_t, row, exponents, True, GUARDED)
            difference, q = difference_and_softmax(exponents)
            value, slope = VALUE_AND_SLOPE(log_ratio, difference, q, *parameters)
        elif OPERANDS == POWERS:
            q, _ = both_softmax(exponents)
            log_ratio = log2_of_ratio(exponents, GUARDED)
            value, slope = VALUE_AND_SLOPE(log_ratio, log2_of_larger(exponents), *parameters)
        else:
            q, p = both_softmax(exponents)
            log_ratio = log_of_ratio(x_s, x_t, row, exponents, False, GUARDED)
            value, slope = VALUE_AND_SLOPE(log_ratio, q, p, *parameters)
    if OPERANDS >= PAIR and not GUARDED and SLOPE_ONLY:
        value = log_ratio  # an infinity shows in any sum that is not finite
    if GUARDED:
        dead = student_zero & teacher_zero
        if DROP:
            if PROPAGATE:
                value = tl.where(student_zero, INFINITY, value)
            else:
                dead = student_zero
        if RESTRICT:
            if PROPAGATE:
                value = tl.where(teacher_zero, INFINITY, value)
                slope = tl.where(teacher_zero, INFINITY, slope)
            else:
                dead = dead | teacher_zero
        value = tl.where(dead, 0.0, value)
        slope = tl.where(dead, 0.0, slope)
    elif MASKED:
        value = tl.where(inside, value, 0.0)
        slope = tl.where(inside, slope, 0.0)
    return value, slope, q
