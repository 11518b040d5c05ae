"""The dense kernel's launches, form by form, and what their compiled loops cost.

A form is what changes the code: sizes, dtypes and options. The operator itself makes the launches,
on tensors without memory, so the counts are those of what users run.
"""

from dataclasses import dataclass

import torch

from .. import gpu_topk_phases, problem
from ..arguments import LossArguments, Tail
from ..divergences.base import Divergence
from ..gpu import formula_of
from ..kernels import combine, dense, phases, topk
from ..kernels.launch import STATISTICS
from ..operators.dense import dense_loss
from ..operators.gather import gather_log_probs
from ..operators.register import LossOperator, Plan
from ..operators.statistics import distillation_statistics
from ..operators.tokens import token_log_probs
from ..operators.topk import topk_loss
from ..problem import BACKWARD, NO_GRADIENT, Options
from ..rows import Tokens
from ..support import GatherInputs, GatherOptions
from . import aot, sass


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record_operator(
    operator: LossOperator, inputs, options, made: str, target: aot.Target
) -> list[aot.Launch]:
    """Launches of an operator's forward, and of its backward where the gradient is made there."""

    def call():
        plan = Plan(operator.name, made, (made != "none",))
        outputs, kept = operator.forward(inputs, options, plan)
        if made == BACKWARD:
            upstreams = [x if x is None else torch.empty_like(x) for x in outputs]
            operator.gradient(inputs, options, plan, kept, upstreams[: operator.differentiable])

    return aot.record(call, target.facts)


@dataclass(frozen=True)
class Form:
    """``[n_rows, n_cols]`` logits and the options that change the kernel's code.

    ``gradient``: made in the "forward", in the "backward", or "none" (evaluation)."""

    n_cols: int
    student_dtype: torch.dtype = torch.bfloat16
    teacher_dtype: torch.dtype = torch.bfloat16
    gradient: str = "forward"
    hard_label_weight: float = 0.0
    temperature: float = 1.0
    vocab_size: int | None = None
    teacher_stride: int | None = None
    n_rows: int = 4096
    token_outputs: tuple[str, ...] = ()
    n_teacher_rows: int | None = None  # of which an index chooses; None: one a row

    def problem(self, divergence: Divergence) -> tuple[problem.DenseInputs, Options]:
        """The operator's arguments, on tensors without memory."""

        weight = self.hard_label_weight
        labels = None
        if weight or "log_prob" in self.token_outputs:
            labels = _meta(self.n_rows, dtype=torch.int64)
        arguments = LossArguments(
            divergence, temperature=self.temperature, hard_label_weight=weight,
            token_outputs=self.token_outputs,
        )  # fmt: skip
        options = Options.of(arguments, self.vocab_size or self.n_cols, "triton")
        student = _meta(self.n_rows, self.n_cols, dtype=self.student_dtype)
        stride = self.teacher_stride or self.n_cols
        n_teacher_rows, rows = self.n_teacher_rows or self.n_rows, None
        teacher = _meta(n_teacher_rows, stride, dtype=self.teacher_dtype)[:, : self.n_cols]
        if self.n_teacher_rows is not None:
            rows = _meta(self.n_rows, dtype=torch.int64)
        return problem.DenseInputs(
            student, teacher, None, labels, None, divergence.tensors, None, rows
        ), options

    def launches(self, divergence: Divergence, target: aot.Target) -> list[aot.Launch]:
        """The dense kernel's launches for one forward (and, made there, one backward)."""
        recorded = record_operator(dense_loss, *self.problem(divergence), self.gradient, target)
        return [launch for launch in recorded if launch.kernel is dense.dense_kernel]


def token_launches(
    n_cols: int, dtype: torch.dtype, entropy: bool, target: aot.Target, n_rows: int = 4096
) -> list[aot.Launch]:
    """The token kernel's launches for one forward and one backward."""
    inputs = problem.TokenInputs(
        _meta(n_rows, n_cols, dtype=dtype), _meta(n_rows, dtype=torch.int64)
    )
    options = problem.TokenOptions("triton", 1.0, -100, entropy)
    return record_operator(token_log_probs, inputs, options, BACKWARD, target)


def gather_launches(
    n_cols: int, k: int, dtype: torch.dtype, target: aot.Target, *,
    masked: bool = False, vocab_size: int | None = None, n_rows: int = 4096,
) -> list[aot.Launch]:  # fmt: skip
    """The gather kernel's launch."""
    inputs = GatherInputs(
        _meta(n_rows, n_cols, dtype=dtype), _meta(n_rows, k, dtype=torch.int64),
        _meta(n_rows).bool() if masked else None,
    )  # fmt: skip
    options = GatherOptions("triton", 1.0, vocab_size or n_cols)
    return record_operator(gather_log_probs, inputs, options, NO_GRADIENT, target)


def statistics_launches(
    divergence: Divergence, n_cols: int, dtype: torch.dtype, target: aot.Target, n_rows: int = 4096
) -> list[aot.Launch]:
    """The statistics kernel's launches for one forward and one backward."""
    student, teacher = (_meta(n_rows, n_cols, dtype=dtype) for _ in range(2))
    ids = _meta(n_rows, dtype=torch.int64)
    inputs = problem.StatisticsInputs(student, teacher, ids, divergence.tensors, [])
    loss = Options.of(LossArguments(divergence, reduction="none"), n_cols, "triton")
    options = problem.StatisticsOptions(loss, ())
    return record_operator(distillation_statistics, inputs, options, BACKWARD, target)


def topk_launches(
    divergence: Divergence, n_cols: int, k: int, dtype: torch.dtype, target: aot.Target, *,
    tail: str = "bucket", mass_terms: bool = False, log_prob_floor: float | None = None,
    gradient: str = "forward", hard_label_weight: float = 0.0, temperature: float = 1.0,
    vocab_size: int | None = None, n_rows: int = 4096, token_outputs: tuple[str, ...] = (),
    n_teacher_rows: int | None = None,
) -> list[aot.Launch]:  # fmt: skip
    """The top-k kernel's launches for one forward (and, made there, one backward)."""
    arguments = LossArguments(
        divergence, temperature=temperature, hard_label_weight=hard_label_weight,
        token_outputs=token_outputs,
    )  # fmt: skip
    given = Tail(tail, mass_terms, log_prob_floor)
    options = Options.of(arguments, vocab_size or n_cols, "triton", given)
    labels = None
    if hard_label_weight or "log_prob" in token_outputs:
        labels = _meta(n_rows, dtype=torch.int64)
    n_slots, rows = n_teacher_rows or n_rows, None
    slots = _meta(n_slots, k), _meta(n_slots, k, dtype=torch.int32)
    if n_teacher_rows is not None:
        rows = _meta(n_rows, dtype=torch.int64)
    inputs = problem.TopKInputs(
        _meta(n_rows, n_cols, dtype=dtype),
        *slots,
        None,
        labels,
        None,
        divergence.tensors,
        None,
        rows,
    )
    recorded = record_operator(topk_loss, inputs, options, gradient, target)
    return [launch for launch in recorded if launch.kernel is topk.topk_kernel]


def phase_launch(
    phase: str, divergence: Divergence, n_cols: int, dtype: torch.dtype, target: aot.Target, *,
    hard_label_weight: float = 0.0, temperature: float = 1.0, n_rows: int = 4096,
) -> aot.Launch:  # fmt: skip
    """The launch "normalise" or "reduce" over a part of each row, of ``n_cols`` columns, or "combine" or
    "combine sums" of some parts' numbers."""
    arguments = LossArguments(
        divergence, temperature=temperature, hard_label_weight=hard_label_weight
    )
    formula = formula_of(Options.of(arguments, n_cols, "triton"), divergence.parameters)
    pair = [_meta(n_rows, n_cols, dtype=dtype) for _ in range(2)]
    labels = _meta(n_rows, dtype=torch.int64) if hard_label_weight else None

    def normalise():
        n_numbers = phases.ALL_NUMBERS if hard_label_weight else phases.DIVERGENCE_NUMBERS
        phases.normalise(
            formula, *pair, labels, n_cols, parts=_meta(n_numbers, n_rows), weights=_meta(n_rows)
        )

    def reduce():
        kept, sums = _meta(n_rows, STATISTICS), _meta(phases.SUMS, n_rows)
        phases.reduce(formula, *pair, n_cols, kept=kept, sums=sums)

    def combined(n_parts: int = 8):
        n_numbers = phases.ALL_NUMBERS if hard_label_weight else phases.DIVERGENCE_NUMBERS
        sums = _meta(n_parts, phases.SUMS, n_rows) if phase == "combine sums" else None
        combine.run(
            formula, _meta(n_parts, n_numbers, n_rows), sums, _meta(n_rows), _meta(),
            kept=_meta(n_rows, STATISTICS), losses=_meta(n_rows), components=_meta(2, n_rows),
        )  # fmt: skip

    calls = {
        "normalise": normalise,
        "reduce": reduce,
        "combine": combined,
        "combine sums": combined,
    }
    (launch,) = aot.record(calls[phase], target.facts)
    return launch


def topk_phase_launch(
    phase: str, divergence: Divergence, n_cols: int, k: int, dtype: torch.dtype, target: aot.Target, *,
    tail: str = "bucket", log_prob_floor: float | None = None, mass_terms: bool = False,
    hard_label_weight: float = 0.0, temperature: float = 1.0, n_rows: int = 4096,
) -> aot.Launch:  # fmt: skip
    """The launch "normalise", "reduce" or "differentiate" of the top-k loss over a part of each row, or
    "combined" of some parts' numbers."""
    arguments = LossArguments(
        divergence, temperature=temperature, hard_label_weight=hard_label_weight
    )
    asked = Tail(tail, mass_terms, log_prob_floor)
    options = Options.of(arguments, n_cols, "triton", asked)
    labels = _meta(n_rows, dtype=torch.int64) if hard_label_weight else None
    tokens = Tokens(labels, _meta(n_rows), 1.0, divergence.parameters)
    student, slots = _meta(n_rows, n_cols, dtype=dtype), _meta(n_rows, k)
    teacher = slots, _meta(n_rows, k, dtype=torch.int32), _meta(dtype=torch.int64)
    call = getattr(gpu_topk_phases, phase)
    kept = _meta(n_rows, gpu_topk_phases.KEPT)
    columns = student, teacher, n_cols
    given = {
        "normalise": columns,
        "combined": (
            _meta(8, 10 if hard_label_weight else 6, n_rows), _meta(n_rows), _meta(8, 3, n_rows),
        ),
        "reduce": (*columns, kept, True),
        "differentiate": (*columns, kept, _meta(), torch.empty_like(student)),
    }  # fmt: skip
    (launch,) = aot.record(lambda: call(options, tokens, *given[phase]), target.facts)
    return launch


@dataclass(frozen=True)
class Counts:
    """A compiled launch: its loops over tiles by sweep, from the fast form to the guarded one."""

    sweeps: dict[str, list[sass.Loop]]
    usage: sass.Usage
    column_bytes: int  # of student's and teacher's element together

    def fast(self) -> dict[str, sass.Loop]:
        """The fast loop of each sweep that the kernel has."""
        names = ("normalise", "reduce", "differentiate")
        return {name: self.sweeps[name][0] for name in names if self.sweeps.get(name)}

    def columns(self, loop: sass.Loop) -> float:
        """Columns that a thread does in one turn of a loop, by what it loads."""
        return loop.bytes_loaded / self.column_bytes

    def instructions(self) -> float:
        """Instructions an element, over the fast loops."""
        return sum(loop.instructions / self.columns(loop) for loop in self.fast().values())

    def special(self) -> float:
        """exp2, log2 and reciprocals an element, over the fast loops."""
        return sum(loop.special / self.columns(loop) for loop in self.fast().values())


def counts_of(launch: aot.Launch, loops: list[sass.Loop], usage: sass.Usage) -> Counts:
    """The counts of a compiled launch from its innermost loops.

    For a divergence with a moment the guarded ``reduce`` exists alone: it is listed under
    ``guarded_reduce`` and is no part of the fast path."""
    arguments = launch.arguments
    column_bytes = arguments["student_ptr"].element_size()
    if arguments["DIVERGENCE"]:
        column_bytes += arguments["teacher_ptr"].element_size()
    sweeps = sass.sweeps(loops)
    if arguments["MOMENT"] != 0:
        sweeps["guarded_reduce"] = sweeps.pop("reduce")
    return Counts(sweeps, usage, column_bytes)


def count(launch: aot.Launch, target: aot.Target) -> Counts:
    """Compile a launch for an NVIDIA target and count its loops."""
    code, usage = sass.disassemble(aot.compile_launch(launch, target))
    return counts_of(launch, sass.innermost_loops(code), usage)
