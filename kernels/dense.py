"""The dense loss: student and teacher logits in, per-token losses and the student's gradient out.

One program walks whole rows: sweep, sweep again while the row is still in cache, next row. With
``value`` and ``slope`` of a divergence, ``D = sum(slope)``, w the hard label's share, k either 1
or T**2 and q_1 the student's softmax at temperature 1,

    loss     = weight * ((1 - w) * k * sum(value) + w * cross_entropy)
    gradient = weight / denominator * ((1 - w) * k * (slope - q * D) / T + w * (q_1 - onehot))

The forward launch writes the gradient, or keeps STATISTICS float32 numbers a row, from which the
backward launch makes it for any upstream gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .columns import OPERANDS, PAIR, log_of_sums, log_quotient
from .layout import Rows, row_layouts, uniform_rows
from .math import LN2, LOG2E
from .sweeps import (
    FORWARD_MOMENT,
    NO_MOMENT,
    PEELED,
    REVERSE_MOMENT,
    SOFT_MOMENT,
    SYMMETRIC_MOMENT,
    TAIL,
    WHOLE_VECTORS,
    differentiate,
    fill_zero,
    normalise,
    reduce,
)

STATISTICS = tl.constexpr(launch.STATISTICS)
NEARLY_EQUAL = tl.constexpr(0.05)  # nats


@triton.jit
def row_offset(row, start, outer_stride, inner_stride, n_inner):
    """Element offset of a row in a tensor whose leading dimensions collapse to two."""
    row = tl.cast(row, tl.int64)
    return start + row // n_inner * outer_stride + row % n_inner * inner_stride


@triton.jit
def row_parameters(parameters, row, STRIDES: tl.constexpr):
    """The divergence's parameters of a row: numbers as they are (stride None), tensors read."""
    values = ()
    for i in tl.static_range(len(STRIDES)):
        if STRIDES[i] is None:
            values = values + (parameters[i],)
        else:
            position = tl.cast(row, tl.int64) * STRIDES[i]
            values = values + (tl.load(parameters[i] + position).to(tl.float32),)
    return values


@triton.jit
def row_scale(
    row, kept, weights_ptr, denominator, upstream_ptr, upstream_stride, STATISTICS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, DENOMINATOR_IN_MEMORY: tl.constexpr, WRITE_LOSS: tl.constexpr,
    WRITE_STATISTICS: tl.constexpr,
):  # fmt: skip
    """A row's weight, and the factor of its gradient in that of the reduced loss: over the
    denominator in a forward launch, which keeps it last of the row's statistics (all 0 for a row
    that is not read); times the incoming gradient in a backward launch."""
    if WRITE_LOSS:
        weight = tl.cast(tl.load(weights_ptr + row) if HAS_WEIGHTS else 1.0, tl.float32)
        over = tl.load(denominator).to(tl.float32) if DENOMINATOR_IN_MEMORY else denominator
        scale = tl.fdiv(weight, over)
        if WRITE_STATISTICS:
            if weight == 0.0:
                for i in tl.static_range(STATISTICS):
                    tl.store(kept + i, 0.0)
            else:
                tl.store(kept + STATISTICS - 1, scale)
    else:
        weight = tl.load(kept + STATISTICS - 1)
        upstream = tl.load(upstream_ptr + tl.cast(row, tl.int64) * upstream_stride)
        scale = weight * upstream.to(tl.float32)
    return weight, scale


@triton.jit
def store_losses(
    row, n_rows, loss, hard_loss, hard_weight, losses_ptr, components_ptr,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """A row's weighted loss, and with HARD the two parts of which it is mixed."""
    if HARD:
        mixed = (1.0 - hard_weight) * loss + hard_weight * hard_loss if DIVERGENCE else hard_loss
        tl.store(losses_ptr + row, mixed)
        tl.store(components_ptr + row, loss)
        tl.store(components_ptr + n_rows + row, hard_loss)
    else:
        tl.store(losses_ptr + row, loss)


@triton.jit
def first_position(pointer, offset, lead, MATCHED: tl.constexpr):
    """Where positions are counted from: ``lead`` columns before the row.

    MATCHED says that this is a 16-byte boundary, in a form that the compiler can prove."""
    if MATCHED:
        return pointer + offset // 8 * 8
    else:
        return pointer + (offset - lead)


@triton.jit
def row_statistics(
    student, teacher, lead, n_cols, over_t, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, MOMENT: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
    OWN_HARD: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """L and what the gradient needs of a row. KEEP: the row will be read once more."""
    c = over_t * LOG2E
    m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h = normalise(
        student, teacher, lead, n_cols, c, LANES, WIDTH, ENDS,
        False, KEEP or MOMENT == NO_MOMENT, DIVERGENCE, MOMENT, RESTRICT, OWN_HARD,
    )  # fmt: skip
    loss = 0.0
    total_slope = 0.0
    if DIVERGENCE:
        if MOMENT == SOFT_MOMENT:
            loss = tl.log(l_s) - moment_t / l_t * LN2
            total_slope = -1.0
        elif MOMENT == FORWARD_MOMENT:
            loss = log_quotient(l_s, l_t) - moment_t / l_t * LN2
            total_slope = -1.0
        elif MOMENT == REVERSE_MOMENT:
            loss = moment_s / l_s * LN2 - log_quotient(l_s, l_t)
            total_slope = loss + 1.0
        elif MOMENT == SYMMETRIC_MOMENT:
            weight = parameters[0]
            log_sums = log_of_sums((m_s, l_s, m_t, l_t, over_t))
            forward = log_sums - moment_t / l_t * over_t
            reverse = moment_s / l_s * over_t - log_sums
            loss = (1.0 - weight) * forward + weight * reverse
            total_slope = weight * reverse + (2.0 * weight - 1.0)
            # where p and q cancel in every term, the moments' absolute error is too large
            if loss < NEARLY_EQUAL:
                loss, total_slope = reduce(
                    student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), parameters,
                    VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, KEEP, DROP, RESTRICT, PROPAGATE,
                )  # fmt: skip
        else:
            loss, total_slope = reduce(
                student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), parameters,
                VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, KEEP, DROP, RESTRICT, PROPAGATE,
            )  # fmt: skip
        # an infinity, or an overflow, anywhere in the row leaves a sum that is not finite
        fast = (l_s > 0.0) & (l_t > 0.0) & (tl.abs(loss + total_slope) < float("inf"))
    else:
        fast = l_h > 0.0
    if HARD and not OWN_HARD:
        m_h = m_s
        l_h = l_s
    if not fast:
        m_s, l_s, m_t, l_t, moment_t, moment_s, m_h, l_h = normalise(
            student, teacher, lead, n_cols, c, LANES, WIDTH, ENDS,
            True, True, DIVERGENCE, NO_MOMENT, RESTRICT and not PROPAGATE, HARD,
        )  # fmt: skip
        if DIVERGENCE:
            loss, total_slope = reduce(
                student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), parameters,
                VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, True, KEEP, DROP, RESTRICT, PROPAGATE,
            )  # fmt: skip
            if MOMENT == REVERSE_MOMENT and not PROPAGATE:  # the restricted student sums to 1
                total_slope = loss + 1.0
            # a row without a finite logit, and NaN, must not vanish among the dropped terms
            loss += tl.where((l_s > 0.0) & (l_t > 0.0), 0.0, float("nan"))
    return loss, (m_s, l_s, m_t, l_t, total_slope, m_h, l_h, fast)


@triton.jit
def row_gradient(
    student, teacher, gradient, lead, n_cols, statistics, over_t, scale, hard_scale, label, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, SHORT: tl.constexpr, DROP: tl.constexpr,
    RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
    OWN_HARD: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient; returns L as its fast loops sum it. SHORT: one sweep came before."""
    m_s, l_s, m_t, l_t, total_slope, m_h, l_h, fast = statistics
    row = (m_s, l_s, m_t, l_t, over_t)
    hard = (m_h, l_h, lead + label)
    loss = 0.0
    if fast:
        scales = (scale, hard_scale, total_slope, 0.0)
        loss = differentiate(
            student, teacher, gradient, lead, n_cols, row, hard, scales, parameters,
            VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, not SHORT,
            DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, OWN_HARD,
        )  # fmt: skip
    else:
        if DIVERGENCE:
            good = (l_s > 0.0) & (l_t > 0.0)
        else:
            good = l_h > 0.0
        scales = (scale, hard_scale, total_slope, tl.where(good, 0.0, float("nan")))
        differentiate(
            student, teacher, gradient, lead, n_cols, row, hard, scales, parameters,
            VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, True, not SHORT,
            DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, HARD,
        )  # fmt: skip
    return loss


@triton.jit(
    do_not_specialize=[
        "student_start", "student_outer", "student_inner", "teacher_start", "teacher_outer",
        "teacher_inner", "gradient_start", "gradient_outer", "gradient_inner", "n_inner", "n_rows", "n_cols", "width",
        "denominator", "over_t", "divergence_scale", "hard_weight", "upstream_stride",
    ]
)  # fmt: skip
def dense_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    gradient_ptr, gradient_start, gradient_outer, gradient_inner,
    losses_ptr, components_ptr, statistics_ptr, weights_ptr, labels_ptr, upstream_ptr, upstream_stride,
    denominator, n_inner, n_rows, n_cols, width, over_t, divergence_scale, hard_weight, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr, MOMENT: tl.constexpr,
    DROP: tl.constexpr, RESTRICT: tl.constexpr, PROPAGATE: tl.constexpr, DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr, TEMPERED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DENOMINATOR_IN_MEMORY: tl.constexpr,
    WRITE_LOSS: tl.constexpr, WRITE_STATISTICS: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
    TEACHER_MATCHED: tl.constexpr, GRADIENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """Losses of ``n_rows`` rows, with their gradient (forward launch) or their statistics; or,
    without WRITE_LOSS, the gradient from the statistics and upstream gradients (backward launch).

    ``components`` is [2, n_rows], divergence and hard label, and written only with HARD.
    A row of weight 0 is not read: loss 0, gradient 0.
    """
    OWN_HARD: tl.constexpr = HARD and (TEMPERED or not DIVERGENCE)
    # a moment gives D before the gradient sweep, which then sums L itself; of the symmetric KL the
    # moments are kept or summed again as accurately
    SHORT: tl.constexpr = MOMENT != NO_MOMENT or not DIVERGENCE
    GRADIENT_SUMS: tl.constexpr = MOMENT != SYMMETRIC_MOMENT and (SHORT or OPERANDS >= PAIR)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
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
        if WRITE_GRADIENT:
            fill_zero(gradient, lead, width, tl.where(weight == 0.0, 0, n_cols), LANES, WIDTH, ENDS)
        loss = 0.0
        hard_loss = 0.0
        if weight != 0.0:
            label = tl.load(labels_ptr + row) if HARD else 0
            row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
            if WRITE_LOSS:
                if HARD:  # before any thread is past the sweeps: the gradient may overwrite it
                    known = (label >= 0) & (label < n_cols)
                    logit = tl.load(student + lead + label, mask=known, other=float("nan"))
                loss, statistics = row_statistics(
                    student, teacher, lead, n_cols, over_t, row_values,
                    VALUE_AND_SLOPE, OPERANDS, MOMENT, DROP, RESTRICT, PROPAGATE, DIVERGENCE, HARD, OWN_HARD,
                    LANES, WIDTH, ENDS, WRITE_GRADIENT,
                )  # fmt: skip
                if HARD:
                    hard_loss = (statistics[5] - logit.to(tl.float32)) + tl.log(statistics[6])
            else:
                statistics = (
                    tl.load(kept), tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3),
                    tl.load(kept + 4), tl.load(kept + 5), tl.load(kept + 6), tl.load(kept + 7) > 0.0,
                )  # fmt: skip
            if WRITE_STATISTICS:
                for i in tl.static_range(STATISTICS - 1):
                    tl.store(kept + i, statistics[i].to(tl.float32))
            if WRITE_GRADIENT:
                gradient_loss = row_gradient(
                    student, teacher, gradient, lead, n_cols, statistics, over_t,
                    scale * (1.0 - hard_weight) * divergence_scale * over_t, scale * hard_weight,
                    label, row_values, VALUE_AND_SLOPE, OPERANDS, SHORT, DROP, RESTRICT, PROPAGATE, DIVERGENCE,
                    HARD, OWN_HARD, LANES, WIDTH, ENDS,
                )  # fmt: skip
                if WRITE_LOSS and GRADIENT_SUMS:
                    loss = tl.where(statistics[7], gradient_loss, loss)
        if WRITE_LOSS:
            store_losses(
                row, n_rows, loss * (weight * divergence_scale), hard_loss * weight, hard_weight,
                losses_ptr, components_ptr, DIVERGENCE, HARD,
            )  # fmt: skip


MOMENTS = {
    "none": NO_MOMENT.value,
    "soft": SOFT_MOMENT.value,
    "forward": FORWARD_MOMENT.value,
    "reverse": REVERSE_MOMENT.value,
    "symmetric": SYMMETRIC_MOMENT.value,
}


class Formula(NamedTuple):
    """What the kernel computes of a row; ``value_and_slope`` None: the hard label alone."""

    value_and_slope: Callable | None
    parameters: tuple[float | torch.Tensor, ...]  # numbers, [] or [N]
    operands: str  # what value_and_slope takes
    moment: str
    drop: bool  # the value is infinite where the student's probability is 0
    restrict: bool  # ... or the teacher's
    propagate: bool
    temperature: float
    divergence_scale: float  # 1 or T**2
    hard_label_weight: float


def parameter_strides(parameters: tuple[float | torch.Tensor, ...]) -> tuple[int | None, ...]:
    """How :func:`row_parameters` finds a row's parameters; None: a number."""
    return tuple(
        (p.stride(0) if p.dim() else 0) if isinstance(p, torch.Tensor) else None for p in parameters
    )


def device_facts(device: torch.device) -> launch.DeviceFacts:
    if device.type != "cuda":  # the interpreter: few programs, so that each walks several rows
        return launch.DeviceFacts(n_sm=2, l2_bytes=1 << 20)
    facts = torch.cuda.get_device_properties(device)
    return launch.DeviceFacts(
        facts.multi_processor_count,
        facts.L2_cache_size,
        facts.warp_size,
        limits_registers=torch.version.hip is None,
    )


def plan(
    layouts: list[Rows], n_cols: int, width: int
) -> tuple[tl.constexpr, list[bool], launch.Budget]:
    """How rows end, which tensors' rows begin on the common boundary, and the budget of that form.

    Peeling gives 16-byte loads at odd vocabularies; which columns a thread sums then depends on the
    row's place in memory, and with it the last bits: not in deterministic mode."""
    aligned = all(rows.aligned() for rows in layouts)
    if not aligned and not torch.are_deterministic_algorithms_enabled():
        matched = [rows.matches(layouts[0]) for rows in layouts]
        ends = PEELED
    else:
        matched = [rows.aligned() for rows in layouts]
        whole = aligned and n_cols % 8 == 0 and width % 8 == 0
        ends = WHOLE_VECTORS if whole else TAIL
    return ends, matched, launch.MATCHED if all(matched) else launch.SCATTERED


def run(
    formula: Formula,
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor | None,  # [..., V]
    labels: torch.Tensor | None,  # [N]
    n_cols: int,
    *,
    gradient: torch.Tensor
    | None = None,  # [..., V], one stride to its rows; or the student: write it
    statistics: torch.Tensor | None = None,  # [N, STATISTICS]
    losses: torch.Tensor | None = None,  # [N]; None: gradient from statistics and upstream
    components: torch.Tensor | None = None,  # [2, N]
    weights: torch.Tensor | None = None,  # [N]
    denominator: torch.Tensor | float = 1.0,
    upstream: torch.Tensor | None = None,  # [N] or []
) -> None:
    """Launch the dense kernel: losses with the gradient or the statistics, or the gradient alone."""
    teacher_given = formula.value_and_slope is not None
    tensors = [student, teacher if teacher_given else student]
    inplace = gradient is student
    n_inner, layouts = row_layouts(*tensors)
    if inplace and not layouts[0].is_in(student):  # a copy, for the teacher's strides or its own
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
    layouts.append(layouts[0] if gradient is None or inplace else uniform_rows(gradient, n_inner))
    ends, matched, budget = plan(layouts, n_cols, width)
    hard = formula.hard_label_weight > 0
    tempered = hard and formula.temperature != 1
    itemsize = max(t.element_size() for t in tensors)
    row_bytes = n_cols * sum(t.element_size() for t in (tensors if teacher_given else tensors[:1]))
    choice = launch.dense_launch(
        n_rows, n_cols, itemsize, row_bytes, budget, device_facts(student.device)
    )
    student_rows, teacher_rows, gradient_rows = layouts
    filler = student  # stands for a pointer that the kernel's form does not read
    dense_kernel[(choice.n_programs,)](
        **student_rows.arguments("student"),
        **teacher_rows.arguments("teacher"),
        **gradient_rows.arguments("gradient"),
        losses_ptr=filler if losses is None else losses,
        components_ptr=filler if components is None else components,
        statistics_ptr=filler if statistics is None else statistics,
        weights_ptr=filler if weights is None else weights,
        labels_ptr=filler if labels is None else labels,
        upstream_ptr=filler if upstream is None else upstream,
        upstream_stride=0 if upstream is None or upstream.dim() == 0 else upstream.stride(0),
        denominator=denominator,
        n_inner=n_inner,
        n_rows=n_rows,
        n_cols=n_cols,
        width=width,
        over_t=1.0 / formula.temperature,
        divergence_scale=float(formula.divergence_scale),
        hard_weight=float(formula.hard_label_weight),
        parameters=formula.parameters,
        VALUE_AND_SLOPE=formula.value_and_slope,
        OPERANDS=OPERANDS[formula.operands],
        PARAMETER_STRIDES=parameter_strides(formula.parameters),
        MOMENT=MOMENTS[formula.moment],
        DROP=formula.drop,
        RESTRICT=formula.restrict,
        PROPAGATE=formula.propagate,
        DIVERGENCE=teacher_given,
        HARD=hard,
        TEMPERED=tempered,
        HAS_WEIGHTS=weights is not None,
        DENOMINATOR_IN_MEMORY=isinstance(denominator, torch.Tensor),
        WRITE_LOSS=losses is not None,
        WRITE_STATISTICS=losses is not None and statistics is not None,
        WRITE_GRADIENT=gradient is not None,
        LANES=choice.lanes,
        WIDTH=choice.width,
        ENDS=ends.value,
        STUDENT_MATCHED=matched[0],
        TEACHER_MATCHED=matched[1],
        GRADIENT_MATCHED=matched[2],
        **choice.options(),
    )
