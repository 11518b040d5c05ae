"""The operator of the statistics of tokens of hidden states: the engine of ``heads/``, token by token."""

import torch

from .. import problem
from ..checks import contents
from ..checks.values import debug
from ..groups import check_agreement
from ..heads.engine import Engine, Gradients
from ..heads.projection import Projection, logits_bytes
from ..heads.ranks import N_KEPT, Ranks, joined, joined_again
from ..heads.select import on_device, placed, select
from ..problem import BACKWARD, FORWARD, NO_GRADIENTS, StatisticsInputs, Wanted, shaped_as_all
from ..rows import Tokens, parameters_of
from ..vocab_parallel import statistics as split_statistics
from ..vocab_parallel.losses import facts_of
from .path import path_of, phases_of
from .register import LossOperator, Plan
from .statistics import (
    OTHERWISE,
    OUTPUTS,
    asking,
    coefficient_rows,
    fakes,
    kept_shapes,
    loss_of,
    upstream_rows,
)


class StatisticsPass:
    """One pass over the tokens that count."""

    def __init__(
        self,
        inputs: problem.LinearStatisticsInputs,
        options: problem.LinearStatisticsOptions,
        wanted: Wanted,
        ranks: Ranks | None = None,
    ):
        self.options, self.path = options.loss, path_of(options.loss.backend)
        self.place = self.phases = None
        if ranks is not None:
            self.place, self.phases = ranks.place, phases_of(self.options.backend)
        backend, blocks = self.options.backend, options.blocks
        dtype, ids = inputs.dtype(), inputs.ids.reshape(-1)
        counted = (ids != self.options.ignore_index).to(dtype)
        tokens = Tokens(ids, counted, 1.0, parameters_of(inputs, self.options))
        self.tokens, self.selection = select(tokens, len(ids), backend, None)
        self.dtype, self.n_tokens = dtype, len(ids)
        wide = dtype == torch.float64
        logits_dtype = torch.float64 if wide else blocks.logits_dtype
        shared = self.options.n_cols, wide, blocks.autocast, backend == "triton", ranks
        student = Projection.of(*inputs.student, options.student, self.selection, *shared)
        # the logits of ignored tokens are not read: the teacher's may be NaN
        selected = self.selection._replace(unread=None)
        self.teacher = Projection.of(*inputs.teacher, options.teacher, selected, *shared)
        teacher_bytes = logits_bytes(self.teacher, logits_dtype)
        self.engine = Engine(student, logits_dtype, wanted, blocks.memory_budget, teacher_bytes)
        n_under_work = min(self.engine.blocks.rows, self.selection.n_rows)
        self.teacher_logits = self.engine.buffer(n_under_work, logits_dtype)

    def of_rows(self, student: torch.Tensor, rows: slice) -> StatisticsInputs:
        """Some rows' logits of both, and what comes with them."""
        tokens, teacher = self.tokens.rows(rows), self.teacher_logits[: len(student)]
        self.teacher.logits(self.teacher.hidden(rows), teacher)
        parameters = [x for x in tokens.parameters if isinstance(x, torch.Tensor)]
        return StatisticsInputs(student, teacher, tokens.labels, parameters, [])

    def write_gradient(self, inputs: StatisticsInputs, kept, upstream, gradient) -> None:
        """Of some rows, for their upstream gradients ``[OUTPUTS, n]``."""
        asked = asking(inputs, self.options, upstream)
        if self.place is None:
            self.path.statistics_gradient(asked, self.options, kept, upstream, gradient)
            return
        split_statistics.gradient_of_rows(
            self.phases, asked, self.options, self.place, kept, upstream, gradient
        )

    def chosen(self, of_tokens: torch.Tensor | None, dim: int = 0) -> torch.Tensor | None:
        """Of all tokens the selected ones."""
        index = self.selection.index
        if index is None or of_tokens is None or of_tokens.numel() == 0:
            return of_tokens
        return of_tokens.index_select(dim, index)

    def statistics(self, coefficients: torch.Tensor | None, keep: bool):
        """``[OUTPUTS, n]`` and the agreement ``[n]`` of all tokens, what a gradient made later needs
        of them (``keep``), and the gradients for the upstream gradients ``coefficients``."""
        n_rows, new = self.selection.n_rows, self.tokens.labels.new_empty
        outputs = new((OUTPUTS, n_rows), dtype=self.dtype)
        agreement = new(n_rows, dtype=torch.bool)
        kept = [None, None]
        if keep:
            shapes = kept_shapes(n_rows, self.options)
            kept = [None if shape is None else new(shape, dtype=self.dtype) for shape in shapes]
        if coefficients is not None:
            coefficients = self.chosen(coefficients, 1)

        def store(logits, rows, gradient):
            inputs = self.of_rows(logits, rows)
            if self.place is None:
                keeps = keep or gradient is not None
                found = self.path.statistics_of_tokens(inputs, self.options, keeps)
            else:
                found = split_statistics.statistics_of_rows(
                    self.phases, inputs, self.options, self.place
                )
            outputs[:, rows], agreement[rows], of_rows = found
            if gradient is not None:
                self.write_gradient(inputs, of_rows, coefficients[:, rows], gradient)
            for target, values in zip(kept, of_rows, strict=True):
                if target is not None:
                    target[rows] = values

        gradients = self.engine.run(store)
        place = lambda x: placed(x, self.selection, self.n_tokens)
        outputs, agreement = place(outputs), place(agreement)
        kept = [None if x is None else place(x.t()).t().contiguous() for x in kept]
        return outputs, agreement, kept, gradients

    def gradients(self, kept, upstream: torch.Tensor) -> Gradients:
        """For upstream gradients ``[OUTPUTS, n]``."""
        kept, upstream = [*map(self.chosen, kept)], self.chosen(upstream, 1)

        def write(logits, rows, gradient):
            of_rows = [x if x is None or x.numel() == 0 else x[rows] for x in kept]
            self.write_gradient(self.of_rows(logits, rows), of_rows, upstream[:, rows], gradient)

        return self.engine.run(write)


def here(
    inputs: problem.LinearStatisticsInputs,
    options: problem.LinearStatisticsOptions,
    plan: Plan,
    kept: torch.Tensor | None = None,
) -> tuple[problem.LinearStatisticsInputs, problem.LinearStatisticsOptions, Ranks]:
    """The call on this rank, with the hidden states of all tokens, its part of a whole teacher and the
    columns that count, and the ranks; ``kept`` is what the forward found of them."""
    split, token_ranks = options.loss.split, options.blocks.token_ranks
    hidden = inputs.student_hidden
    if kept is not None:
        ranks = joined_again(split, kept, token_ranks)
    else:
        if debug():
            facts = facts_of(inputs, options.loss) | options._asdict() | {"loss": None}
            facts["when gradients are made"] = plan.made
            check_agreement(split, facts, hidden.device, inputs.student_weight.shape[0])
        widths = inputs.student_weight.shape[0], inputs.teacher_weight.shape[0]
        ranks = joined(split, widths[0], inputs.n_rows, hidden.device, widths[1], token_ranks)
    inputs = inputs._replace(
        student_hidden=ranks.all_tokens(hidden),
        teacher_hidden=ranks.all_tokens(inputs.teacher_hidden),
        teacher_weight=ranks.of_head(inputs.teacher_weight),
        teacher_bias=ranks.of_head(inputs.teacher_bias),
    )
    return inputs, options._replace(loss=options.loss._replace(n_cols=ranks.place.n_cols)), ranks


def forward(
    inputs: problem.LinearStatisticsInputs, options: problem.LinearStatisticsOptions, plan: Plan
):
    """The loss ``[]`` where there are coefficients, ``[OUTPUTS, ...]``, and the agreement ``[...]``; kept
    are the gradients, made here, or what they need of the rows."""
    hidden, ranks = inputs.student_hidden, None
    with on_device(hidden):
        if options.loss.split.group is not None:
            inputs, options, ranks = here(inputs, options, plan)
        wanted = Wanted(*plan.wanted) if plan.made == FORWARD else NO_GRADIENTS
        made = StatisticsPass(inputs, options, wanted, ranks)
        coefficients = coefficient_rows(inputs, options) if options.coefficients else None
        outputs, agreement, kept, gradients = made.statistics(coefficients, plan.made == BACKWARD)
        loss = None if coefficients is None else loss_of(outputs, coefficients)
    leading = inputs.leading
    if plan.made == FORWARD:
        kept = gradients.of(hidden)
    else:
        of_ranks = ranks.kept() if ranks is not None and plan.made == BACKWARD else None
        kept = *kept, of_ranks
    return (loss, outputs.view(OUTPUTS, *leading), agreement.view(leading)), kept


def gradient(
    inputs: problem.LinearStatisticsInputs,
    options: problem.LinearStatisticsOptions,
    plan: Plan,
    kept,
    upstreams,
):
    hidden, ranks = inputs.student_hidden, None
    with on_device(hidden):
        if options.loss.split.group is not None:
            inputs, options, ranks = here(inputs, options, plan, kept[2])
        made = StatisticsPass(inputs, options, Wanted(*plan.wanted), ranks)
        upstream = upstream_rows(inputs, options, upstreams)
        return made.gradients(kept[:2], upstream).of(hidden)


def fake(
    inputs: problem.LinearStatisticsInputs, options: problem.LinearStatisticsOptions, plan: Plan
):
    students_of = inputs.student
    inputs = shaped_as_all(inputs, options.blocks.token_ranks)
    outputs, (*kept, of_ranks) = fakes(inputs, options, plan)
    if plan.made != FORWARD:
        if of_ranks is not None:
            of_ranks = inputs.ids.new_empty(N_KEPT, device="cpu")
        return outputs, (*kept, of_ranks)
    students = zip(students_of, plan.wanted, strict=True)
    return outputs, tuple(x.new_empty(x.shape) if want else None for x, want in students)


linear_distillation_statistics = LossOperator(
    "linear_distillation_statistics", problem.LinearStatisticsInputs, problem.LinearStatisticsOptions,
    forward=forward, gradient=gradient, fake=fake, check=contents.of_statistics,
    students=("student_hidden", "student_weight", "student_bias"), outputs=3, kept=3, differentiable=2,
    otherwise=OTHERWISE,
)  # fmt: skip
