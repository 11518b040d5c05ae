"""What a loss tells of a row beside it, from the sweeps that run anyway (semantics.md, section 15).

The fast sweeps carry what it takes: ``normalise`` the entropies' moments and the places of the maxima,
``differentiate`` the sum of min(p, q). They see whole rows, as nothing is restricted there. A row with
infinite logits is swept once more for each model by itself, whatever the loss makes of it.
"""

import triton
import triton.language as tl

from .math import INFINITY, LN2, LOG2E
from .outputs import (
    ACCEPTANCE,
    LOG_PROB,
    OF_BOTH,
    OF_STUDENT,
    STUDENT_ENTROPY,
    TEACHER_ARGMAX,
    TEACHER_ENTROPY,
)
from .running import NOWHERE
from .sweeps import DOWN, read, sweep
from .terms import log_of, softmax
from .token_row import token_log_prob, token_sweep


@triton.jit
def column_of(position, lead, l):
    """The column of a position, -1 where the row has no softmax."""
    return tl.where((l > 0.0) & (position < NOWHERE), position - lead, -1)


@triton.jit
def overlap_tile(
    sums, k, position, inside, student_row, teacher_row, row, MASKED: tl.constexpr, GUARDED: tl.constexpr
):  # fmt: skip
    overlap, mass = sums
    m_s, l_s, m_t, l_t, over_t = row
    x_s = read(student_row, position, inside, MASKED, True)
    x_t = read(teacher_row, position, inside, MASKED, True)
    _, q = softmax(x_s, m_s, l_s, over_t, GUARDED)
    _, p = softmax(x_t, m_t, l_t, over_t, GUARDED)
    overlap += tl.sum(tl.minimum(q, p), axis=1)
    if GUARDED:
        mass += tl.sum(tl.where(x_s == -INFINITY, 0.0, p), axis=1)
    return overlap, mass


@triton.jit
def overlap_of(
    student, teacher, lead, n_cols, row, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """Sums of min(p, q), and guarded of p where the student's logit is not -inf, walking backward."""
    zero = tl.zeros([LANES], tl.float32)
    overlap, mass = sweep(
        (zero, zero), overlap_tile, (student, teacher, row), (GUARDED,), lead, n_cols, LANES, WIDTH, ENDS,
        DOWN, 1,
    )  # fmt: skip
    return tl.sum(overlap, axis=0), tl.sum(mass, axis=0)


@triton.jit
def row_outputs(
    student, teacher, lead, n_cols, over_t, seen, fast, logit, token_id, ignore_index,
    OUTPUTS: tl.constexpr, SWEEP: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    ENDS: tl.constexpr,
):  # fmt: skip
    """All NAMES of a row, of which those of OUTPUTS are right; ``seen`` is what the fast ``normalise``
    saw. SWEEP: no sweep for the gradient follows, which would give a fast row's acceptance."""
    m_s, l_s, m_t, l_t, moment_s, moment_t, top_s, top_t, least = seen
    c = over_t * LOG2E
    log_q = 0.0
    overlap = 0.0
    mass = 1.0
    h_s = 0.0
    h_t = 0.0
    if fast & (least > -INFINITY):  # the mass is 1 there
        if LOG_PROB & OUTPUTS:
            log_q = log_of(logit, m_s, l_s, c)
        if STUDENT_ENTROPY & OUTPUTS:
            h_s = tl.log(l_s) - tl.fdiv(moment_s, l_s) * LN2
        if TEACHER_ENTROPY & OUTPUTS:
            h_t = tl.log(l_t) - tl.fdiv(moment_t, l_t) * LN2
        if SWEEP and (ACCEPTANCE & OUTPUTS):
            overlap, _ = overlap_of(
                student,
                teacher,
                lead,
                n_cols,
                (m_s, l_s, m_t, l_t, over_t),
                LANES,
                WIDTH,
                ENDS,
                False,
            )
    else:
        if (OF_STUDENT | OF_BOTH) & OUTPUTS:
            m_s, l_s, h_s, top_s = token_sweep(
                student, lead, n_cols, c, LANES, WIDTH, ENDS, True, True, True
            )
        if (TEACHER_ENTROPY | TEACHER_ARGMAX | OF_BOTH) & OUTPUTS:
            m_t, l_t, h_t, top_t = token_sweep(
                teacher, lead, n_cols, c, LANES, WIDTH, ENDS, True, True, True
            )
        if OF_BOTH & OUTPUTS:
            overlap, mass = overlap_of(
                student,
                teacher,
                lead,
                n_cols,
                (m_s, l_s, m_t, l_t, over_t),
                LANES,
                WIDTH,
                ENDS,
                True,
            )
            poison = tl.where((l_s > 0.0) & (l_t > 0.0), 0.0, float("nan"))
            overlap += poison
            mass += poison
        if LOG_PROB & OUTPUTS:
            log_q = token_log_prob(logit, m_s, l_s, over_t)
    log_q = tl.where(token_id == ignore_index, 0.0, log_q)
    return (
        log_q, h_s, h_t, column_of(top_s, lead, l_s), column_of(top_t, lead, l_t), overlap, mass,
    )  # fmt: skip


@triton.jit
def shown(values, weight):
    """The values of a token, those of the teacher as unknown where its weight is NaN, as it is where the
    teacher's row does not exist."""
    log_prob, h_s, h_t, top_s, top_t, overlap, mass = values
    unknown = tl.where(weight == weight, 0.0, float("nan"))
    top_t = tl.where(weight == weight, top_t, -1)
    return log_prob, h_s, h_t + unknown, top_s, top_t, overlap + unknown, mass + unknown


@triton.jit
def store_outputs(row, targets, values, WANTED: tl.constexpr):
    """A row's values, those whose indices in NAMES are WANTED."""
    for i in tl.static_range(len(WANTED)):
        tl.store(targets[i] + row, tl.cast(values[WANTED[i]], targets[i].dtype.element_ty))
