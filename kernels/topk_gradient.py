"""The top-k loss's gradient over a part of each row, for ranks that split the vocabulary: the last of the
launches of ``topk_phases.py``, from what is kept of the whole rows.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .math import LOG2E, fma, from_float32
from .rows import RUN_TIME, Formula, first_position, pointers, row_offset, row_parameters
from .running import finite_or_zero
from .sweeps import PEELED, fill_zero
from .topk_outside import spread
from .topk_part import (
    STATISTICS,
    WEIGHT,
    Slots,
    outcome_exponents,
    part_rows,
    part_slots,
    whole_row,
)
from .topk_terms import outcome_terms


@triton.jit(do_not_specialize=RUN_TIME)
def topk_differentiate_kernel(
    student_ptr, student_start, student_outer, student_inner,
    gradient_ptr, gradient_start, gradient_outer, gradient_inner,
    log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset_ptr,
    kept_ptr, labels_ptr, upstream_ptr, upstream_stride, n_inner, n_rows, n_cols, width, k,
    log_prob_floor, over_t, divergence_scale, soft_weight, hard_weight, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr,
    TAIL: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr, REST: tl.constexpr,
    EACH: tl.constexpr, LEFT_OUT: tl.constexpr, MASSES: tl.constexpr, HAS_FLOOR: tl.constexpr,
    HARD: tl.constexpr, OWN_HARD: tl.constexpr, HAS_TEACHER_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    UNROLL: tl.constexpr, STUDENT_MATCHED: tl.constexpr, GRADIENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """The gradient of a part's columns of ``n_rows`` rows, from the whole rows' numbers ``kept`` and the
    incoming gradients."""
    SHARED: tl.constexpr = (REST and not EACH) or (HARD and not OWN_HARD and not EACH)
    lane = tl.arange(0, BLOCK_K)
    offset = tl.load(offset_ptr)
    one = tl.cast(1.0, tl.float32)
    c = over_t * LOG2E
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        gradient_offset = row_offset(row, gradient_start, gradient_outer, gradient_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        gradient = first_position(gradient_ptr, gradient_offset, lead, GRADIENT_MATCHED)
        kept = kept_ptr + tl.cast(row, tl.int64) * STATISTICS
        weight = tl.load(kept + WEIGHT)
        fill_zero(gradient, lead, width, tl.where(weight == 0.0, 0, n_cols), LANES, WIDTH, ENDS)
        if weight != 0.0:
            upstream = tl.load(upstream_ptr + tl.cast(row, tl.int64) * upstream_stride)
            scale = weight * upstream.to(tl.float32)
            row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
            _, here, position, x, read, log_p, log_p_rest, l_t, _ = part_slots(
                row, student, lead, log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset, n_cols,
                lane, k, TAIL, RESTRICT, HAS_TEACHER_ROWS,
            )  # fmt: skip
            m, l, row_l, top, y_rest = whole_row(kept, over_t)
            m_r = finite_or_zero(tl.load(kept + 2))
            l_r = tl.load(kept + 3)
            total_slope = tl.load(kept + 4)
            slope_more = tl.load(kept + 9)
            at = -1
            if REST and not EACH:
                at = tl.where(l_r > 0.0, k, -1)  # of a rest without columns nothing is written
            y = outcome_exponents(read, m, top, y_rest, over_t, lane, at)
            _, slope, q = outcome_terms(
                y, tl.where(lane == at, log_p_rest, log_p), l, l_t, lane, k, log_prob_floor, row_values,
                VALUE_AND_SLOPE, OPERANDS, DROP, RESTRICT, LEFT_OUT, MASSES, HAS_FLOOR,
            )  # fmt: skip
            poison = tl.where(total_slope == total_slope, 0.0, float("nan"))
            hard_scale = scale * hard_weight
            scale *= soft_weight * divergence_scale * over_t
            gradients = fma(q, -slope_more, fma(q, -total_slope, slope)) * scale + poison
            factor = poison
            if REST and not EACH:
                of_rest = tl.sum(tl.where(lane == k, gradients, 0.0), axis=0)
                factor += tl.where(l_r > 0.0, tl.fdiv(of_rest, l_r), 0.0)
            hard_factor = 0.0
            m_h = 0.0
            label = 0
            if HARD:
                label = tl.load(labels_ptr + row)
                known = (label >= 0) & (label < n_cols)
                logit = tl.load(student + lead + label, mask=known, other=0.0).to(tl.float32)
                m_h = finite_or_zero(tl.load(kept + 5))
                hard_factor = tl.fdiv(hard_scale, tl.load(kept + 6))
                of_slots = tl.exp2((x - m_h) * LOG2E) * hard_factor
                gradients += of_slots - tl.where(position == lead + label, hard_scale, 0.0)
                if not OWN_HARD and not EACH:
                    shared = hard_factor * tl.exp2((m_r - m_h) * LOG2E)
                    factor += tl.where(l_r > 0.0, shared, 0.0)
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
            tl.store(gradient + position, gradients, mask=here)


def differentiate(
    formula: Formula,
    slots: Slots,
    student: torch.Tensor,  # [..., V]
    labels: torch.Tensor | None,  # [N]
    n_cols: int,
    *,
    kept: torch.Tensor,  # [N, KEPT] float32
    upstream: torch.Tensor,  # [N] or []
    gradient: torch.Tensor,  # [..., V], one stride to its rows
) -> None:
    """Write a part's gradient, that of the reduced loss times ``upstream``."""
    if kept.shape[0] == 0:
        return
    formula, of_slots = slots.arguments(formula)
    grid, arguments = part_rows(student, n_cols, gradient)
    rest, each = slots.sees(formula)
    hard, own_hard = slots.hard(formula)
    topk_differentiate_kernel[grid](
        **arguments,
        **(of_slots | slots.outcomes(formula)),
        **pointers(student, labels=labels),
        kept_ptr=kept,
        upstream_ptr=upstream,
        upstream_stride=upstream.stride(0) if upstream.dim() else 0,
        width=student.shape[-1],
        divergence_scale=float(formula.divergence_scale),
        soft_weight=float(formula.soft_weight),
        hard_weight=float(formula.hard_label_weight),
        REST=rest,
        EACH=each,
        HARD=hard,
        OWN_HARD=own_hard,
        UNROLL=launch.topk_unroll(of_slots["BLOCK_K"], arguments["LANES"], own_hard, False),
    )
