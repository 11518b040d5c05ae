"""What the kernels that walk whole rows share: a row's place, parameters, weight and losses; and, on the
host, the launch of such a kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .layout import RowLayout, uniform_rows
from .outputs import NAMES, bits
from .sweeps import PEELED, TAIL, WHOLE_VECTORS
from .terms import OPERANDS

ROWS = ("student", "teacher", "logits", "gradient")  # the tensors whose rows kernels walk
# arguments of kernels that walk rows whose values must not compile a kernel of their own
RUN_TIME = [f"{name}_{part}" for name in ROWS for part in ("start", "outer", "inner")] + [
    "n_inner", "teacher_n_inner", "n_rows", "n_teacher_rows", "n_cols", "width", "k", "n_words",
    "denominator", "over_t", "log_prob_floor", "divergence_scale", "soft_weight", "hard_weight",
    "upstream_stride", "ignore_index",
]  # fmt: skip


@triton.jit
def row_offset(row, start, outer_stride, inner_stride, n_inner):
    """Element offset of a row in a tensor whose leading dimensions collapse to two."""
    row = tl.cast(row, tl.int64)
    return start + row // n_inner * outer_stride + row % n_inner * inner_stride


@triton.jit
def chosen_row(teacher_rows_ptr, row, n_teacher_rows):
    """The teacher's row for a row of the student's, and whether there is one; the first, where not."""
    chosen = tl.load(teacher_rows_ptr + row)
    exists = (chosen >= 0) & (chosen < n_teacher_rows)
    return tl.where(exists, chosen, 0), exists


@triton.jit
def poisoned(weight, exists):
    """A token's weight or factor, which makes its loss and gradient NaN where its teacher's row does not
    exist; a token that does not count has none to exist."""
    return tl.where(exists | (weight == 0.0), weight, float("nan"))


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
    row, n_rows, loss, hard_loss, soft_weight, hard_weight, losses_ptr, components_ptr,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """A row's weighted loss, and with HARD the two parts of which it is mixed."""
    if HARD:
        mixed = hard_weight * hard_loss
        if DIVERGENCE:
            mixed += soft_weight * loss
        tl.store(losses_ptr + row, mixed)
        tl.store(components_ptr + row, loss)
        tl.store(components_ptr + n_rows + row, hard_loss)
    else:
        tl.store(losses_ptr + row, soft_weight * loss)


@triton.jit
def first_position(pointer, offset, lead, MATCHED: tl.constexpr):
    """Where positions are counted from: ``lead`` columns before the row.

    MATCHED says that this is a 16-byte boundary, in a form that the compiler can prove."""
    if MATCHED:
        return pointer + offset // 8 * 8
    else:
        return pointer + (offset - lead)


class Formula(NamedTuple):
    """What the kernel computes of a row; ``value_and_slope`` None: the hard label alone."""

    value_and_slope: Callable | None
    parameters: tuple[float | torch.Tensor, ...]  # numbers, [] or [N]
    operands: str  # what value_and_slope takes
    moment: str
    drop: bool  # the value is infinite where the student's probability is 0
    restrict: bool  # ... or the teacher's
    additive: bool  # the terms at p = 0 are homogeneous in q
    propagate: bool
    temperature: float
    divergence_scale: float  # 1 or T**2
    hard_label_weight: float
    soft_weight: float  # of the divergence
    token_outputs: tuple[str, ...]  # of outputs.NAMES, in their order
    ignore_index: int  # of the token ids of log_prob

    def arguments(self) -> dict:
        """As every kernel of a divergence takes them."""
        return {
            "over_t": 1.0 / self.temperature,
            "parameters": self.parameters,
            "VALUE_AND_SLOPE": self.value_and_slope,
            "OPERANDS": OPERANDS[self.operands],
            "PARAMETER_STRIDES": parameter_strides(self.parameters),
            "DROP": self.drop,
            "RESTRICT": self.restrict,
        }


def pointers(filler: torch.Tensor, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """As a kernel takes them; the filler stands for those that the kernel's form does not read."""
    return {f"{name}_ptr": filler if x is None else x for name, x in tensors.items()}


class LossBuffers(NamedTuple):
    """What a launch of a loss reads and writes beside logits; None: what the launch does without."""

    # [..., V], one stride to its rows; or the student: write it
    gradient: torch.Tensor | None = None
    statistics: torch.Tensor | None = None  # [N, STATISTICS]
    losses: torch.Tensor | None = None  # [N]; None: gradient from statistics and upstream
    components: torch.Tensor | None = None  # [2, N]
    weights: torch.Tensor | None = None  # [N]
    denominator: torch.Tensor | float = 1.0
    upstream: torch.Tensor | None = None  # [N] or []
    output_ids: torch.Tensor | None = None  # [N]: of log_prob
    outputs: tuple[torch.Tensor, ...] = ()  # [N] each, of the formula's token outputs
    teacher_rows: torch.Tensor | None = None  # [N] int64: the teacher's row of each; None: in order

    def rows(self, student: torch.Tensor, student_rows: RowLayout, n_inner: int) -> RowLayout:
        """The gradient's rows, or what stands for them."""
        written = self.gradient is not None and self.gradient is not student
        return uniform_rows(self.gradient, n_inner) if written else student_rows

    def arguments(self, formula: Formula, labels: torch.Tensor | None, filler) -> dict:
        """As kernels take them, with :func:`pointers`."""
        upstream, statistics = self.upstream, self.statistics
        tensors = pointers(
            filler, losses=self.losses, components=self.components, statistics=statistics,
            weights=self.weights, upstream=upstream, labels=labels, output_ids=self.output_ids,
            teacher_rows=self.teacher_rows,
        )  # fmt: skip
        given = formula.token_outputs if self.outputs else ()
        return formula.arguments() | {
            **tensors,
            "upstream_stride": 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0),
            "denominator": self.denominator,
            "divergence_scale": float(formula.divergence_scale),
            "soft_weight": float(formula.soft_weight),
            "hard_weight": float(formula.hard_label_weight),
            "ignore_index": formula.ignore_index,
            "outputs": self.outputs,
            "OUTPUTS": bits(given),
            "WANTED": tuple(map(NAMES.index, given)),
            "ACCEPTANCE_AT": given.index("acceptance") if "acceptance" in given else 0,
            "HARD": formula.hard_label_weight != 0,
            "HAS_WEIGHTS": self.weights is not None,
            "HAS_TEACHER_ROWS": self.teacher_rows is not None,
            "DENOMINATOR_IN_MEMORY": isinstance(self.denominator, torch.Tensor),
            "WRITE_LOSS": self.losses is not None,
            "WRITE_STATISTICS": self.losses is not None and statistics is not None,
            "WRITE_GRADIENT": self.gradient is not None,
        }


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
    layouts: list[RowLayout], n_cols: int, width: int, chosen: RowLayout | None = None
) -> tuple[tl.constexpr, list[bool], launch.Budget]:
    """How rows end, which tensors' rows begin on the common boundary, and the budget of that form.

    Peeling gives 16-byte loads at odd vocabularies; which columns a thread sums then depends on the
    row's place in memory, and with it the last bits: not in deterministic mode. ``chosen`` are rows of
    which any may come beside one of the others."""
    aligned = all(rows.aligned() for rows in layouts)
    if not aligned and not torch.are_deterministic_algorithms_enabled():
        matched = [
            rows.matches_at_any_row(layouts[0]) if rows is chosen else rows.matches(layouts[0])
            for rows in layouts
        ]
        ends = PEELED
    else:
        matched = [rows.aligned() for rows in layouts]
        whole = aligned and n_cols % 8 == 0 and width % 8 == 0
        ends = WHOLE_VECTORS if whole else TAIL
    return ends, matched, launch.MATCHED if all(matched) else launch.SCATTERED


def rows_launch(
    layouts: dict[str, RowLayout], logits: list[torch.Tensor], n_rows: int, n_cols: int, width: int,
    chosen: str | None = None,
) -> tuple[tuple[int], dict]:  # fmt: skip
    """Grid and arguments of a kernel that walks whole rows.

    Args:
        layouts: the rows of its tensors, by the kernel's names for them.
        logits: those that it reads, the student's first.
        n_cols, width: columns that are used, and that there are.
        chosen: the tensor of whose rows any may come beside one of the student's.
    """
    ends, matched, budget = plan(list(layouts.values()), n_cols, width, layouts.get(chosen))
    sizes = [t.element_size() for t in logits]
    choice = launch.dense_launch(
        n_rows, n_cols, max(sizes), n_cols * sum(sizes), budget, device_facts(logits[0].device)
    )
    arguments = {"n_rows": n_rows, "n_cols": n_cols, "LANES": choice.lanes, "WIDTH": choice.width}
    for (name, rows), matches in zip(layouts.items(), matched, strict=True):
        arguments |= rows.arguments(name)
        arguments[f"{name.upper()}_MATCHED"] = matches
    return (choice.n_programs,), arguments | {"ENDS": ends.value} | choice.options()
