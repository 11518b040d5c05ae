"""The dense loss: student and teacher logits in, per-token losses and the student's gradient out.

One program walks whole rows: sweep, sweep again while the row is still in cache, next row. With
``value`` and ``slope`` of a divergence, ``D = sum(slope)``, u and w the weights of divergence and hard
label, k either 1 or T**2 and q_1 the student's softmax at temperature 1,

    loss     = weight * (u * k * sum(value) + w * cross_entropy)
    gradient = weight / denominator * (u * k * (slope - q * D) / T + w * (q_1 - onehot))

The forward launch writes the gradient, or keeps STATISTICS float32 numbers a row, from which the
backward launch makes it for any upstream gradient.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .layout import row_layouts
from .math import LOG2E
from .outputs import ACCEPTANCE, LOG_PROB
from .row_loss import row_gradient, row_statistics
from .row_outputs import row_outputs, shown, store_outputs
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
from .sweeps import MOMENTS, NO_MOMENT, PEELED, SYMMETRIC_MOMENT, fill_zero
from .terms import PAIR, log_of

STATISTICS = tl.constexpr(launch.STATISTICS)


@triton.jit(do_not_specialize=RUN_TIME)
def dense_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    gradient_ptr, gradient_start, gradient_outer, gradient_inner,
    teacher_rows_ptr, teacher_n_inner, n_teacher_rows,
    losses_ptr, components_ptr, statistics_ptr, weights_ptr, labels_ptr, output_ids_ptr, upstream_ptr,
    upstream_stride, outputs, denominator, n_inner, n_rows, n_cols, width, ignore_index, over_t,
    divergence_scale, soft_weight, hard_weight, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr, MOMENT: tl.constexpr,
    DROP: tl.constexpr, RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr, TEMPERED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DENOMINATOR_IN_MEMORY: tl.constexpr,
    HAS_TEACHER_ROWS: tl.constexpr,
    WRITE_LOSS: tl.constexpr, WRITE_STATISTICS: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
    OUTPUTS: tl.constexpr, WANTED: tl.constexpr, ACCEPTANCE_AT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
    TEACHER_MATCHED: tl.constexpr, GRADIENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """Losses of ``n_rows`` rows, with their gradient (forward launch) or their statistics; or,
    without WRITE_LOSS, the gradient from the statistics and upstream gradients (backward launch).

    ``components`` is [2, n_rows], divergence and hard label, and written only with HARD;
    ``outputs`` are [n_rows] each, those of OUTPUTS. A row of weight 0 is not read: loss 0, gradient 0.
    With HAS_TEACHER_ROWS the teacher has ``n_teacher_rows`` rows, its leading dimensions collapsed by
    themselves.
    """
    OWN_HARD: tl.constexpr = HARD and (TEMPERED or not DIVERGENCE)
    # a moment gives D before the gradient sweep, which then sums L itself; of the symmetric KL the
    # moments are kept or summed again as accurately
    SHORT: tl.constexpr = MOMENT != NO_MOMENT or not DIVERGENCE
    OVERLAP: tl.constexpr = WRITE_GRADIENT and (ACCEPTANCE & OUTPUTS) != 0
    GRADIENT_SUMS: tl.constexpr = MOMENT != SYMMETRIC_MOMENT and (SHORT or OPERANDS >= PAIR)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        if HAS_TEACHER_ROWS:
            teacher_row, exists = chosen_row(teacher_rows_ptr, row, n_teacher_rows)
            teacher_offset = row_offset(
                teacher_row, teacher_start, teacher_outer, teacher_inner, teacher_n_inner
            )
        else:
            teacher_offset = row_offset(row, teacher_start, teacher_outer, teacher_inner, n_inner)
        gradient_offset = row_offset(row, gradient_start, gradient_outer, gradient_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        teacher = first_position(teacher_ptr, teacher_offset, lead, TEACHER_MATCHED)
        gradient = first_position(gradient_ptr, gradient_offset, lead, GRADIENT_MATCHED)

        kept = statistics_ptr + row * STATISTICS
        weight, scale = row_scale(
            row, kept, weights_ptr, denominator, upstream_ptr, upstream_stride, STATISTICS,
            HAS_WEIGHTS, DENOMINATOR_IN_MEMORY, WRITE_LOSS, WRITE_STATISTICS,
        )  # fmt: skip
        if HAS_TEACHER_ROWS:
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
            label = tl.load(labels_ptr + row) if HARD else 0
            row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
            if WRITE_LOSS:
                if HARD:  # before any thread is past the sweeps: the gradient may overwrite it
                    known = (label >= 0) & (label < n_cols)
                    logit = tl.load(student + lead + label, mask=known, other=float("nan"))
                if LOG_PROB & OUTPUTS:
                    token_id = tl.load(output_ids_ptr + row)
                    id_known = (token_id >= 0) & (token_id < n_cols)
                    id_logit = tl.load(student + lead + token_id, mask=id_known, other=float("nan"))
                else:
                    token_id = 0
                    id_logit = 0.0
                loss, statistics, seen = row_statistics(
                    student, teacher, lead, n_cols, over_t, row_values,
                    VALUE_AND_SLOPE, OPERANDS, MOMENT, DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, OWN_HARD,
                    LANES, WIDTH, ENDS, WRITE_GRADIENT, OUTPUTS,
                )  # fmt: skip
                if OUTPUTS != 0:
                    found = row_outputs(
                        student, teacher, lead, n_cols, over_t, seen, statistics[7], id_logit, token_id,
                        ignore_index, OUTPUTS, not OVERLAP, LANES, WIDTH, ENDS,
                    )  # fmt: skip
                    store_outputs(row, outputs, shown(found, weight), WANTED)
                if HARD:
                    logit = logit.to(tl.float32)
                    hard_loss = (statistics[5] - logit) + tl.log(statistics[6])
                    of_fast = -log_of(
                        logit, statistics[5], statistics[6], tl.cast(LOG2E, tl.float32)
                    )
                    hard_loss = tl.where(statistics[7], of_fast, hard_loss)
            else:
                statistics = (
                    tl.load(kept), tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3),
                    tl.load(kept + 4), tl.load(kept + 5), tl.load(kept + 6), tl.load(kept + 7) > 0.0,
                )  # fmt: skip
            if WRITE_STATISTICS:
                for i in tl.static_range(STATISTICS - 1):
                    tl.store(kept + i, statistics[i].to(tl.float32))
            if WRITE_GRADIENT:
                gradient_loss, gradient_overlap = row_gradient(
                    student, teacher, gradient, lead, n_cols, statistics, over_t,
                    scale * soft_weight * divergence_scale * over_t, scale * hard_weight,
                    label, row_values, VALUE_AND_SLOPE, OPERANDS, SHORT, DROP, RESTRICT, PROPAGATE, DIVERGENCE,
                    HARD, OWN_HARD, LANES, WIDTH, ENDS, OVERLAP,
                )  # fmt: skip
                if WRITE_LOSS and GRADIENT_SUMS:
                    loss = tl.where(statistics[7], gradient_loss, loss)
                if OVERLAP:  # of a row that the fast loops serve, the gradient's has it
                    if statistics[7]:
                        unknown = tl.where(weight == weight, 0.0, float("nan"))
                        tl.store(outputs[ACCEPTANCE_AT] + row, gradient_overlap + unknown)
        if WRITE_LOSS:
            store_losses(
                row, n_rows, loss * (weight * divergence_scale), hard_loss * weight, soft_weight, hard_weight,
                losses_ptr, components_ptr, DIVERGENCE, HARD,
            )  # fmt: skip


def run(
    formula: Formula,
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor | None,  # [..., V]
    labels: torch.Tensor | None,  # [N]
    n_cols: int,
    **buffers,
) -> None:
    """Launch the dense kernel: losses with the gradient or the statistics, or the gradient alone.

    ``buffers`` are those of :class:`LossBuffers`."""
    buffers = LossBuffers(**buffers)
    teacher_given = formula.value_and_slope is not None
    tensors = [student, teacher if teacher_given else student]
    inplace = buffers.gradient is student
    if not teacher_given:
        buffers = buffers._replace(teacher_rows=None)
    chosen = buffers.teacher_rows is not None
    if chosen:  # the teacher's leading dimensions are its own
        n_inner, layouts = row_layouts(student)
        teacher_n_inner, (of_teacher,) = row_layouts(teacher)
        layouts.append(of_teacher)
    else:
        n_inner, layouts = row_layouts(*tensors)
        teacher_n_inner = n_inner
    if inplace and not layouts[0].is_in(student):  # a copy, for the teacher's strides or its own
        if not chosen:
            tensors[1] = tensors[1].contiguous()
            n_inner, layouts = row_layouts(*tensors)
        if not layouts[0].is_in(student):
            raise ValueError(
                f"inplace=True needs student_logits with contiguous columns and leading dimensions "
                f"that two strides reach, got strides {student.stride()}: pass .contiguous(), or "
                f"inplace=False"
            )
    n_rows = student.numel() // student.shape[-1]
    if n_rows == 0:
        return
    width = student.shape[-1]
    student_rows, teacher_rows = layouts
    rows = {"student": student_rows, "teacher": teacher_rows}
    rows["gradient"] = buffers.rows(student, student_rows, n_inner)
    logits = tensors if teacher_given else tensors[:1]
    grid, arguments = rows_launch(
        rows, logits, n_rows, n_cols, width, "teacher" if chosen else None
    )
    dense_kernel[grid](
        **arguments,
        **buffers.arguments(formula, labels, student),
        n_inner=n_inner,
        teacher_n_inner=teacher_n_inner,
        n_teacher_rows=teacher.numel() // teacher.shape[-1] if chosen else 0,
        width=width,
        MOMENT=MOMENTS[formula.moment],
        PROPAGATE=formula.propagate,
        DIVERGENCE=teacher_given,
        TEMPERED=formula.hard_label_weight != 0 and formula.temperature != 1,
    )
