"""Both models' softmax over a part of each row, for ranks that split the vocabulary: what statistics and
metrics exchange of it (``pair_kernel``), and the metrics' sums of it (``pair_sums_kernel``), which need
the whole row's softmax.
"""

import torch
import triton
import triton.language as tl

from .layout import row_layouts
from .math import LOG2E
from .metrics import metrics_tile
from .rows import RUN_TIME, first_position, pointers, row_offset, rows_launch
from .running import NOWHERE
from .sweeps import DOWN, PEELED, sweep
from .token_row import token_sweep

N_NUMBERS = (
    7  # student's maximum, sum and entropy, the teacher's, and whether their maxima are one column
)
N_SUMS = 5  # forward and reverse KL, Jensen-Shannon, total variation, sum of min(p, q)
N_KEPT = 4  # of whole rows: student's maximum and sum, the teacher's


@triton.jit(do_not_specialize=RUN_TIME)
def pair_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    ids_ptr, numbers_ptr, n_inner, n_rows, n_cols, over_t, ignore_index,
    HAS_IDS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    STUDENT_MATCHED: tl.constexpr, TEACHER_MATCHED: tl.constexpr,
):  # fmt: skip
    """N_NUMBERS numbers a row to ``numbers`` [N_NUMBERS, n_rows]. A row whose id is ``ignore_index`` is
    not read: 0 everywhere. A maximum is 0 where no logit is finite, as the token kernel has it."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        teacher_offset = row_offset(row, teacher_start, teacher_outer, teacher_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        teacher = first_position(teacher_ptr, teacher_offset, lead, TEACHER_MATCHED)
        numbers = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        read_it = True
        if HAS_IDS:
            read_it = tl.load(ids_ptr + row) != ignore_index
        if read_it:
            c = over_t * LOG2E
            m_s, l_s, h_s, top_s = token_sweep(
                student, lead, n_cols, c, LANES, WIDTH, ENDS, False, True, True
            )
            m_t, l_t, h_t, top_t = token_sweep(
                teacher, lead, n_cols, c, LANES, WIDTH, ENDS, False, True, True
            )
            agree = (top_s == top_t) & (top_s < NOWHERE)
            numbers = (m_s, l_s, h_s, m_t, l_t, h_t, agree.to(tl.float32))
        for i in tl.static_range(7):
            tl.store(numbers_ptr + tl.cast(i, tl.int64) * n_rows + row, numbers[i])


@triton.jit(do_not_specialize=RUN_TIME)
def pair_sums_kernel(
    student_ptr, student_start, student_outer, student_inner,
    teacher_ptr, teacher_start, teacher_outer, teacher_inner,
    kept_ptr, sums_ptr, n_inner, n_rows, n_cols, over_t,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    STUDENT_MATCHED: tl.constexpr, TEACHER_MATCHED: tl.constexpr,
):  # fmt: skip
    """N_SUMS numbers a row to ``sums`` [N_SUMS, n_rows], by the whole rows' ``kept`` [N_KEPT, n_rows]."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        student_offset = row_offset(row, student_start, student_outer, student_inner, n_inner)
        teacher_offset = row_offset(row, teacher_start, teacher_outer, teacher_inner, n_inner)
        lead = (student_offset % 8).to(tl.int32) if ENDS == PEELED else 0
        student = first_position(student_ptr, student_offset, lead, STUDENT_MATCHED)
        teacher = first_position(teacher_ptr, teacher_offset, lead, TEACHER_MATCHED)
        of_row = kept_ptr + row
        step = tl.cast(n_rows, tl.int64)
        m_s = tl.load(of_row)
        l_s = tl.load(of_row + step)
        m_t = tl.load(of_row + 2 * step)
        l_t = tl.load(of_row + 3 * step)
        zero = tl.zeros([LANES], tl.float32)
        none = tl.full([LANES], NOWHERE, tl.int32)
        sums = sweep(
            (zero, zero, zero, zero, zero, zero, zero, none, none), metrics_tile,
            (student, teacher, (m_s, l_s, m_t, l_t, over_t)), (), lead, n_cols, LANES, WIDTH, ENDS,
            DOWN, 1,
        )  # fmt: skip
        for k in tl.static_range(5):
            tl.store(sums_ptr + tl.cast(k, tl.int64) * n_rows + row, tl.sum(sums[k], axis=0))


def _arguments(
    student: torch.Tensor, teacher: torch.Tensor, n_rows: int, n_cols: int, temperature: float
) -> tuple[tuple[int], dict]:
    """Grid and arguments of a launch over the rows of both."""
    n_inner, (student_rows, teacher_rows) = row_layouts(student, teacher)
    rows = {"student": student_rows, "teacher": teacher_rows}
    grid, arguments = rows_launch(rows, [student, teacher], n_rows, n_cols, student.shape[-1])
    return grid, arguments | {"n_inner": n_inner, "over_t": 1.0 / temperature}


def run(
    student: torch.Tensor,  # [..., V], this part's columns
    teacher: torch.Tensor,  # [..., V]
    ids: torch.Tensor | None,  # [N] int64; None: all rows are read
    ignore_index: int,
    n_cols: int,  # of V that are used, 0 too
    temperature: float,
    numbers: torch.Tensor,  # [N_NUMBERS, N] float32
) -> None:
    """Write a part's numbers."""
    n_rows = numbers.shape[1]
    if n_rows == 0 or n_cols == 0:
        numbers.zero_()
        return
    grid, arguments = _arguments(student, teacher, n_rows, n_cols, temperature)
    pair_kernel[grid](
        **arguments, **pointers(student, ids=ids), numbers_ptr=numbers, ignore_index=ignore_index,
        HAS_IDS=ids is not None,
    )  # fmt: skip


def run_sums(
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor,  # [..., V]
    n_cols: int,
    temperature: float,
    kept: torch.Tensor,  # [N_KEPT, N] float32
    sums: torch.Tensor,  # [N_SUMS, N] float32
) -> None:
    """Write a part's sums."""
    n_rows = sums.shape[1]
    if n_rows == 0 or n_cols == 0:
        sums.zero_()
        return
    grid, arguments = _arguments(student, teacher, n_rows, n_cols, temperature)
    pair_sums_kernel[grid](**arguments, kept_ptr=kept, sums_ptr=sums)
