"""The operator of the statistics of tokens of hidden states: the engine of ``heads/``, token by token."""

import torch

from .. import problem
from ..checks import contents
from ..heads.engine import Engine, Gradients
from ..heads.projection import Projection, logits_bytes
from ..heads.select import on_device, placed, select
from ..problem import BACKWARD, FORWARD, NO_GRADIENTS, StatisticsInputs, Wanted
from ..rows import Tokens, parameters_of
from .path import path_of
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
    ):
        self.options, self.path = options.loss, path_of(options.loss.backend)
        backend, blocks = self.options.backend, options.blocks
        dtype, ids = inputs.dtype(), inputs.ids.reshape(-1)
        counted = (ids != self.options.ignore_index).to(dtype)
        tokens = Tokens(ids, counted, 1.0, parameters_of(inputs, self.options))
        self.tokens, self.selection = select(tokens, len(ids), backend, None)
        self.dtype, self.n_tokens = dtype, len(ids)
        wide = dtype == torch.float64
        logits_dtype = torch.float64 if wide else blocks.logits_dtype
        shared = self.options.n_cols, wide, blocks.autocast, backend == "triton"
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
            outputs[:, rows], agreement[rows], of_rows = self.path.statistics_of_tokens(
                inputs, self.options, keep or gradient is not None
            )
            if gradient is not None:
                upstream = coefficients[:, rows]
                asked = asking(inputs, self.options, upstream)
                self.path.statistics_gradient(asked, self.options, of_rows, upstream, gradient)
            for target, values in zip(kept, of_rows, strict=True):
                if target is not None:
                    target[rows] = values

        gradients = self.engine.run(store)
        outputs, agreement, *kept = (
            placed(x, self.selection, self.n_tokens) for x in (outputs, agreement, *kept)
        )
        return outputs, agreement, kept, gradients

    def gradients(self, kept, upstream: torch.Tensor) -> Gradients:
        """For upstream gradients ``[OUTPUTS, n]``."""
        kept, upstream = [*map(self.chosen, kept)], self.chosen(upstream, 1)

        def write(logits, rows, gradient):
            part = upstream[:, rows]
            inputs = asking(self.of_rows(logits, rows), self.options, part)
            of_rows = [x if x is None or x.numel() == 0 else x[rows] for x in kept]
            self.path.statistics_gradient(inputs, self.options, of_rows, part, gradient)

        return self.engine.run(write)


def forward(
    inputs: problem.LinearStatisticsInputs, options: problem.LinearStatisticsOptions, plan: Plan
):
    """The loss ``[]`` where there are coefficients, ``[OUTPUTS, ...]``, and the agreement ``[...]``; kept
    are the gradients, made here, or what they need of the rows."""
    hidden, leading = inputs.student_hidden, inputs.leading
    with on_device(hidden):
        wanted = Wanted(*plan.wanted) if plan.made == FORWARD else NO_GRADIENTS
        made = StatisticsPass(inputs, options, wanted)
        coefficients = coefficient_rows(inputs, options) if options.coefficients else None
        outputs, agreement, kept, gradients = made.statistics(coefficients, plan.made == BACKWARD)
        loss = None if coefficients is None else loss_of(outputs, coefficients)
    kept = gradients.of(hidden) if plan.made == FORWARD else (*kept, None)
    return (loss, outputs.view(OUTPUTS, *leading), agreement.view(leading)), kept


def gradient(
    inputs: problem.LinearStatisticsInputs,
    options: problem.LinearStatisticsOptions,
    plan: Plan,
    kept,
    upstreams,
):
    with on_device(inputs.student_hidden):
        made = StatisticsPass(inputs, options, Wanted(*plan.wanted))
        upstream = upstream_rows(inputs, options, upstreams)
        return made.gradients(kept[:2], upstream).of(inputs.student_hidden)


def fake(
    inputs: problem.LinearStatisticsInputs, options: problem.LinearStatisticsOptions, plan: Plan
):
    outputs, kept = fakes(inputs, options, plan)
    if plan.made != FORWARD:
        return outputs, kept
    students = zip(inputs.student, plan.wanted, strict=True)
    return outputs, tuple(x.new_empty(x.shape) if want else None for x, want in students)


linear_distillation_statistics = LossOperator(
    "linear_distillation_statistics", problem.LinearStatisticsInputs, problem.LinearStatisticsOptions,
    forward=forward, gradient=gradient, fake=fake, check=contents.of_statistics,
    students=("student_hidden", "student_weight", "student_bias"), outputs=3, kept=3, differentiable=2,
    otherwise=OTHERWISE,
)  # fmt: skip
