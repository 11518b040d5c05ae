"""A row's loss and gradient from its sweeps, with the closed moments where a divergence has them."""

import triton
import triton.language as tl

from .math import LN2, LOG2E
from .sweeps import (
    FORWARD_MOMENT,
    NO_MOMENT,
    REVERSE_MOMENT,
    SOFT_MOMENT,
    SYMMETRIC_MOMENT,
    differentiate,
    normalise,
    reduce,
)
from .terms import log_of_sums, log_quotient

NEARLY_EQUAL = tl.constexpr(0.05)  # nats


@triton.jit
def row_statistics(
    student, teacher, lead, n_cols, over_t, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, MOMENT: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
    OWN_HARD: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    KEEP: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """L, what the gradient needs of a row, and what the first sweep saw for OUTPUTS, which is right
    where the fast loops serve. KEEP: the row will be read once more."""
    c = over_t * LOG2E
    m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, h_s, h_t, top_s, top_t, least = normalise(
        student, teacher, lead, n_cols, c, LANES, WIDTH, ENDS,
        False, KEEP or MOMENT == NO_MOMENT, DIVERGENCE, MOMENT, RESTRICT, OWN_HARD, OUTPUTS,
    )  # fmt: skip
    seen = (m_s, l_s, m_t, l_t, h_s, h_t, top_s, top_t, least)
    loss = 0.0
    total_slope = 0.0
    if DIVERGENCE:
        if MOMENT == SOFT_MOMENT:
            loss = tl.log(l_s) - moment_t / l_t * LN2
            total_slope = -1.0
        elif MOMENT == FORWARD_MOMENT:
            loss = log_quotient(l_s, l_t) - moment_t / l_t * LN2
            total_slope = -1.0
        elif MOMENT == REVERSE_MOMENT:
            loss = moment_s / l_s * LN2 - log_quotient(l_s, l_t)
            total_slope = loss + 1.0
        elif MOMENT == SYMMETRIC_MOMENT:
            weight = parameters[0]
            log_sums = log_of_sums((m_s, l_s, m_t, l_t, over_t))
            forward = log_sums - moment_t / l_t * over_t
            reverse = moment_s / l_s * over_t - log_sums
            loss = (1.0 - weight) * forward + weight * reverse
            total_slope = weight * reverse + (2.0 * weight - 1.0)
            # where p and q cancel in every term, the moments' absolute error is too large
            if loss < NEARLY_EQUAL:
                loss, total_slope = reduce(
                    student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), parameters,
                    VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, KEEP, DROP, RESTRICT, PROPAGATE,
                )  # fmt: skip
        else:
            loss, total_slope = reduce(
                student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), parameters,
                VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, KEEP, DROP, RESTRICT, PROPAGATE,
            )  # fmt: skip
        # an infinity, or an overflow, anywhere in the row leaves a sum that is not finite
        fast = (l_s > 0.0) & (l_t > 0.0) & (tl.abs(loss + total_slope) < float("inf"))
    else:
        fast = l_h > 0.0
    if HARD and not OWN_HARD:
        m_h = m_s
        l_h = l_s
    if not fast:
        m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, _, _, _, _, _ = normalise(
            student, teacher, lead, n_cols, c, LANES, WIDTH, ENDS,
            True, True, DIVERGENCE, NO_MOMENT, RESTRICT and not PROPAGATE, HARD, 0,
        )  # fmt: skip
        if DIVERGENCE:
            loss, total_slope = reduce(
                student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), parameters,
                VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, True, KEEP, DROP, RESTRICT, PROPAGATE,
            )  # fmt: skip
            if MOMENT == REVERSE_MOMENT and not PROPAGATE:  # the restricted student sums to 1
                total_slope = loss + 1.0
            # a row without a finite logit, and NaN, must not vanish among the dropped terms
            loss += tl.where((l_s > 0.0) & (l_t > 0.0), 0.0, float("nan"))
    return loss, (m_s, l_s, m_t, l_t, total_slope, m_h, l_h, fast), seen


@triton.jit
def row_gradient(
    student, teacher, gradient, lead, n_cols, statistics, over_t, scale, hard_scale, label, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, SHORT: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
    OWN_HARD: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient; returns L, and with OVERLAP the sum of min(p, q), as its fast loops sum
    them. SHORT: one sweep came before."""
    m_s, l_s, m_t, l_t, total_slope, m_h, l_h, fast = statistics
    row = (m_s, l_s, m_t, l_t, over_t)
    hard = (m_h, l_h, lead + label)
    loss = 0.0
    overlap = 0.0
    if fast:
        scales = (scale, hard_scale, total_slope, 0.0)
        loss, overlap = differentiate(
            student, teacher, gradient, lead, n_cols, row, hard, scales, parameters,
            VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, not SHORT,
            DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, OWN_HARD, OVERLAP,
        )  # fmt: skip
    else:
        if DIVERGENCE:
            good = (l_s > 0.0) & (l_t > 0.0)
        else:
            good = l_h > 0.0
        scales = (scale, hard_scale, total_slope, tl.where(good, 0.0, float("nan")))
        differentiate(
            student, teacher, gradient, lead, n_cols, row, hard, scales, parameters,
            VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, True, not SHORT,
            DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, HARD, False,
        )  # fmt: skip
    return loss, overlap
