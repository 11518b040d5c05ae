"""A part of a row, a range of its columns: where it lies, and its statistics.

Numbers leave relative to the maxima themselves, not to their rounded products as in the fast loops
(``terms.excess``), so that they do not depend on how a part was done.
"""

import triton
import triton.language as tl

from .math import INFINITY, LN2, LOG2E
from .rows import chosen_row, first_position, row_offset
from .sweeps import (
    DOWN,
    FORWARD_MOMENT,
    NO_MOMENT,
    PEELED,
    REVERSE_MOMENT,
    SOFT_MOMENT,
    SYMMETRIC_MOMENT,
    normalise,
    read,
    sweep,
)
from .terms import SMALLEST, excess

FARTHEST = tl.constexpr(SMALLEST.value / 4)  # a distance from a maximum; two such differ finitely


@triton.jit
def part_position(
    row, student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    teacher_rows_ptr, teacher_n_inner, n_teacher_rows, n_inner,
    HAS_TEACHER_ROWS: tl.constexpr, ENDS: tl.constexpr,
    STUDENT_MATCHED: tl.constexpr, TEACHER_MATCHED: tl.constexpr,
):  # fmt: skip
    """Where the positions of both rows begin, their lead, and what added to a sum makes it NaN where
    the teacher's row does not exist."""
    student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
    poison = 0.0
    teacher_row = row
    if HAS_TEACHER_ROWS:
        teacher_row, exists = chosen_row(teacher_rows_ptr, row, n_teacher_rows)
        poison = tl.where(exists, 0.0, float("nan"))
    teacher_offset = row_offset(
        teacher_row, teacher_start, teacher_outer, teacher_inner, teacher_n_inner
    )
    lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
    student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
    teacher = first_position(teacher_ptr, teacher_offset, lead, TEACHER_MATCHED)
    return student, teacher, lead, poison


@triton.jit
def exact_sums(m_s, l_s, m_t, l_t, moment_t, moment_s, over_t, MOMENT: tl.constexpr):
    """A fast sweep's sums and moments as relative to the maxima themselves, the moments in nats."""
    c = over_t * LOG2E
    excess_s = excess(m_s, c)
    excess_t = excess(m_t, c)
    factor_s = tl.exp2(-excess_s)
    factor_t = tl.exp2(-excess_t)
    if MOMENT == SYMMETRIC_MOMENT:  # of distances that are exact
        moment_t = moment_t * factor_t * over_t
        moment_s = moment_s * factor_s * over_t
    else:
        shift = excess_s if MOMENT == SOFT_MOMENT else excess_s - excess_t
        moment_t = (moment_t - l_t * shift) * factor_t * LN2
        moment_s = (moment_s - l_s * shift) * factor_s * LN2
    return l_s * factor_s, l_t * factor_t, moment_t, moment_s


@triton.jit
def guarded_tile(
    sums, k, position, inside, student_row, teacher_row, row, MASKED: tl.constexpr,
    MOMENT: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr,
):  # fmt: skip
    kept, moment_t, moment_s = sums
    m_s, m_t, over_t = row
    c = over_t * LOG2E
    x_s = read(student_row, position, inside, MASKED, False)
    x_t = read(teacher_row, position, inside, MASKED, False)
    if RESTRICT:
        x_s = tl.where(x_t == -INFINITY, -INFINITY, x_s)
    e_s = tl.exp2((x_s - m_s) * c)
    e_t = tl.exp2((x_t - m_t) * c)
    if DROP:
        e_t = tl.where(x_s == -INFINITY, 0.0, e_t)
    y = tl.maximum((x_s - m_s) * over_t, FARTHEST)
    if MOMENT != SOFT_MOMENT:
        y -= tl.maximum((x_t - m_t) * over_t, FARTHEST)
    kept += tl.sum(e_t, axis=1)
    if MOMENT == SOFT_MOMENT or MOMENT == FORWARD_MOMENT or MOMENT == SYMMETRIC_MOMENT:
        moment_t += tl.sum(e_t * y, axis=1)
    if MOMENT == REVERSE_MOMENT or MOMENT == SYMMETRIC_MOMENT:
        moment_s += tl.sum(e_s * y, axis=1)
    return kept, moment_t, moment_s


@triton.jit
def guarded_sums(
    student, teacher, lead, n_cols, row, MOMENT: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Of columns with infinities, given both maxima: the teacher's sum over those that are kept, and
    the moments over them, finite so that a factor of 0 leaves 0 of them."""
    zero = tl.zeros([LANES], tl.float32)
    kept, moment_t, moment_s = sweep(
        (zero, zero, zero), guarded_tile, (student, teacher, row), (MOMENT, DROP, RESTRICT),
        lead, n_cols, LANES, WIDTH, ENDS, DOWN, 1,
    )  # fmt: skip
    moment_t = tl.maximum(tl.sum(moment_t, axis=0), SMALLEST)
    moment_s = tl.minimum(tl.maximum(tl.sum(moment_s, axis=0), SMALLEST), -SMALLEST)
    return tl.sum(kept, axis=0), moment_t, moment_s


@triton.jit
def part_numbers(
    student, teacher, lead, n_cols, over_t, MOMENT: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, OWN_HARD: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """A part's numbers but those of its label's column: DIVERGENCE_NUMBERS, the hard label's maximum
    and sum."""
    # a declared divergence has no moment; where an infinity would be dropped, one makes it show
    SWEPT: tl.constexpr = FORWARD_MOMENT if MOMENT == NO_MOMENT and (DROP or RESTRICT) else MOMENT
    c = over_t * LOG2E
    natural = tl.cast(LOG2E, tl.float32)
    m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, _, _, _, _, _ = normalise(
        student, teacher, lead, n_cols, c, LANES, WIDTH, ENDS,
        False, False, DIVERGENCE, SWEPT, RESTRICT, OWN_HARD, 0,
    )  # fmt: skip
    fast = l_h > 0.0
    if DIVERGENCE:
        l_s, l_t, moment_t, moment_s = exact_sums(
            m_s, l_s, m_t, l_t, moment_t, moment_s, over_t, SWEPT
        )
        # an infinity, or an overflow, anywhere in the part leaves a sum that is not finite
        total = (moment_t + moment_s) + (l_s + l_t)
        fast = (l_s > 0.0) & (l_t > 0.0) & (tl.abs(total) < float("inf"))
    if OWN_HARD:
        l_h = l_h * tl.exp2(-excess(m_h, natural))
        fast = fast & (l_h > 0.0) & (l_h < float("inf"))
    elif HARD:
        m_h = m_s
        l_h = l_s
    kept = l_t
    if not fast:
        m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, _, _, _, _, _ = normalise(
            student, teacher, lead, n_cols, c, LANES, WIDTH, ENDS,
            True, False, DIVERGENCE, NO_MOMENT, RESTRICT, HARD, 0,
        )  # fmt: skip
        kept = l_t
        if DIVERGENCE and (MOMENT != NO_MOMENT or DROP):
            kept, moment_t, moment_s = guarded_sums(
                student, teacher, lead, n_cols, (m_s, m_t, over_t), MOMENT, DROP, RESTRICT,
                LANES, WIDTH, ENDS,
            )  # fmt: skip
        m_s = tl.where(l_s == 0.0, -INFINITY, m_s)
        m_t = tl.where(l_t == 0.0, -INFINITY, m_t)
        m_h = tl.where(l_h == 0.0, -INFINITY, m_h)
    if MOMENT == NO_MOMENT or MOMENT == REVERSE_MOMENT:
        moment_t = 0.0
    if MOMENT != REVERSE_MOMENT and MOMENT != SYMMETRIC_MOMENT:
        moment_s = 0.0
    return m_s, l_s, m_t, l_t, kept, moment_t, moment_s, fast, m_h, l_h
