"""Per-token metrics of two rows of logits, in one launch: both normalisers, then every sum.

The second sweep finds the row in cache. Loops are guarded throughout (``sweeps.py``): metrics are
for evaluation, where teachers are often masked, and need no fast form.
"""

import torch
import triton
import triton.language as tl

from .layout import row_layouts
from .math import INFINITY, LN2, LOG2E, log2_of_normal
from .rows import RUN_TIME, first_position, row_offset, rows_launch
from .running import NOWHERE
from .sweeps import DOWN, NO_MOMENT, PEELED, normalise, read, sweep
from .terms import both_exponents, paired_softmax, softmax

# sums of a row: forward and reverse KL, Jensen-Shannon, total variation, sum of min(p, q), entropies
N_SUMS = 7


@triton.jit
def metrics_tile(sums, k, position, inside, student_row, teacher_row, row, MASKED: tl.constexpr):
    forward, reverse, middle, variation, overlap, h_s, h_t, top_s, top_t = sums
    m_s, l_s, m_t, l_t, over_t = row
    x_s = read(student_row, position, inside, MASKED, False)
    x_t = read(teacher_row, position, inside, MASKED, False)
    log_q, _ = softmax(x_s, m_s, l_s, over_t, True)
    log_p, _ = softmax(x_t, m_t, l_t, over_t, True)
    exponents = both_exponents(x_s, x_t, row, True)
    log_ratio, ratio, q, p = paired_softmax(exponents, True, True)
    log_ratio *= LN2
    log_m = log2_of_normal(0.5 + 0.5 * ratio) * LN2
    of_student = q * (tl.where(log_ratio > 0, log_ratio, 0.0) + log_m)
    of_teacher = p * (tl.where(log_ratio > 0, 0.0, log_ratio) - log_m)
    to_student = tl.where((x_s == -INFINITY) & (p > 0), INFINITY, p * log_ratio)
    to_teacher = tl.where((x_t == -INFINITY) & (q > 0), INFINITY, -q * log_ratio)
    return (
        forward + tl.sum(to_student, axis=1),
        reverse + tl.sum(to_teacher, axis=1),
        middle + tl.sum(0.5 * (of_teacher - of_student), axis=1),
        variation + tl.sum(0.5 * tl.abs(q - p), axis=1),
        overlap + tl.sum(tl.minimum(q, p), axis=1),
        h_s - tl.sum(q * log_q, axis=1),
        h_t - tl.sum(p * log_p, axis=1),
        tl.minimum(top_s, tl.min(tl.where(x_s == m_s, position, NOWHERE), axis=1)),
        tl.minimum(top_t, tl.min(tl.where(x_t == m_t, position, NOWHERE), axis=1)),
    )


@triton.jit(do_not_specialize=RUN_TIME)
def metrics_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    sums_ptr, agreement_ptr, n_inner, n_rows, n_cols, over_t,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    STUDENT_MATCHED: tl.constexpr, TEACHER_MATCHED: tl.constexpr,
):  # fmt: skip
    """N_SUMS numbers a row to ``sums`` [N_SUMS, n_rows], and whether the rows' maxima are one column."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        teacher_offset = row_offset(row, teacher_start, teacher_outer, teacher_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        teacher = first_position(teacher_ptr, teacher_offset, lead, TEACHER_MATCHED)
        m_s, l_s, m_t, l_t, _, _, _, _, _, _, _, _, _ = normalise(
            student, teacher, lead, n_cols, over_t * LOG2E, LANES, WIDTH, ENDS,
            True, True, True, NO_MOMENT, False, False, 0,
        )  # fmt: skip
        zero = tl.zeros([LANES], tl.float32)
        none = tl.full([LANES], NOWHERE, tl.int32)
        sums = sweep(
            (zero, zero, zero, zero, zero, zero, zero, none, none), metrics_tile,
            (student, teacher, (m_s, l_s, m_t, l_t, over_t)), (), lead, n_cols, LANES, WIDTH, ENDS,
            DOWN, 1,
        )  # fmt: skip
        # a row without a finite logit, or with NaN, has no softmax
        poison = tl.where((l_s > 0.0) & (l_t > 0.0), 0.0, float("nan"))
        for k in tl.static_range(7):
            target = sums_ptr + tl.cast(k, tl.int64) * n_rows + row
            tl.store(target, tl.sum(sums[k], axis=0) + poison)
        top_s = tl.min(sums[7], axis=0)
        agree = (top_s == tl.min(sums[8], axis=0)) & (top_s < NOWHERE)
        tl.store(agreement_ptr + row, agree.to(tl.uint8))


def run(
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor,  # [..., V]
    temperature: float,
    n_cols: int,
    sums: torch.Tensor,  # [N_SUMS, N] float32
    agreement: torch.Tensor,  # [N] uint8
) -> None:
    """Launch the metrics kernel."""
    n_inner, layouts = row_layouts(student, teacher)
    n_rows = sums.shape[1]
    if n_rows == 0:
        return
    student_rows, teacher_rows = layouts
    rows = {"student": student_rows, "teacher": teacher_rows}
    grid, arguments = rows_launch(rows, [student, teacher], n_rows, n_cols, n_cols)
    metrics_kernel[grid](
        **arguments,
        sums_ptr=sums,
        agreement_ptr=agreement,
        n_inner=n_inner,
        over_t=1.0 / temperature,
    )
