"""The three sweeps over a row of logits, from which every kernel is composed.

With ``x`` a logit, ``m`` the row's maximum, ``l = sum(exp((x - m) / T))`` and ``c = log2(e) / T``:

* ``normalise`` finds ``m`` and ``l`` of both rows online, and for the divergences whose sums are
  known without a second sweep the moment that gives them (semantics.md, section 9);
* ``reduce`` sums ``value`` (the loss L) and ``slope`` (D);
* ``differentiate`` writes the gradient ``(slope - q * D) * scale`` and sums ``value`` again.

A tile is ``[LANES, WIDTH]``, WIDTH contiguous columns a thread: one 16-byte load, and sums along
axis 1 stay inside the thread; lanes are combined once a sweep. Positions count from a 16-byte boundary ``lead`` columns before the row's first one; the
partial tiles at both ends are peeled off the loop, which has no mask.

Every sweep exists twice (``docs/kernels.md``): the fast form has no guard, and a row whose sums are
not finite is done again in the GUARDED form, which works on ``x - m``, clamps the logarithms and
selects away the terms that semantics.md, section 3 drops. The normaliser stays a pair (maximum, logarithm of the sum): folding it into one number
costs all the accuracy of a row far from zero.
"""

import triton
import triton.language as tl

from .math import INFINITY, LOG2E, fma, from_float32, to_float32
from .outputs import (
    OF_STUDENT,
    STUDENT_ARGMAX,
    STUDENT_ENTROPY,
    TEACHER_ARGMAX,
    TEACHER_ENTROPY,
    TEACHER_MASS,
)
from .running import LOWEST, NOWHERE, combine_lanes, first_maximum, move_moment, rescale
from .terms import STUDENT, column_terms, softmax

# Which moment a divergence has. SOFT: E_p[s/T]; FORWARD: E_p[(s - t)/T]; REVERSE: E_q[(s - t)/T];
# SYMMETRIC: the last two.
MOMENTS = {name: i for i, name in enumerate(("none", "soft", "forward", "reverse", "symmetric"))}
NO_MOMENT, SOFT_MOMENT, FORWARD_MOMENT, REVERSE_MOMENT, SYMMETRIC_MOMENT = (
    tl.constexpr(i) for i in MOMENTS.values()
)

# Tiles a turn of the loops: two share their addresses' arithmetic, a twentieth of the instructions,
# and four loads are in flight. Not where it would spill: with a hard label's own softmax, in the
# later sweeps of skew reverse KL (STUDENT), and in the guarded loops, which are rare.
UNROLL = tl.constexpr(2)

# How a row ends. WHOLE_VECTORS: it begins on a boundary and holds a whole number of vectors.
# TAIL: it begins where tile 0 does. PEELED: it begins ``lead`` columns into tile 0.
WHOLE_VECTORS, TAIL, PEELED = map(tl.constexpr, range(3))

# How a sweep walks: its whole tiles upward and then the partial ones; or these first, and the whole ones
# upward or downward, where the tiles that the sweep before read last are still in cache.
UP_FIRST, UP, DOWN = map(tl.constexpr, range(3))


@triton.jit
def tile(k, lead, n_cols, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr):
    """Positions of tile ``k``, and which of them are columns of the row."""
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    position = k * (LANES * WIDTH) + offsets
    if ENDS == WHOLE_VECTORS:  # the same for a whole vector, which a masked load then stays
        inside = position // WIDTH < n_cols // WIDTH
    elif ENDS == TAIL:
        inside = position < n_cols
    else:
        inside = (position >= lead) & (position < lead + n_cols)
    return position, inside


@triton.jit
def whole_tiles(lead, n_cols, BLOCK: tl.constexpr, ENDS: tl.constexpr):
    """Tiles ``[first, end)`` are whole; tiles ``j * end`` for j in ``[begin, stop)`` are partial."""
    first: tl.constexpr = 1 if ENDS == PEELED else 0
    end = (lead + n_cols) // BLOCK
    tail = ((lead + n_cols) % BLOCK > 0) & (end >= first)
    return first, end, 1 - first, 1 + tail.to(tl.int32)


@triton.jit
def sweep(
    state, STEP: tl.constexpr, arguments, FLAGS, lead, n_cols, LANES: tl.constexpr, WIDTH: tl.constexpr,
    ENDS: tl.constexpr, WALK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``state = STEP(state, k, position, inside, *arguments, MASKED, *FLAGS)`` for each tile k of a
    row, TILES whole ones a turn; a step without a state hands on what it gets."""
    first, end, begin, stop = whole_tiles(lead, n_cols, LANES * WIDTH, ENDS)
    if WALK == UP_FIRST:
        for k in tl.range(first, end, loop_unroll_factor=TILES):
            position, inside = tile(k, lead, n_cols, LANES, WIDTH, ENDS)
            state = STEP(state, k, position, inside, *arguments, False, *FLAGS)
    for j in range(begin, stop):
        position, inside = tile(j * end, lead, n_cols, LANES, WIDTH, ENDS)
        state = STEP(state, j * end, position, inside, *arguments, True, *FLAGS)
    if WALK != UP_FIRST:
        for i in tl.range(first, end, loop_unroll_factor=TILES):
            k = i if WALK == UP else end - 1 - i + first
            position, inside = tile(k, lead, n_cols, LANES, WIDTH, ENDS)
            state = STEP(state, k, position, inside, *arguments, False, *FLAGS)
    return state


@triton.jit
def read(row_ptr, position, inside, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """A tile of logits as float32; columns outside the row read as -inf."""
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if MASKED:
        return tl.load(row_ptr + position, mask=inside, other=-INFINITY, eviction_policy=policy).to(
            tl.float32
        )
    else:
        return to_float32(tl.load(row_ptr + position, eviction_policy=policy))


@triton.jit
def write(gradient_row, position, gradient, inside, MASKED: tl.constexpr):
    """A tile of the gradient, rounded to its dtype; nobody reads it soon."""
    gradient = from_float32(gradient, gradient_row.dtype.element_ty)
    if MASKED:
        tl.store(gradient_row + position, gradient, mask=inside, cache_modifier=".cs")
    else:
        tl.store(gradient_row + position, gradient, cache_modifier=".cs")


@triton.jit
def normalise_tile(
    state, k, position, inside, student_row, teacher_row, c, MASKED: tl.constexpr,
    GUARDED: tl.constexpr, KEEP: tl.constexpr, DIVERGENCE: tl.constexpr, MOMENT: tl.constexpr,
    RESTRICT: tl.constexpr, OWN_HARD: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, h_s, h_t, top_s, top_t, least = state
    x_s = read(student_row, position, inside, MASKED, KEEP)
    if OWN_HARD:  # the hard-label term's normaliser: temperature 1, the student unrestricted
        m_h, factor, shift, y = rescale(m_h, l_h, x_s, tl.cast(LOG2E, tl.float32), GUARDED)
        l_h = l_h * factor + tl.sum(tl.exp2(y), axis=1)
    if TEACHER_MASS & OUTPUTS:
        tile_least = tl.min(tl.where(inside, x_s, 0.0) if MASKED else x_s, axis=1)
        # not tl.minimum, of which with its reduction the compiler makes a form that it then refuses
        least = tl.where(tile_least < least, tile_least, least)
    if STUDENT_ARGMAX & OUTPUTS:
        top_s = first_maximum(m_s, top_s, x_s, position)
    if not DIVERGENCE and (OF_STUDENT & OUTPUTS):
        m_s, factor_s, shift_s, y_s = rescale(m_s, l_s, x_s, c, GUARDED)
        e_s = tl.exp2(y_s)
        if STUDENT_ENTROPY & OUTPUTS:
            h_s = move_moment(h_s, l_s, factor_s, shift_s, e_s, y_s)
        l_s = l_s * factor_s + tl.sum(e_s, axis=1)
    if DIVERGENCE:
        x_t = read(teacher_row, position, inside, MASKED, KEEP)
        if GUARDED and RESTRICT:
            x_s = tl.where(x_t == -INFINITY, -INFINITY, x_s)
        if TEACHER_ARGMAX & OUTPUTS:
            top_t = first_maximum(m_t, top_t, x_t, position)
        old_t = m_t
        m_t, factor_t, shift_t, y_t = rescale(m_t, l_t, x_t, c, GUARDED)
        e_t = tl.exp2(y_t)
        old_s = m_s
        m_s, factor_s, shift_s, y_s = rescale(m_s, l_s, x_s, c, GUARDED)
        e_s = tl.exp2(y_s)
    if DIVERGENCE and MOMENT != NO_MOMENT and not GUARDED:
        # kept relative to both running maxima, which the shifts move along
        if MOMENT == SOFT_MOMENT:
            y = y_s
            shift = shift_s
        elif MOMENT == SYMMETRIC_MOMENT:
            y = (x_s - m_s[:, None]) - (x_t - m_t[:, None])
            shift = (old_s - m_s) - (old_t - m_t)
        else:
            y = y_s - y_t
            shift = shift_s - shift_t
        if MOMENT != REVERSE_MOMENT:
            term = e_t * y
            if MASKED:
                term = tl.where(inside, term, 0.0)
            moment_t = factor_t * (moment_t + l_t * shift) + tl.sum(term, axis=1)
        if MOMENT == REVERSE_MOMENT or MOMENT == SYMMETRIC_MOMENT:
            term = e_s * y
            if MASKED:
                term = tl.where(inside, term, 0.0)
            moment_s = factor_s * (moment_s + l_s * shift) + tl.sum(term, axis=1)
    if DIVERGENCE:
        if STUDENT_ENTROPY & OUTPUTS:
            h_s = move_moment(h_s, l_s, factor_s, shift_s, e_s, y_s)
        if TEACHER_ENTROPY & OUTPUTS:
            h_t = move_moment(h_t, l_t, factor_t, shift_t, e_t, y_t)
        l_t = l_t * factor_t + tl.sum(e_t, axis=1)
        l_s = l_s * factor_s + tl.sum(e_s, axis=1)
    return m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, h_s, h_t, top_s, top_t, least


@triton.jit
def normalise(
    student_row, teacher_row, lead, n_cols, c, LANES: tl.constexpr, WIDTH: tl.constexpr,
    ENDS: tl.constexpr, GUARDED: tl.constexpr, KEEP: tl.constexpr, DIVERGENCE: tl.constexpr,
    MOMENT: tl.constexpr, RESTRICT: tl.constexpr, OWN_HARD: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of both rows, the moments under p and q, the hard label's maximum and sum; and for
    OUTPUTS the moments of both entropies, the places of both maxima, and the student's least logit, or 0."""
    # with more than one of the five that are carried along a second tile a turn would spill (sm_100)
    CARRIED: tl.constexpr = (
        OUTPUTS // 2 % 2
        + OUTPUTS // 4 % 2
        + OUTPUTS // 8 % 2
        + OUTPUTS // 16 % 2
        + OUTPUTS // 64 % 2
    )
    low = tl.full([LANES], -INFINITY if GUARDED else LOWEST, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    nowhere = tl.full([LANES], NOWHERE, tl.int32)
    state = sweep(
        (low, zero, low, zero, zero, zero, low, zero, zero, zero, nowhere, nowhere, zero), normalise_tile,
        (student_row, teacher_row, c), (GUARDED, KEEP, DIVERGENCE, MOMENT, RESTRICT, OWN_HARD, OUTPUTS),
        lead, n_cols, LANES, WIDTH, ENDS, UP_FIRST, 1 if GUARDED or OWN_HARD or CARRIED > 1 else UNROLL,
    )  # fmt: skip
    m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, h_s, h_t, top_s, top_t, least = state
    lanes_m_s = m_s
    lanes_m_t = m_t
    lanes_l_s = l_s
    lanes_l_t = l_t
    m_s, l_s, factor_s, shift_s = combine_lanes(m_s, l_s, c, GUARDED)
    m_t, l_t, factor_t, shift_t = combine_lanes(m_t, l_t, c, GUARDED)
    m_h, l_h, _, _ = combine_lanes(m_h, l_h, tl.cast(LOG2E, tl.float32), GUARDED)
    if MOMENT == SOFT_MOMENT:
        shift = shift_s
    elif MOMENT == SYMMETRIC_MOMENT:
        shift = (lanes_m_s - m_s) - (lanes_m_t - m_t)
    else:
        shift = shift_s - shift_t
    moment_t = tl.sum(factor_t * (moment_t + lanes_l_t * shift), axis=0)
    moment_s = tl.sum(factor_s * (moment_s + lanes_l_s * shift), axis=0)
    h_s = tl.sum(factor_s * (h_s + lanes_l_s * tl.maximum(shift_s, LOWEST)), axis=0)
    h_t = tl.sum(factor_t * (h_t + lanes_l_t * tl.maximum(shift_t, LOWEST)), axis=0)
    top_s = tl.min(tl.where(lanes_m_s == m_s, top_s, NOWHERE), axis=0)
    top_t = tl.min(tl.where(lanes_m_t == m_t, top_t, NOWHERE), axis=0)
    least = tl.min(least, axis=0)
    return m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h, h_s, h_t, top_s, top_t, least


@triton.jit
def reduce_tile(
    sums, k, position, inside, student_row, teacher_row, row, parameters, MASKED: tl.constexpr,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, GUARDED: tl.constexpr, KEEP: tl.constexpr,
    DROP: tl.constexpr, RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr,
):  # fmt: skip
    loss, total_slope = sums
    x_s = read(student_row, position, inside, MASKED, KEEP)
    x_t = read(teacher_row, position, inside, MASKED, KEEP)
    value, slope, _ = column_terms(
        x_s, x_t, inside, row, parameters,
        VALUE_AND_SLOPE, OPERANDS, KEEP, MASKED, GUARDED, DROP, RESTRICT, PROPAGATE,
    )  # fmt: skip
    return loss + tl.sum(value, axis=1), total_slope + tl.sum(slope, axis=1)


@triton.jit
def reduce(
    student_row, teacher_row, lead, n_cols, row, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, ENDS: tl.constexpr, GUARDED: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr,
    PROPAGATE: tl.constexpr,
):  # fmt: skip
    """The loss L and D, walking backward: the tiles read last are still in cache.

    L of a PAIR divergence is left to the gradient's sweep, where one follows (KEEP)."""
    zero = tl.zeros([LANES], tl.float32)
    sums = sweep(
        (zero, zero), reduce_tile, (student_row, teacher_row, row, parameters),
        (VALUE_AND_SLOPE, OPERANDS, GUARDED, KEEP, DROP, RESTRICT, PROPAGATE), lead, n_cols,
        LANES, WIDTH, ENDS, DOWN, 1 if GUARDED or OPERANDS == STUDENT else UNROLL,
    )  # fmt: skip
    return tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0)


@triton.jit
def differentiate_tile(
    sums, k, position, inside, student_row, teacher_row, gradient_row, row, hard, scales, parameters,
    MASKED: tl.constexpr, VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, GUARDED: tl.constexpr,
    DROP: tl.constexpr, RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, OWN_HARD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    loss, overlap = sums
    scale, hard_scale, total_slope, poison = scales
    x_s = read(student_row, position, inside, MASKED, False)
    if DIVERGENCE:
        x_t = read(teacher_row, position, inside, MASKED, False)
        value, slope, q = column_terms(
            x_s, x_t, inside, row, parameters,
            VALUE_AND_SLOPE, OPERANDS, False, MASKED, GUARDED, DROP, RESTRICT, PROPAGATE,
        )  # fmt: skip
        loss += tl.sum(value, axis=1)
        if OVERLAP:
            m_s, l_s, m_t, l_t, over_t = row
            _, p = softmax(x_t, m_t, l_t, over_t, GUARDED)
            overlap += tl.sum(tl.minimum(q, p), axis=1)
        gradient = fma(q, -total_slope, slope) * scale
    else:
        gradient = tl.zeros_like(x_s)
    if HARD:
        m_h, l_h, label_position = hard
        if OWN_HARD:
            _, q = softmax(x_s, m_h, l_h, tl.cast(1.0, tl.float32), GUARDED)
        gradient += (q - tl.where(position == label_position, 1.0, 0.0)) * hard_scale
    if GUARDED:
        gradient += poison
    write(gradient_row, position, gradient, inside, MASKED)
    return loss, overlap


@triton.jit
def differentiate(
    student_row, teacher_row, gradient_row, lead, n_cols, row, hard, scales, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    GUARDED: tl.constexpr, FORWARD: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr,
    PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, OWN_HARD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient, walking against the sweep before (FORWARD or not); returns L, and with OVERLAP
    the sum of min(p, q)."""
    zero = tl.zeros([LANES], tl.float32)
    loss, overlap = sweep(
        (zero, zero), differentiate_tile,
        (student_row, teacher_row, gradient_row, row, hard, scales, parameters),
        (
            VALUE_AND_SLOPE, OPERANDS, GUARDED, DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, OWN_HARD,
            OVERLAP,
        ),
        lead, n_cols, LANES, WIDTH, ENDS, UP if FORWARD else DOWN,
        1 if GUARDED or OWN_HARD or OPERANDS == STUDENT else UNROLL,
    )  # fmt: skip
    return tl.sum(loss, axis=0), tl.sum(overlap, axis=0)


@triton.jit
def fill_zero(
    gradient_row, lead, n_cols, start, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr
):  # fmt: skip
    """Zero columns ``[start, n_cols)`` of a gradient row, for start 0 with whole stores."""
    BLOCK: tl.constexpr = LANES * WIDTH
    first, end, begin, stop = whole_tiles(lead, n_cols, BLOCK, ENDS)
    zero = tl.zeros([LANES, WIDTH], gradient_row.dtype.element_ty)
    if start == 0:
        for k in range(first, end):
            position, _ = tile(k, lead, n_cols, LANES, WIDTH, ENDS)
            tl.store(gradient_row + position, zero, cache_modifier=".cs")
        for j in range(begin, stop):
            position, inside = tile(j * end, lead, n_cols, LANES, WIDTH, ENDS)
            tl.store(gradient_row + position, zero, mask=inside)
    elif start < n_cols:
        for k in range((lead + start) // BLOCK, (lead + n_cols + BLOCK - 1) // BLOCK):
            position, _ = tile(k, lead, n_cols, LANES, WIDTH, ENDS)
            inside = (position >= lead + start) & (position < lead + n_cols)
            tl.store(gradient_row + position, zero, mask=inside)
