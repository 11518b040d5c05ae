"""Loss launches over a part of each row, for ranks that split the vocabulary.

``normalise`` writes a part's statistics, which all ranks get and combine. The divergences whose L and D
do not follow from those sum their part of them by ``reduce``. The gradient of a part is the dense
kernel's backward launch, from ``kept_rows``.

A part is done by the loops without guards where they serve. Whether they do is found here, on the
device, and is among what is written.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .layout import row_layouts
from .math import INFINITY
from .part_row import exact_sums, part_numbers, part_position
from .rows import RUN_TIME, Formula, pointers, row_parameters, rows_launch
from .sweeps import MOMENTS, NO_MOMENT
from .sweeps import reduce as reduce_sweep

STATISTICS = tl.constexpr(launch.STATISTICS)
# Of a part: student's maximum and sum, teacher's, the sum over the columns that the divergence keeps,
# the moments under p and q, whether the fast loops served; and the hard label's maximum, sum, logit,
# and whether it is among the columns. EMPTY: of no columns.
DIVERGENCE_NUMBERS, ALL_NUMBERS = 8, 12
EMPTY = (
    -float("inf"), 0.0, -float("inf"), 0.0, 0.0, 0.0, 0.0, 1.0,
    -float("inf"), 0.0, -float("inf"), 0.0,
)  # fmt: skip
EMPTY_PART = tl.constexpr(EMPTY)
SUMS = 3  # L, D, and whether the fast loops served


@triton.jit
def store_numbers(target, n_rows, numbers, BEGIN: tl.constexpr, END: tl.constexpr):
    for i in tl.static_range(BEGIN, END):
        tl.store(target + tl.cast(n_rows, tl.int64) * i, numbers[i - BEGIN])


@triton.jit(do_not_specialize=RUN_TIME)
def normalise_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    teacher_rows_ptr, teacher_n_inner, n_teacher_rows,
    weights_ptr, labels_ptr, parts_ptr, n_inner, n_rows, n_cols, over_t,
    MOMENT: tl.constexpr, DROP: tl.constexpr, RESTRICT: tl.constexpr, DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr, TEMPERED: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_TEACHER_ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
    TEACHER_MATCHED: tl.constexpr,
):  # fmt: skip
    """A part's numbers of ``n_rows`` rows as rows of ``parts``, which is [8, n_rows], or with HARD
    [12, n_rows]. A row of weight 0 is not read: an empty part."""
    OWN_HARD: tl.constexpr = HARD and (TEMPERED or not DIVERGENCE)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student, teacher, lead, poison = part_position(
            row, student_ptr, student_start, student_outer, student_inner,
            teacher_ptr, teacher_start, teacher_outer, teacher_inner,
            teacher_rows_ptr, teacher_n_inner, n_teacher_rows, n_inner,
            HAS_TEACHER_ROWS, ENDS, STUDENT_MATCHED, TEACHER_MATCHED,
        )  # fmt: skip
        target = parts_ptr + row
        weight = tl.cast(tl.load(weights_ptr + row) if HAS_WEIGHTS else 1.0, tl.float32)
        if weight == 0.0:
            store_numbers(target, n_rows, EMPTY_PART, 0, 12 if HARD else 8)
        else:
            m_s, l_s, m_t, l_t, kept, moment_t, moment_s, fast, m_h, l_h = part_numbers(
                student, teacher, lead, n_cols, over_t,
                MOMENT, DROP, RESTRICT, DIVERGENCE, HARD, OWN_HARD, LANES, WIDTH, ENDS,
            )  # fmt: skip
            fast = fast.to(tl.float32)
            if DIVERGENCE:
                numbers = m_s, l_s, m_t, l_t + poison, kept, moment_t, moment_s, fast
                l_h += poison
                store_numbers(target, n_rows, numbers, 0, 8)
            else:
                store_numbers(target, n_rows, EMPTY_PART, 0, 7)
                store_numbers(target, n_rows, (fast,), 7, 8)
            if HARD:
                label = tl.load(labels_ptr + row)
                found = (label >= 0) & (label < n_cols)
                logit = tl.load(student + lead + label, mask=found, other=-INFINITY)
                of_label = (m_h, l_h, logit.to(tl.float32), found.to(tl.float32))
                store_numbers(target, n_rows, of_label, 8, 12)


@triton.jit(do_not_specialize=RUN_TIME)
def reduce_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    teacher_rows_ptr, teacher_n_inner, n_teacher_rows,
    kept_ptr, sums_ptr, n_inner, n_rows, n_cols, over_t, parameters,
    VALUE_AND_SLOPE: tl.constexpr, OPERANDS: tl.constexpr, PARAMETER_STRIDES: tl.constexpr,
    DROP: tl.constexpr, RESTRICT: tl.constexpr, HAS_TEACHER_ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, STUDENT_MATCHED: tl.constexpr,
    TEACHER_MATCHED: tl.constexpr,
):  # fmt: skip
    """A part's L and D of ``n_rows`` rows, and whether the fast loops served, as rows of ``sums``,
    which is [3, n_rows], from the whole rows' statistics ``kept``. NaN for a row without a softmax;
    0 for one that is not read."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student, teacher, lead, _ = part_position(
            row, student_ptr, student_start, student_outer, student_inner,
            teacher_ptr, teacher_start, teacher_outer, teacher_inner,
            teacher_rows_ptr, teacher_n_inner, n_teacher_rows, n_inner,
            HAS_TEACHER_ROWS, ENDS, STUDENT_MATCHED, TEACHER_MATCHED,
        )  # fmt: skip
        kept = kept_ptr + tl.cast(row, tl.int64) * STATISTICS
        loss = 0.0
        total_slope = 0.0
        fast = 1.0
        if tl.load(kept + STATISTICS - 1) != 0.0:
            m_s = tl.load(kept)
            l_s = tl.load(kept + 1)
            m_t = tl.load(kept + 2)
            l_t = tl.load(kept + 3)
            fast = tl.load(kept + 7)
            loss = float("nan")
            total_slope = float("nan")
            if (l_s > 0.0) & (l_t > 0.0):
                row_values = row_parameters(parameters, row, PARAMETER_STRIDES)
                if fast > 0.0:
                    loss, total_slope = reduce_sweep(
                        student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), row_values,
                        VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, False, False, DROP, RESTRICT, False,
                    )  # fmt: skip
                    if not (tl.abs(loss + total_slope) < float("inf")):
                        fast = 0.0
                        l_s, l_t, _, _ = exact_sums(m_s, l_s, m_t, l_t, 0.0, 0.0, over_t, NO_MOMENT)
                if not (fast > 0.0):
                    loss, total_slope = reduce_sweep(
                        student, teacher, lead, n_cols, (m_s, l_s, m_t, l_t, over_t), row_values,
                        VALUE_AND_SLOPE, OPERANDS, LANES, WIDTH, ENDS, True, False, DROP, RESTRICT, False,
                    )  # fmt: skip
        store_numbers(sums_ptr + row, n_rows, (loss, total_slope, fast), 0, 3)


def _arguments(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    n_cols: int,
    teacher_rows: torch.Tensor | None,
) -> tuple[tuple[int], dict]:
    """Grid and arguments of a launch over the rows of both."""
    chosen = teacher_rows is not None
    if chosen:  # the teacher's leading dimensions are its own
        n_inner, (of_student,) = row_layouts(student)
        teacher_n_inner, (of_teacher,) = row_layouts(teacher)
    else:
        n_inner, layouts = row_layouts(student, student if teacher is None else teacher)
        teacher_n_inner = n_inner
        of_student, of_teacher = layouts
    width = student.shape[-1]
    grid, arguments = rows_launch(
        {"student": of_student, "teacher": of_teacher},
        [x for x in (student, teacher) if x is not None],
        student.numel() // width, n_cols, width, "teacher" if chosen else None,
    )  # fmt: skip
    arguments |= pointers(student, teacher_rows=teacher_rows)
    return grid, arguments | {
        "n_inner": n_inner,
        "teacher_n_inner": teacher_n_inner,
        "n_teacher_rows": teacher.numel() // teacher.shape[-1] if chosen else 0,
        "HAS_TEACHER_ROWS": chosen,
    }


def normalise(
    formula: Formula,
    student: torch.Tensor,  # [..., V], this part's columns; V may be 0
    teacher: torch.Tensor | None,  # [..., V]
    labels: torch.Tensor | None,  # [N], counted from the part's first column
    n_cols: int,  # of V that are used, 0 too
    *,
    parts: torch.Tensor,  # [8, N] float32; with a hard label [12, N]
    weights: torch.Tensor | None = None,  # [N]
    teacher_rows: torch.Tensor | None = None,  # [N] int64: the teacher's row of each
) -> None:
    """Write a part's statistics: DIVERGENCE_NUMBERS rows of ``parts``, or with a hard label
    ALL_NUMBERS."""
    if parts.shape[1] == 0:
        return
    if n_cols == 0:
        for number, empty in zip(parts, EMPTY, strict=False):
            number.fill_(empty)
        return
    divergence = formula.value_and_slope is not None
    if not divergence:
        teacher = teacher_rows = None
    grid, arguments = _arguments(student, teacher, n_cols, teacher_rows)
    normalise_kernel[grid](
        **arguments,
        **pointers(student, weights=weights, labels=labels),
        parts_ptr=parts,
        over_t=1.0 / formula.temperature,
        MOMENT=MOMENTS[formula.moment] if divergence else 0,
        DROP=formula.drop,
        RESTRICT=formula.restrict,
        DIVERGENCE=divergence,
        HARD=formula.hard_label_weight != 0,
        TEMPERED=formula.hard_label_weight != 0 and formula.temperature != 1,
        HAS_WEIGHTS=weights is not None,
    )


def reduce(
    formula: Formula,
    student: torch.Tensor,  # [..., V], this part's columns; V may be 0
    teacher: torch.Tensor,  # [..., V]
    n_cols: int,
    *,
    kept: torch.Tensor,  # [N, STATISTICS] float32, of whole rows
    sums: torch.Tensor,  # [SUMS, N] float32
    teacher_rows: torch.Tensor | None = None,
) -> None:
    """Write a part's L, D and whether the fast loops served, by the whole rows' statistics."""
    if sums.shape[1] == 0:
        return
    if n_cols == 0:
        for number, empty in zip(sums, (0.0, 0.0, 1.0), strict=True):
            number.fill_(empty)
        return
    grid, arguments = _arguments(student, teacher, n_cols, teacher_rows)
    reduce_kernel[grid](**arguments, **formula.arguments(), kept_ptr=kept, sums_ptr=sums)
