"""What on-policy distillation needs of a token, in one launch: the divergence of student and teacher,
both models' log-probability of the token, both entropies and whether they agree on the likeliest one;
and one gradient of divergence, student's log-probability and entropy together (semantics.md, 12).

The parts are those of the token kernel and of the dense kernel, one after the other: after the first
of them the rows are in cache. The backward launch is one sweep.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .layout import row_layouts, uniform_rows
from .math import LOG2E, fma
from .row_loss import row_statistics
from .rows import (
    RUN_TIME,
    Formula,
    first_position,
    pointers,
    row_offset,
    row_parameters,
    rows_launch,
)
from .running import NOWHERE
from .sweeps import MOMENTS, PEELED, UP, fill_zero, read, sweep, write
from .terms import column_terms
from .token_row import (
    token_coefficients,
    token_gradient,
    token_gradient_tile,
    token_log_prob,
    token_sweep,
)

OUTPUTS = 5  # divergence, both log-probabilities, both entropies
DENSE_KEPT = tl.constexpr(launch.STATISTICS)
TOKEN_KEPT = tl.constexpr(launch.TOKEN_STATISTICS)


@triton.jit
def combined_tile(
    state, k, position, inside, student_row, teacher_row, gradient_row, row, token, scales, parameters,
    MASKED: tl.constexpr, VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, GUARDED: tl.constexpr,
    DROP: tl.constexpr, RESTRICT: tl.constexpr,
):  # fmt: skip
    scale, total_slope, poison = scales
    m, c, a, b, token_position, own = token
    x_s = read(student_row, position, inside, MASKED, False)
    x_t = read(teacher_row, position, inside, MASKED, False)
    _, slope, q = column_terms(
        x_s, x_t, inside, row, parameters,
        VALUE_AND_SLOPE, OPERANDS, False, MASKED, GUARDED, DROP, RESTRICT, False,
    )  # fmt: skip
    gradient = fma(q, -total_slope, slope) * scale + token_gradient_tile(x_s, m, c, a, b, True)
    gradient += tl.where(position == token_position, own, 0.0)
    if GUARDED:
        gradient += poison
    write(gradient_row, position, gradient, inside, MASKED)
    return state


@triton.jit(do_not_specialize=RUN_TIME)
def statistics_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    gradient_ptr, gradient_start, gradient_outer, gradient_inner,
    ids_ptr, outputs_ptr, agreement_ptr, dense_ptr, token_ptr,
    upstream_ptr, upstream_log_prob_ptr, upstream_entropy_ptr,
    n_inner, n_rows, n_cols, over_t, ignore_index, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr,
    MOMENT: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr,
    WRITE_STATISTICS: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
    TEACHER_MATCHED: tl.constexpr, GRADIENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """Forward launch: OUTPUTS numbers a row to ``outputs`` [OUTPUTS, n_rows], the agreement, and
    where asked for what the gradient needs of a row. WRITE_GRADIENT: the gradient, from that and the
    three upstream gradients. A row whose id is ``ignore_index`` is not read: 0 everywhere.
    """
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        teacher_offset = row_offset(row, teacher_start, teacher_outer, teacher_inner, n_inner)
        gradient_offset = row_offset(row, gradient_start, gradient_outer, gradient_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        teacher = first_position(teacher_ptr, teacher_offset, lead, TEACHER_MATCHED)
        gradient = first_position(gradient_ptr, gradient_offset, lead, GRADIENT_MATCHED)
        dense = dense_ptr + tl.cast(row, tl.int64) * DENSE_KEPT
        token = token_ptr + tl.cast(row, tl.int64) * TOKEN_KEPT
        token_id = tl.load(ids_ptr + row)
        row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
        c = over_t * LOG2E
        if WRITE_GRADIENT:
            if token_id == ignore_index:
                fill_zero(gradient, lead, n_cols, 0, LANES, WIDTH, ENDS)
            else:
                m = tl.load(token)
                l = tl.load(token + 1)
                entropy = tl.load(token + 2)
                upstream = tl.load(upstream_log_prob_ptr + row)
                upstream_entropy = tl.load(upstream_entropy_ptr + row)
                scale = tl.load(upstream_ptr + row) * over_t
                if scale == 0.0:  # the divergence is not asked for: the teacher is not read
                    token_gradient(
                        student, gradient, lead, n_cols, token_id, m, l, entropy, over_t,
                        upstream, upstream_entropy, LANES, WIDTH, ENDS, True,
                    )  # fmt: skip
                else:
                    l_s = tl.load(dense + 1)
                    l_t = tl.load(dense + 3)
                    of_row = (tl.load(dense), l_s, tl.load(dense + 2), l_t, over_t)
                    total_slope = tl.load(dense + 4)
                    a, b = token_coefficients(l, entropy, over_t, upstream, upstream_entropy)
                    of_token = (m, c, a, b, lead + token_id, upstream * over_t)
                    if tl.load(dense + 7) > 0.0:
                        scales = (scale, total_slope, 0.0)
                        sweep(
                            tl.cast(0.0, tl.float32), combined_tile,
                            (student, teacher, gradient, of_row, of_token, scales, row_values),
                            (VALUE_AND_SLOPE, OPERANDS, False, DROP, RESTRICT),
                            lead, n_cols, LANES, WIDTH, ENDS, UP, 1,
                        )  # fmt: skip
                    else:
                        poison = tl.where((l_s > 0.0) & (l_t > 0.0), 0.0, float("nan"))
                        scales = (scale, total_slope, poison)
                        sweep(
                            tl.cast(0.0, tl.float32), combined_tile,
                            (student, teacher, gradient, of_row, of_token, scales, row_values),
                            (VALUE_AND_SLOPE, OPERANDS, True, DROP, RESTRICT),
                            lead, n_cols, LANES, WIDTH, ENDS, UP, 1,
                        )  # fmt: skip
        else:
            outputs = (0.0, 0.0, 0.0, 0.0, 0.0)
            agree = False
            if WRITE_STATISTICS:
                for i in tl.static_range(DENSE_KEPT):
                    tl.store(dense + i, 0.0)
                for i in tl.static_range(TOKEN_KEPT):
                    tl.store(token + i, 0.0)
            if token_id != ignore_index:
                m_s, l_s, h_s, top_s = token_sweep(
                    student, lead, n_cols, c, LANES, WIDTH, ENDS, True, True, True
                )
                m_t, l_t, h_t, top_t = token_sweep(
                    teacher, lead, n_cols, c, LANES, WIDTH, ENDS, True, True, True
                )
                loss, kept, _ = row_statistics(
                    student, teacher, lead, n_cols, over_t, row_values,
                    VALUE_AND_SLOPE, OPERANDS, MOMENT, DROP, RESTRICT, False, True, False, False,
                    LANES, WIDTH, ENDS, False, 0,
                )  # fmt: skip
                known = (token_id >= 0) & (token_id < n_cols)
                x_s = tl.load(student + lead + token_id, mask=known, other=float("nan"))
                x_t = tl.load(teacher + lead + token_id, mask=known, other=float("nan"))
                outputs = (
                    loss, token_log_prob(x_s, m_s, l_s, over_t),
                    token_log_prob(x_t, m_t, l_t, over_t), h_s, h_t,
                )  # fmt: skip
                agree = (top_s == top_t) & (top_s < NOWHERE) & (l_s > 0.0) & (l_t > 0.0)
                if WRITE_STATISTICS:
                    for i in tl.static_range(DENSE_KEPT - 1):
                        tl.store(dense + i, kept[i].to(tl.float32))
                    tl.store(token, m_s)
                    tl.store(token + 1, l_s)
                    tl.store(token + 2, h_s)
            for i in tl.static_range(5):
                tl.store(outputs_ptr + tl.cast(i, tl.int64) * n_rows + row, outputs[i])
            tl.store(agreement_ptr + row, agree.to(tl.uint8))


def run(
    formula: Formula,
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N] int64
    ignore_index: int,
    *,
    outputs: torch.Tensor | None = None,  # [OUTPUTS, N] float32
    agreement: torch.Tensor | None = None,  # [N] uint8
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,  # [N, STATISTICS], [N, TOKEN_...]
    gradient: torch.Tensor | None = None,  # like student, contiguous: write it
    upstream: torch.Tensor | None = None,  # [OUTPUTS, N], of which the student's are read
) -> None:
    """Launch the statistics kernel: the outputs, or the gradient from the statistics."""
    n_inner, layouts = row_layouts(student, teacher)
    n_rows = ids.numel()
    if n_rows == 0:
        return
    n_cols = student.shape[-1]
    student_rows, teacher_rows = layouts
    rows = {"student": student_rows, "teacher": teacher_rows, "gradient": student_rows}
    if gradient is not None:
        rows["gradient"] = uniform_rows(gradient, n_inner)
    grid, arguments = rows_launch(rows, [student, teacher], n_rows, n_cols, n_cols)
    dense_statistics, token_statistics = statistics or (None, None)
    upstreams = (None,) * OUTPUTS if upstream is None else upstream
    of_divergence, of_log_prob, _, of_entropy, _ = upstreams
    arguments |= pointers(
        student, ids=ids, outputs=outputs, agreement=agreement, dense=dense_statistics,
        token=token_statistics, upstream=of_divergence, upstream_log_prob=of_log_prob,
        upstream_entropy=of_entropy,
    )  # fmt: skip
    statistics_kernel[grid](
        **arguments,
        **formula.arguments(),
        n_inner=n_inner,
        ignore_index=ignore_index,
        MOMENT=MOMENTS[formula.moment],
        WRITE_STATISTICS=gradient is None and statistics is not None,
        WRITE_GRADIENT=gradient is not None,
    )
