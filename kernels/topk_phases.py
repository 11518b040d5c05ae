"""Top-k loss launches over a part of each row, for ranks that split the vocabulary.

``normalise`` writes numbers of a part's columns, of the K that lie in them and of those outside, which
all ranks get and combine. From the whole rows' numbers ``reduce`` sums the part's L and D, and
``topk_gradient.py`` writes its gradient. Every rank has all slots; ids count from the first rank's
column.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .math import INFINITY, LOG2E
from .phases import store_numbers
from .rows import RUN_TIME, Formula, first_position, pointers, row_offset, row_parameters
from .running import finite_or_zero
from .sweeps import PEELED
from .topk import hard_normaliser
from .topk_outside import clear, mark, sum_outside, terms_outside, unmark
from .topk_part import (
    STATISTICS,
    WEIGHT,
    Slots,
    bitmap_of,
    outcome_exponents,
    part_rows,
    part_slots,
    whole_row,
)
from .topk_terms import outcome_terms

# Of a part: maximum and sum of the columns outside the K; maximum of the K and their sum without the 1 of
# that; how many of the slots lie in it and how many are used in all; and the hard label's maximum, sum,
# logit, and whether it is in it.
NUMBERS, ALL_NUMBERS = 6, 10
EMPTY_PART = tl.constexpr(
    (-float("inf"), 0.0, -float("inf"), 0.0, 0.0, 0.0, -float("inf"), 0.0, -float("inf"), 0.0)
)
SUMS = 3  # L, D, and what D's rounding left: nothing, of sums in float32


@triton.jit(do_not_specialize=RUN_TIME)
def topk_normalise_kernel(
    student_ptr, student_start, student_outer, student_inner,
    log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset_ptr, words_ptr, bitmap_ptr, n_words,
    weights_ptr, labels_ptr, parts_ptr, n_inner, n_rows, n_cols, k, over_t,
    TAIL: tl.constexpr, RESTRICT: tl.constexpr, REST: tl.constexpr, HARD: tl.constexpr,
    OWN_HARD: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_TEACHER_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    UNROLL: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """A part's numbers of ``n_rows`` rows as rows of ``parts``, which is [6, n_rows], or with HARD
    [10, n_rows]. A row of weight 0 is not read: 0 and -inf."""
    SWEPT: tl.constexpr = REST or HARD
    if SWEPT:
        words = words_ptr + tl.program_id(0) * n_words
        bitmap = bitmap_ptr + tl.program_id(0) * n_words * 4
        clear(words, n_words, LANES)
    lane = tl.arange(0, BLOCK_K)
    offset = tl.load(offset_ptr)
    c = over_t * LOG2E
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        target = parts_ptr + row
        weight = tl.cast(tl.load(weights_ptr + row) if HAS_WEIGHTS else 1.0, tl.float32)
        if weight == 0.0:
            store_numbers(target, n_rows, EMPTY_PART, 0, 10 if HARD else 6)
        else:
            n_used, here, position, x, read, _, _, _, poison = part_slots(
                row, student, lead, log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset, n_cols,
                lane, k, TAIL, RESTRICT, HAS_TEACHER_ROWS,
            )  # fmt: skip
            m_r = -INFINITY
            l_r = 0.0
            if SWEPT:
                mark(words, position, here)
                m_outside, l_outside, l_h, _, _ = sum_outside(
                    student, bitmap, lead, n_cols, c, LANES, WIDTH, ENDS, REST, OWN_HARD, 0, UNROLL
                )
                unmark(words, position, here)
                if REST:
                    l_r = l_outside
                    m_r = tl.where(l_r == 0.0, -INFINITY, m_outside)
                if HARD and not OWN_HARD:
                    l_h = l_outside
            m_k = tl.max(read, axis=0)
            first = tl.min(tl.where(read == m_k, lane, BLOCK_K), axis=0)
            e = tl.exp2((read - finite_or_zero(m_k)) * c)
            more = tl.sum(tl.where(lane == first, 0.0, e), axis=0)
            n_here = tl.sum(here.to(tl.float32), axis=0)
            numbers = m_r, l_r, m_k, more + poison, n_here, n_used
            store_numbers(target, n_rows, numbers, 0, 6)
            if HARD:
                label = tl.load(labels_ptr + row)
                found = (label >= 0) & (label < n_cols)
                logit = tl.load(student + lead + label, mask=found, other=-INFINITY)
                m_h, hard_l, _ = hard_normaliser(x, m_outside, l_h)
                m_h = tl.where(hard_l == 0.0, -INFINITY, m_h)
                of_label = (m_h, hard_l, logit.to(tl.float32), found.to(tl.float32))
                store_numbers(target, n_rows, of_label, 6, 10)


@triton.jit(do_not_specialize=[*RUN_TIME, "with_rest"])
def topk_reduce_kernel(
    student_ptr, student_start, student_outer, student_inner,
    log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset_ptr, words_ptr, bitmap_ptr, n_words,
    kept_ptr, sums_ptr, n_inner, n_rows, n_cols, k, with_rest, log_prob_floor, over_t, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr,
    TAIL: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr, EACH: tl.constexpr,
    LEFT_OUT: tl.constexpr, MASSES: tl.constexpr, HAS_FLOOR: tl.constexpr,
    HAS_TEACHER_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    ENDS: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """A part's L and D of ``n_rows`` rows as rows of ``sums``, which is [3, n_rows], from the whole rows'
    numbers ``kept``; the rest's are among them if ``with_rest`` is not 0. NaN for a row without a
    softmax, in either model; 0 for one that is not read."""
    if EACH:
        words = words_ptr + tl.program_id(0) * n_words
        bitmap = bitmap_ptr + tl.program_id(0) * n_words * 4
        clear(words, n_words, LANES)
    lane = tl.arange(0, BLOCK_K)
    offset = tl.load(offset_ptr)
    one = tl.cast(1.0, tl.float32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        kept = kept_ptr + tl.cast(row, tl.int64) * STATISTICS
        loss = 0.0
        total_slope = 0.0
        if tl.load(kept + WEIGHT) != 0.0:
            row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
            _, here, position, _, read, log_p, log_p_rest, l_t, poison = part_slots(
                row, student, lead, log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset, n_cols,
                lane, k, TAIL, RESTRICT, HAS_TEACHER_ROWS,
            )  # fmt: skip
            m, l, row_l, top, y_rest = whole_row(kept, over_t)
            of_rest = (with_rest != 0) & (tl.load(kept + 7) != 0.0)
            at = tl.where(of_rest, k, -1)
            if EACH:
                at = -1
                mark(words, position, here)
                loss, total_slope = terms_outside(
                    student, bitmap, lead, n_cols, (m, row_l, one * 0.0, one, over_t), row_values,
                    VALUE_AND_SLOPE, OPERANDS, DROP, LANES, WIDTH, ENDS,
                )  # fmt: skip
                unmark(words, position, here)
            y = outcome_exponents(read, m, top, y_rest, over_t, lane, at)
            value, slope, _ = outcome_terms(
                y, tl.where(lane == at, log_p_rest, log_p), l, l_t, lane, k, log_prob_floor, row_values,
                VALUE_AND_SLOPE, OPERANDS, DROP, RESTRICT, LEFT_OUT, MASSES, HAS_FLOOR,
            )  # fmt: skip
            poison += tl.where(l > 0.0, 0.0, float("nan"))
            loss += tl.sum(value, axis=0) + poison
            total_slope += tl.sum(slope, axis=0) + poison
        store_numbers(sums_ptr + row, n_rows, (loss, total_slope, 0.0), 0, 3)


def normalise(
    formula: Formula,
    slots: Slots,
    student: torch.Tensor,  # [..., V], this part's columns, one at least
    labels: torch.Tensor | None,  # [N], counted from the part's first column
    n_cols: int,  # of V that are used
    *,
    parts: torch.Tensor,  # [NUMBERS, N] float32; with a hard label [ALL_NUMBERS, N]
    weights: torch.Tensor | None = None,  # [N]
) -> None:
    """Write a part's numbers."""
    if parts.shape[1] == 0:
        return
    formula, of_slots = slots.arguments(formula)
    grid, arguments = part_rows(student, n_cols)
    rest, _ = slots.sees(formula)
    hard, own_hard = slots.hard(formula)
    topk_normalise_kernel[grid](
        **arguments,
        **of_slots,
        **pointers(student, weights=weights, labels=labels),
        **bitmap_of(grid, arguments, student, rest or hard),
        parts_ptr=parts,
        over_t=1.0 / formula.temperature,
        REST=rest,
        HARD=hard,
        OWN_HARD=own_hard,
        HAS_WEIGHTS=weights is not None,
        UNROLL=launch.topk_unroll(of_slots["BLOCK_K"], arguments["LANES"], own_hard, False),
    )


def reduce(
    formula: Formula,
    slots: Slots,
    student: torch.Tensor,  # [..., V]
    n_cols: int,
    *,
    kept: torch.Tensor,  # [N, KEPT] float32, of whole rows
    sums: torch.Tensor,  # [SUMS, N] float32
    with_rest: bool,  # whether the rest's terms are among them, which one part's are
) -> None:
    """Write a part's L and D, by the whole rows' numbers."""
    if sums.shape[1] == 0:
        return
    formula, of_slots = slots.arguments(formula)
    grid, arguments = part_rows(student, n_cols)
    _, each = slots.sees(formula)
    topk_reduce_kernel[grid](
        **arguments,
        **(of_slots | slots.outcomes(formula)),
        **bitmap_of(grid, arguments, student, each),
        kept_ptr=kept,
        sums_ptr=sums,
        with_rest=int(with_rest),
        EACH=each,
    )
