"""What the top-k loss tells of a row beside it: the student's whole row, and the teacher's K."""

import triton
import triton.language as tl

from .math import INFINITY, LN2, LOG2E
from .outputs import LOG_PROB, STUDENT_ENTROPY, TEACHER_ARGMAX, TEACHER_MASS
from .running import LOWEST, NOWHERE, finite_or_zero
from .token_row import token_log_prob


@triton.jit
def topk_outputs(
    x, token_id, used, log_probs, lane, outside, lead, n_cols, over_t, logit, output_id, ignore_index,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """All NAMES of a row, of which those of OUTPUTS that a top-k teacher has are right. ``x`` are the
    K's logits, ``outside`` what the sweep over the others found: maximum, sum of exponentials, moment and
    place of the maximum."""
    m_r, l_r, moment, top_r = outside
    c = over_t * LOG2E
    top = tl.max(x, axis=0)
    m = finite_or_zero(tl.maximum(top, tl.where(l_r > 0.0, m_r, -INFINITY)))
    y = (x - m) * c
    e = tl.exp2(y)
    shift = tl.maximum((m_r - m) * c, LOWEST)
    factor = tl.where(l_r > 0.0, tl.exp2(shift), 1.0)  # of 0, or of NaN
    l = tl.sum(e, axis=0) + l_r * factor
    h_s = 0.0
    if STUDENT_ENTROPY & OUTPUTS:
        moment = factor * (moment + l_r * shift) + tl.sum(e * tl.maximum(y, LOWEST), axis=0)
        h_s = tl.log(l) - tl.fdiv(moment, l) * LN2
    first = tl.min(tl.where(used & (x == m), token_id.to(tl.int32), NOWHERE), axis=0)
    first_outside = tl.where((l_r > 0.0) & (m_r == m), top_r, NOWHERE)
    first = tl.minimum(first, tl.where(first_outside < NOWHERE, first_outside - lead, NOWHERE))
    top_s = tl.where((l > 0.0) & (first < NOWHERE), first, -1)
    log_prob = 0.0
    if LOG_PROB & OUTPUTS:
        log_prob = token_log_prob(logit, m, l, over_t)
        log_prob = tl.where(output_id == ignore_index, 0.0, log_prob)
    top_t = -1
    mass = 0.0
    if (TEACHER_ARGMAX | TEACHER_MASS) & OUTPUTS:
        log_p = tl.load(log_probs + lane, mask=used, other=-INFINITY).to(tl.float32)
        mass = tl.sum(tl.exp(log_p), axis=0)
        largest = tl.max(log_p, axis=0)
        first = tl.min(tl.where(used & (log_p == largest), token_id.to(tl.int32), NOWHERE), axis=0)
        # an id beyond the vocabulary may be the largest's
        beyond = tl.max(((token_id < -1) | (token_id >= n_cols)).to(tl.int32), axis=0)
        mass = tl.where(beyond > 0, float("nan"), mass)
        known = (mass < INFINITY) & (largest > -INFINITY)
        top_t = tl.where(known & (first < NOWHERE), first, -1)
    return log_prob, h_s, 0.0, top_s, top_t, 0.0, mass
