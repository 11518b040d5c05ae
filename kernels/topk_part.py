"""The slots of a top-k teacher over a part of each row: those whose column is in it, and what the whole row
is, as ranks that split the vocabulary know it (``topk_phases.py``, ``topk_gradient.py``).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .layout import row_layouts, uniform_rows
from .math import INFINITY, LOG2E
from .rows import Formula, chosen_row, rows_launch
from .running import finite_or_zero
from .topk import LOWEST_FLOAT, TAILS, clamped, read_teacher
from .topk_terms import MASSES

# Kept of a whole row: maximum of the K and their sum without the 1 of that, maximum and sum of the columns
# outside, D, the hard label's maximum and sum, whether there are columns outside, weight / denominator,
# and what D's rounding left.
KEPT = 10
WEIGHT = tl.constexpr(8)
STATISTICS = tl.constexpr(KEPT)
ANY_ID = tl.constexpr(2147483647)  # whether an id is in the vocabulary, all ranks know together


@triton.jit
def part_slots(
    row, student, lead, log_probs_ptr, ids_ptr, teacher_rows_ptr, n_teacher_rows, offset, n_cols, lane, k,
    TAIL: tl.constexpr, RESTRICT: tl.constexpr, HAS_TEACHER_ROWS: tl.constexpr,
):  # fmt: skip
    """Of a row's slots: how many are used; which lie in the part, where, the student's logits there, those
    that the divergence reads, and log_p, -inf of the others; log_p of the rest, ``l``, and NaN, to be
    added, where the teacher has no distribution."""
    slots_row = tl.cast(row, tl.int64)
    exists = True
    if HAS_TEACHER_ROWS:
        slots_row, exists = chosen_row(teacher_rows_ptr, row, n_teacher_rows)
    slots = slots_row * k
    token_id, used, log_p, log_p_rest, l_t, good = read_teacher(
        log_probs_ptr + slots, ids_ptr + slots, lane, k, ANY_ID, TAIL
    )
    column = token_id - offset
    here = used & (column >= 0) & (column < n_cols)
    position = (column + lead).to(tl.int32)
    x = tl.load(student + position, mask=here, other=-INFINITY).to(tl.float32)
    log_p = tl.where(here, log_p, -INFINITY)
    read = x
    if RESTRICT:
        read = tl.where(log_p == -INFINITY, -INFINITY, x)
    poison = tl.where(good & exists, 0.0, float("nan"))
    n_used = tl.sum(used.to(tl.float32), axis=0)
    return n_used, here, position, x, read, log_p, log_p_rest, l_t, poison


@triton.jit
def whole_row(kept, over_t):
    """Of a whole row as it is kept: maximum of what its normaliser sums, that sum relative to it and to
    ``top``, the largest of the outcomes' exponents, and the rest's exponent, -inf where it has none."""
    m_k = tl.load(kept)
    l_k = tl.load(kept + 1) + 1.0
    m_r = tl.load(kept + 2)
    l_r = tl.load(kept + 3)
    m = finite_or_zero(tl.maximum(m_k, m_r))
    y_k = tl.where(m_k == -INFINITY, -INFINITY, clamped((m_k - m) * over_t))
    y_rest = clamped((m_r - m) * over_t) + tl.log(l_r)
    y_rest = tl.where(l_r > 0.0, y_rest, tl.where(l_r == 0.0, -INFINITY, l_r))
    top = finite_or_zero(tl.maximum(y_k, y_rest))
    l = l_k * tl.exp2((y_k - top) * LOG2E) + tl.exp2((y_rest - top) * LOG2E)
    of_rest = l_r * tl.exp2((m_r - m) * (over_t * LOG2E))
    row_l = l_k * tl.exp2(y_k * LOG2E) + tl.where(l_r == 0.0, 0.0, of_rest)
    return m, l, row_l, top, y_rest


@triton.jit
def outcome_exponents(read, m, top, y_rest, over_t, lane, at):
    """Exponents of the outcomes relative to ``top``: of the slots, and of the rest in lane ``at``."""
    y = tl.where(read == -INFINITY, -INFINITY, clamped((read - m) * over_t))
    y = tl.where(lane == at, y_rest, y)
    return tl.where(y == -INFINITY, y, clamped(y - top))


class Slots(NamedTuple):
    """What launches take of the teacher, and of the tail."""

    log_probs: torch.Tensor  # [N, K], or of the teacher's rows; contiguous
    ids: torch.Tensor  # likewise, counted from the first rank's column
    offset: torch.Tensor  # [] int64: the part's first column
    tail: str
    mass_terms: bool = False
    log_prob_floor: float | None = None
    teacher_rows: torch.Tensor | None = None  # [N] int64: the teacher's row of each; None: in order

    def arguments(self, formula: Formula) -> tuple[Formula, dict]:
        """Of every launch, and the formula: with a floor nothing is infinite."""
        if self.log_prob_floor is not None:
            formula = formula._replace(drop=False, restrict=False)
        (n_teacher_rows, k), chosen = self.ids.shape, self.teacher_rows is not None
        return formula, {
            "log_probs_ptr": self.log_probs,
            "ids_ptr": self.ids,
            "teacher_rows_ptr": self.teacher_rows if chosen else self.ids,
            "n_teacher_rows": n_teacher_rows,
            "offset_ptr": self.offset,
            "k": k,
            "TAIL": TAILS[self.tail],
            "RESTRICT": formula.restrict,
            "HAS_TEACHER_ROWS": chosen,
            "BLOCK_K": triton.next_power_of_2(k + 1),
        }

    def sees(self, formula: Formula) -> tuple[bool, bool]:
        """Whether the student is normalised over the columns outside the K too, and whether each of them
        has terms of its own; of the formula that :meth:`arguments` gives."""
        seen = self.tail in ("renormalize", "ignore")
        rest = self.tail in ("bucket", "drop") or (seen and not formula.restrict)
        return rest, rest and seen and not formula.additive

    def hard(self, formula: Formula) -> tuple[bool, bool]:
        """Whether there is a hard label, and whether its sums are not the divergence's."""
        hard = formula.hard_label_weight != 0
        return hard, hard and (formula.temperature != 1 or not self.sees(formula)[0])

    def outcomes(self, formula: Formula) -> dict:
        """Of launches that have the outcomes' terms."""
        floor = self.log_prob_floor
        return formula.arguments() | {
            "LEFT_OUT": self.tail == "drop",
            "MASSES": MASSES[formula.moment] if self.mass_terms else 0,
            "HAS_FLOOR": floor is not None,
            "log_prob_floor": 0.0 if floor is None else max(floor, LOWEST_FLOAT),
        }


def part_rows(student: torch.Tensor, n_cols: int, gradient: torch.Tensor | None = None):
    """Grid and arguments of a launch over the rows of a part."""
    width = student.shape[-1]
    n_inner, (of_student,) = row_layouts(student)
    rows = {"student": of_student}
    if gradient is not None:
        rows["gradient"] = uniform_rows(gradient, n_inner)
    grid, arguments = rows_launch(rows, [student], student.numel() // width, n_cols, width)
    return grid, arguments | {"n_inner": n_inner}


def bitmap_of(grid: tuple[int], arguments: dict, student: torch.Tensor, wanted: bool) -> dict:
    """Memory that says which columns the K are, a region a program."""
    words, n_words = student, 0  # student: stands for memory that is not read
    if wanted:
        tile = arguments["LANES"] * arguments["WIDTH"]
        n_words = launch.padded(arguments["n_cols"] + 8, tile) // 32
        words = torch.empty((*grid, n_words), dtype=torch.int32, device=student.device)
    bitmap = words.view(torch.uint8) if n_words else student
    return {"words_ptr": words, "bitmap_ptr": bitmap, "n_words": n_words}
