"""The loss against a teacher of whom K log-probabilities a row are known: ``docs/topk.md`` has its
gradient, semantics.md, section 11, the rules; weights, hard label and launches are the dense kernel's.

The outcomes of a row are the K tokens and the rest of the vocabulary, a vector of BLOCK_K lanes. With
``m_r`` and ``l_r`` the maximum and the sum of exponentials of the columns outside the K, the rest's
probability is ``q_rest = exp((m_r - m) / T) l_r / l``, and a column's share of it
``exp((x_j - m_r) / T) / l_r``, which holds however small q_rest is.

The rest is one outcome for every divergence with the tail as a bucket, and without one for those whose
terms at p = 0 are homogeneous, ``value(q, 0) = q value(1, 0)`` (Divergence.additive_at_teacher_zero).
Of the others (EACH) every column outside is an outcome. Where the student is restricted to the K, by a
divergence that is infinite at p = 0, nothing outside is read at all.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .layout import row_layouts
from .math import INFINITY, LOG2E, fma, from_float32
from .outputs import LOG_PROB, OF_STUDENT, bits
from .row_outputs import shown, store_outputs
from .rows import (
    RUN_TIME,
    Formula,
    LossBuffers,
    chosen_row,
    first_position,
    poisoned,
    row_offset,
    row_parameters,
    row_scale,
    rows_launch,
    store_losses,
)
from .running import NOWHERE, finite_or_zero
from .sweeps import PEELED, fill_zero
from .terms import SMALLEST
from .topk_outputs import topk_outputs
from .topk_outside import clear, mark, spread, sum_outside, terms_outside, unmark
from .topk_terms import MASSES, outcome_terms, without_repeats

STATISTICS = tl.constexpr(launch.TOPK_STATISTICS)

LOWEST_FLOAT = torch.finfo(torch.float32).min
LEAST_REST = tl.constexpr(2.0**-24)  # of the teacher's tail

# The rest of the vocabulary
BUCKET, RENORMALIZE, IGNORE = map(tl.constexpr, range(3))
# ... and how the teacher is read: with "restrict" and "drop" nothing outside has a term
TAILS = {"bucket": 0, "renormalize": 1, "ignore": 2, "restrict": 1, "drop": 2}


@triton.jit
def clamped(y):
    """Exponents of finite logits, finite; NaN stays."""
    return tl.where(y < SMALLEST, SMALLEST, y)


@triton.jit
def read_teacher(log_probs, ids, lane, k, n_cols, TAIL: tl.constexpr):
    """Of the slots: ids, which are used, and exponents whose exponentials over ``l`` are p; the rest's
    logarithm, ``l``, and whether they make a distribution."""
    given = lane < k
    token_id = tl.load(ids + lane, mask=given, other=-1)
    used = (token_id >= 0) & (token_id < n_cols)
    log_p = tl.load(log_probs + lane, mask=used, other=-INFINITY).to(tl.float32)
    # an id beyond the vocabulary, which without debug mode nobody refuses on a GPU
    log_p = tl.where(given & (token_id != -1) & (used == 0), float("nan"), log_p)
    zero = used & (log_p == -INFINITY)
    if tl.sum(zero.to(tl.int32), axis=0) > 0:  # servers pad with ids that they gave before
        used = without_repeats(used, zero, token_id, log_probs, ids, lane, k)
    log_p_rest = -INFINITY
    l = tl.cast(1.0, tl.float32)
    if TAIL == BUCKET:
        # in float64: of a confident teacher float32's rounding of the sum would be all that is left
        total = tl.sum(tl.exp(log_p.to(tl.float64)), axis=0)
        rest = tl.maximum(1.0 - total, LEAST_REST).to(tl.float32)
        covered = tl.sum(used.to(tl.int32), axis=0) == n_cols
        log_p_rest = tl.where(covered, -INFINITY, tl.log(rest))
        good = total < INFINITY
    else:
        m = finite_or_zero(tl.max(log_p, axis=0))
        total = tl.sum(tl.exp(log_p - m), axis=0)
        good = total < INFINITY
        if TAIL == RENORMALIZE:
            log_p -= m
            l = total
            good = good & (total > 0.0)
    return token_id, used, log_p, log_p_rest, l, good


@triton.jit
def outcomes(
    x, log_p, lane, k, m_r, l_r, over_t, REST: tl.constexpr, RESTRICT: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """Exponents of the outcomes relative to the largest one, their sum of exponentials; and for EACH
    the row's maximum and its sum, to which columns outside are relative."""
    if RESTRICT:
        x = tl.where(log_p == -INFINITY, -INFINITY, x)
    m = tl.max(x, axis=0)
    if REST:
        m = tl.maximum(m, tl.where(l_r > 0.0, m_r, -INFINITY))
    m = finite_or_zero(m)
    y = tl.where(x == -INFINITY, -INFINITY, clamped((x - m) * over_t))
    if REST:
        y_rest = clamped((m_r - m) * over_t) + tl.log(l_r)
        y = tl.where(lane == tl.where(l_r > 0.0, k, -1), y_rest, y)
    row_l = 0.0
    if EACH:
        c = over_t * LOG2E
        of_rest = tl.where(l_r > 0.0, l_r * tl.exp2((m_r - m) * c), l_r)
        row_l = tl.sum(tl.exp2((x - m) * c), axis=0) + of_rest
    y = tl.where(y == -INFINITY, y, clamped(y - finite_or_zero(tl.max(y, axis=0))))
    return y, tl.sum(tl.exp2(y * LOG2E), axis=0), m, row_l


@triton.jit
def hard_normaliser(x, m_r, l_r):
    """Of the whole row at temperature 1: maximum, sum, and the K's exponentials."""
    m = tl.max(x, axis=0)
    m = finite_or_zero(tl.maximum(m, tl.where(l_r > 0.0, m_r, -INFINITY)))
    e = tl.exp2((x - m) * LOG2E)
    of_rest = tl.where(l_r > 0.0, l_r * tl.exp2((m_r - m) * LOG2E), l_r)
    return m, tl.sum(e, axis=0) + of_rest, e


@triton.jit(do_not_specialize=RUN_TIME)
def topk_kernel(
    student_ptr, student_start, student_outer, student_inner,
    gradient_ptr, gradient_start, gradient_outer, gradient_inner,
    log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, words_ptr, bitmap_ptr, n_words,
    losses_ptr, components_ptr, statistics_ptr, weights_ptr, labels_ptr, output_ids_ptr, upstream_ptr,
    upstream_stride, outputs, denominator, n_inner, n_rows, n_cols, width, ignore_index, k,
    log_prob_floor, over_t, divergence_scale, soft_weight, hard_weight, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr,
    TAIL: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr, REST: tl.constexpr,
    EACH: tl.constexpr, LEFT_OUT: tl.constexpr, MASSES: tl.constexpr, HAS_FLOOR: tl.constexpr,
    HARD: tl.constexpr, OWN_HARD: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    DENOMINATOR_IN_MEMORY: tl.constexpr, WRITE_LOSS: tl.constexpr, WRITE_STATISTICS: tl.constexpr,
    HAS_TEACHER_ROWS: tl.constexpr, WRITE_GRADIENT: tl.constexpr, OUTPUTS: tl.constexpr,
    WANTED: tl.constexpr, ACCEPTANCE_AT: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    ENDS: tl.constexpr, UNROLL: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
    GRADIENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """Losses of ``n_rows`` rows, with their gradient (forward launch) or their statistics; or,
    without WRITE_LOSS, the gradient from the statistics and upstream gradients (backward launch).

    ``log_probs`` and ``ids`` are [n_rows, k], or [n_teacher_rows, k] with HAS_TEACHER_ROWS; ``words`` and
    ``bitmap`` the same memory. REST: the student is normalised over the columns outside too; EACH: one by
    one they have terms, LEFT_OUT: they have none. OWN_HARD: the hard label's sums are not the
    divergence's. A row of weight 0 is not read: loss 0, gradient 0.
    """
    # the student's own outputs are of its whole row, which a divergence on the K alone does not read
    LOOKS: tl.constexpr = WRITE_LOSS and (OF_STUDENT & OUTPUTS) != 0
    SWEPT: tl.constexpr = WRITE_LOSS and (REST or HARD or LOOKS)
    SHARED: tl.constexpr = (REST and not EACH) or (HARD and not OWN_HARD and not EACH)
    if SWEPT:
        words = words_ptr + tl.program_id(0) * n_words
        bitmap = bitmap_ptr + tl.program_id(0) * n_words * 4
        clear(words, n_words, LANES)
    lane = tl.arange(0, BLOCK_K)
    one = tl.cast(1.0, tl.float32)
    c = over_t * LOG2E
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        gradient_offset = row_offset(row, gradient_start, gradient_outer, gradient_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        gradient = first_position(gradient_ptr, gradient_offset, lead, GRADIENT_MATCHED)

        kept = statistics_ptr + tl.cast(row, tl.int64) * STATISTICS
        weight, scale = row_scale(
            row, kept, weights_ptr, denominator, upstream_ptr, upstream_stride, STATISTICS,
            HAS_WEIGHTS, DENOMINATOR_IN_MEMORY, WRITE_LOSS, WRITE_STATISTICS,
        )  # fmt: skip
        slots_row = tl.cast(row, tl.int64)
        if HAS_TEACHER_ROWS:
            slots_row, exists = chosen_row(teacher_rows_ptr, row, n_teacher_rows)
            weight = poisoned(weight, exists)
            scale = poisoned(scale, exists)
        if WRITE_GRADIENT:
            fill_zero(gradient, lead, width, tl.where(weight == 0.0, 0, n_cols), LANES, WIDTH, ENDS)
        loss = 0.0
        hard_loss = 0.0
        if OUTPUTS != 0:
            if weight == 0.0:
                store_outputs(row, outputs, (0.0, 0.0, 0.0, -1, -1, 0.0, 0.0), WANTED)
        if weight != 0.0:
            row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
            slots = slots_row * k
            token_id, used, log_p, log_p_rest, l_t, good = read_teacher(
                log_probs_ptr + slots, ids_ptr + slots, lane, k, n_cols, TAIL
            )
            position = (token_id + lead).to(tl.int32)
            x = tl.load(student + position, mask=used, other=-INFINITY).to(tl.float32)
            if HARD:
                label = tl.load(labels_ptr + row)
                known = (label >= 0) & (label < n_cols)
                logit = tl.load(student + lead + label, mask=known, other=float("nan"))
                logit = logit.to(tl.float32)

            m_r = 0.0
            l_r = 0.0
            l_h = 0.0
            if SWEPT:
                mark(words, position, used)
                m_r, row_l_r, l_h, moment, top = sum_outside(
                    student, bitmap, lead, n_cols, c, LANES, WIDTH, ENDS, REST or LOOKS, OWN_HARD, OUTPUTS,
                    UNROLL,
                )  # fmt: skip
                if REST:
                    l_r = row_l_r
                if HARD and not OWN_HARD:
                    l_h = l_r
            elif not WRITE_LOSS:
                m_r = tl.load(kept)
                l_r = tl.load(kept + 1)
                l_h = tl.load(kept + 2)
            if OUTPUTS != 0:
                output_id = 0
                logit_there = 0.0
                if LOG_PROB & OUTPUTS:
                    output_id = tl.load(output_ids_ptr + row)
                    there = (output_id >= 0) & (output_id < n_cols)
                    logit_there = tl.load(
                        student + lead + output_id, mask=there, other=float("nan")
                    )
                outside = (0.0, 0.0, 0.0, NOWHERE)
                if SWEPT:
                    outside = (m_r, row_l_r, moment, top)
                found = topk_outputs(
                    x, token_id, used, log_probs_ptr + slots, lane, outside, lead, n_cols, over_t, logit_there,
                    output_id, ignore_index, OUTPUTS,
                )  # fmt: skip
                store_outputs(row, outputs, shown(found, weight), WANTED)
            y, l, m, row_l = outcomes(x, log_p, lane, k, m_r, l_r, over_t, REST, RESTRICT, EACH)
            outside_loss = 0.0
            outside_slope = 0.0
            if EACH:
                if WRITE_LOSS:
                    outside_loss, outside_slope = terms_outside(
                        student, bitmap, lead, n_cols, (m, row_l, one * 0.0, one, over_t), row_values,
                        VALUE_AND_SLOPE, OPERANDS, DROP, LANES, WIDTH, ENDS,
                    )  # fmt: skip
                else:
                    outside_slope = tl.load(kept + 3)
                y = tl.where(lane == k, -INFINITY, y)
            if SWEPT:
                unmark(words, position, used)
            value, slope, q = outcome_terms(
                y, tl.where(lane == k, log_p_rest, log_p), l, l_t, lane, k, log_prob_floor, row_values,
                VALUE_AND_SLOPE, OPERANDS, DROP, RESTRICT, LEFT_OUT, MASSES, HAS_FLOOR,
            )  # fmt: skip
            # a row without a softmax, in either model, must not vanish among the dropped terms
            poison = tl.where(good & (l > 0.0) & (l_r >= 0.0), 0.0, float("nan"))
            loss = tl.sum(value, axis=0) + outside_loss + poison
            total_slope = tl.sum(slope, axis=0) + outside_slope
            if HARD:
                m_h, hard_l, e_h = hard_normaliser(x, m_r, l_h)
                hard_loss = (m_h - logit) + tl.log(hard_l)
            if WRITE_STATISTICS:
                tl.store(kept, m_r)
                tl.store(kept + 1, l_r)
                tl.store(kept + 2, l_h)
                tl.store(kept + 3, outside_slope)

            if WRITE_GRADIENT:
                hard_scale = scale * hard_weight
                scale *= soft_weight * divergence_scale * over_t
                gradients = fma(q, -total_slope, slope) * scale + poison
                factor = poison
                hard_factor = 0.0
                if REST and not EACH:
                    of_rest = tl.sum(tl.where(lane == k, gradients, 0.0), axis=0)
                    factor += tl.where(l_r > 0.0, tl.fdiv(of_rest, l_r), 0.0)
                if HARD:
                    hard_factor = tl.fdiv(hard_scale, hard_l)
                    gradients += e_h * hard_factor - tl.where(token_id == label, hard_scale, 0.0)
                    if not OWN_HARD and not EACH:
                        shared = hard_factor * tl.exp2((m_r - m_h) * LOG2E)
                        factor += tl.where(l_h > 0.0, shared, 0.0)
                else:
                    m_h = 0.0
                    label = 0
                tl.debug_barrier()  # every thread has its logits before one overwrites them
                spread(
                    student, gradient, lead, n_cols, c, (m_r, factor, m_h, hard_factor),
                    (m, row_l, one * 0.0, one, over_t), (scale, hard_scale, total_slope, lead + label),
                    row_values, VALUE_AND_SLOPE, OPERANDS, DROP, SHARED, EACH, HARD, OWN_HARD,
                    LANES, WIDTH, ENDS, UNROLL,
                )  # fmt: skip
                tl.debug_barrier()
                if HARD and not EACH:  # the label's entry, where it is none of the K
                    entry = factor
                    if SHARED:
                        entry = tl.exp2((logit - m_r) * c) * factor
                    if OWN_HARD:
                        entry += tl.exp2((logit - m_h) * LOG2E) * hard_factor
                    entry = from_float32(entry - hard_scale, gradient_ptr.dtype.element_ty)
                    tl.store(gradient + lead + label, entry, mask=known)
                    tl.debug_barrier()
                gradients = from_float32(gradients, gradient_ptr.dtype.element_ty)
                tl.store(gradient + position, gradients, mask=used)
        if WRITE_LOSS:
            store_losses(
                row, n_rows, loss * (weight * divergence_scale), hard_loss * weight, soft_weight, hard_weight,
                losses_ptr, components_ptr, True, HARD,
            )  # fmt: skip


def run(
    formula: Formula,
    tail: str,
    student: torch.Tensor,  # [..., V]
    log_probs: torch.Tensor,  # [N, K], or of the teacher's rows; contiguous
    ids: torch.Tensor,  # likewise
    labels: torch.Tensor | None,  # [N]
    n_cols: int,
    *,
    mass_terms: bool = False,
    log_prob_floor: float | None = None,
    **buffers,
) -> None:
    """Launch the top-k kernel: losses with the gradient or the statistics, or the gradient alone.

    ``buffers`` are those of :class:`LossBuffers`."""
    buffers = LossBuffers(**buffers)
    if log_prob_floor is not None:  # nothing is infinite
        formula = formula._replace(drop=False, restrict=False)
    n_teacher_rows, k = ids.shape
    n_rows = student.numel() // student.shape[-1]
    n_inner, layouts = row_layouts(student)
    if buffers.gradient is student and not layouts[0].is_in(student):
        raise ValueError(
            f"a gradient in place needs student logits with contiguous columns and leading dimensions "
            f"that two strides reach, got strides {student.stride()}: pass .contiguous()"
        )
    if n_rows == 0:
        return
    width = student.shape[-1]
    (student_rows,) = layouts
    rows = {"student": student_rows, "gradient": buffers.rows(student, student_rows, n_inner)}
    grid, arguments = rows_launch(rows, [student], n_rows, n_cols, width)
    hard = formula.hard_label_weight != 0
    seen = tail in ("renormalize", "ignore")  # columns outside have terms of p = 0
    rest = tail in ("bucket", "drop") or (seen and not formula.restrict)
    own_hard = hard and (formula.temperature != 1 or not rest)
    block_k = triton.next_power_of_2(k + 1)
    words, n_words = student, 0  # student: stands for memory that is not read
    looks = bool(buffers.outputs) and bool(bits(formula.token_outputs) & OF_STUDENT.value)
    if buffers.losses is not None and (rest or hard or looks):
        n_words = launch.padded(n_cols + 8, arguments["LANES"] * arguments["WIDTH"]) // 32
        words = torch.empty((*grid, n_words), dtype=torch.int32, device=student.device)
    topk_kernel[grid](
        **arguments,
        **buffers.arguments(formula, labels, student),
        log_probs_ptr=log_probs,
        ids_ptr=ids,
        n_teacher_rows=n_teacher_rows,
        words_ptr=words,
        bitmap_ptr=words.view(torch.uint8) if n_words else student,
        n_words=n_words,
        n_inner=n_inner,
        width=width,
        k=k,
        TAIL=TAILS[tail],
        REST=rest,
        EACH=rest and seen and not formula.additive,
        LEFT_OUT=tail == "drop",
        MASSES=MASSES[formula.moment] if mass_terms else 0,
        HAS_FLOOR=log_prob_floor is not None,
        log_prob_floor=0.0 if log_prob_floor is None else max(log_prob_floor, LOWEST_FLOAT),
        OWN_HARD=own_hard,
        BLOCK_K=block_k,
        UNROLL=launch.topk_unroll(block_k, arguments["LANES"], own_hard, looks),
    )
