"""The operator of losses of hidden states: the engine of ``heads/`` with a loss of rows of logits."""

import functools
import math

import torch

from .. import problem
from ..checks import contents
from ..heads.engine import Engine
from ..heads.projection import Projection
from ..heads.ranks import Ranks
from ..heads.select import on_device, placed, select
from ..heads.teachers import in_order, teacher_of
from ..problem import BACKWARD, FORWARD, NO_GRADIENTS, Wanted, shaped_as_all
from ..results import OutputBuffers
from ..rows import Tokens
from ..support import SupportOptions
from . import linear_split
from .gather import slots_of
from .linear_split import SplitRows
from .logits import LOSS_OUTPUTS, loss_fakes
from .path import path_of
from .register import LossOperator, Plan


def with_upstream(tokens: Tokens, upstream: torch.Tensor, n_rows: int, dtype) -> Tokens:
    """Tokens whose weights hold the incoming gradients, ``[...]`` or ``[]``."""
    upstream = upstream.to(dtype).reshape(-1).expand(n_rows)
    if tokens.weights is None:
        return tokens._replace(weights=upstream.contiguous())
    weights = tokens.weights * upstream
    # a token that does not count takes no gradient, be it infinite
    return tokens._replace(weights=torch.where(tokens.weights == 0, 0.0, weights))


class LinearPass:
    """One pass over all tokens: what the loss of rows needs, and where it stores its results."""

    def __init__(
        self,
        inputs: problem.LinearInputs,
        options: problem.LinearOptions,
        tokens: Tokens,
        wanted: Wanted,
        ranks: Ranks | None = None,
    ):
        self.options, self.dtype, blocks = options.loss, inputs.dtype(), options.blocks
        self.path = path_of(self.options.backend)
        self.triton = self.options.backend == "triton"
        self.tokens, selection = select(
            tokens, inputs.n_rows, self.options.backend, blocks.kept_tokens
        )
        self.tokens, selection = in_order(inputs, self.options, self.tokens, selection)
        wide = self.dtype == torch.float64
        logits_dtype = torch.float64 if wide else blocks.logits_dtype
        shared = self.options.n_cols, wide, blocks.autocast, self.triton, ranks
        student = Projection.of(*inputs.student, options.student, selection, *shared)
        self.teacher, self.tokens = teacher_of(
            inputs, options, self.tokens, selection, shared, logits_dtype
        )
        self.support = None
        if options.support is not None:
            self.support = SupportOptions(options.loss, options.support, options.support_k)
        of_teacher = (0, None)
        if self.teacher is not None:
            of_teacher = self.teacher.row_bytes, self.teacher.kept_bytes
        self.engine = Engine(student, logits_dtype, wanted, blocks.memory_budget, *of_teacher)
        n_rows, new = selection.n_rows, inputs.student_hidden.new_empty
        n_under_work = min(self.engine.blocks.rows, n_rows)
        self.selection = selection
        self.outputs = OutputBuffers.of(
            self.options.token_outputs, n_rows, inputs.student_hidden, self.dtype, not self.triton
        )
        if self.teacher is not None:
            self.teacher.prepare(self.engine, n_under_work)
        self.losses = new(n_rows, dtype=self.dtype)
        parts = 2 if self.options.hard else 0
        self.components = new((parts, n_rows), dtype=self.dtype)
        self.parts = new((parts, n_under_work), dtype=self.dtype) if self.triton else None

    def compared(self, rows: slice):
        """The teacher of rows under work, None without one, and their tokens as it wants them."""
        tokens = self.tokens.rows(rows)
        return (None, tokens) if self.teacher is None else self.teacher.rows(rows, tokens)

    def row_loss(self, student, rows: slice, gradient) -> None:
        n_rows, (teacher, tokens) = len(student), self.compared(rows)
        if self.support is not None:
            teacher = slots_of(student, teacher, tokens.weights, self.support, self.dtype)
        if self.triton:
            parts = self.parts
            if parts.shape[1] != n_rows:  # the last rows; the kernel wants them contiguous
                parts = parts.new_empty((len(parts), n_rows))
            self.path.rows(
                self.options, tokens, student, teacher,
                gradient=gradient, losses=self.losses[rows], components=parts,
                outputs=self.outputs.each(rows),
            )  # fmt: skip
        else:
            self.losses[rows], parts = self.path.rows(
                self.options, tokens, student, teacher, gradient, self.dtype,
                outputs=self.outputs.each(rows),
            )  # fmt: skip
        if len(self.components):
            self.components[:, rows] = parts

    def results(self, leading) -> tuple[torch.Tensor | None, ...]:
        """The loss, its components and the token outputs where asked for."""
        losses, components = self.losses, self.components[: 2 if self.options.components else 0]
        place = functools.partial(placed, selection=self.selection, n_tokens=math.prod(leading))
        if self.options.reduction == "none":
            losses, components = place(losses), place(components)
        loss, components = self.path.reduced(losses, components, self.options, self.tokens, leading)
        numbers, argmax = place(self.outputs.numbers), place(self.outputs.argmax, fill=-1)
        outputs = self.outputs._replace(numbers=numbers, argmax=argmax)
        return loss, components if self.options.components else None, *outputs.shaped(leading)


def forward(inputs: problem.LinearInputs, options: problem.LinearOptions, plan: Plan):
    """Loss and components; kept are the gradients that the forward makes, or, where ranks split the
    vocabulary, what the backward needs of the rows."""
    hidden, ranks = inputs.student_hidden, None
    with on_device(hidden):
        if options.loss.split.group is not None:
            inputs, options, ranks = linear_split.here(inputs, options, plan)
        tokens = path_of(options.loss.backend).tokens(inputs, options.loss)
        wanted = Wanted(*plan.wanted) if plan.made == FORWARD else NO_GRADIENTS
        made = LinearPass(inputs, options, tokens, wanted, ranks)
        split = None if ranks is None else SplitRows(made, ranks, plan.made == BACKWARD)
        kept = made.engine.run((split or made).row_loss).of(hidden)
        if ranks is not None and plan.made == BACKWARD:
            kept = split.statistics(inputs.n_rows), ranks.kept(), None
        return made.results(inputs.leading), kept


def gradient(
    inputs: problem.LinearInputs, options: problem.LinearOptions, plan: Plan, kept, upstreams
):
    """The gradients that are wanted, for the incoming gradient ``[]`` or ``[...]``."""
    hidden, wanted = inputs.student_hidden, Wanted(*plan.wanted)
    with on_device(hidden):
        if options.loss.split.group is not None:
            inputs, options, ranks = linear_split.here(inputs, options, plan, kept[1])
            tokens = path_of(options.loss.backend).tokens(inputs, options.loss)
            split = SplitRows(LinearPass(inputs, options, tokens, wanted, ranks), ranks)
            return split.gradients(kept[0], *upstreams).of(hidden)
        tokens = path_of(options.loss.backend).tokens(inputs, options.loss)
        tokens = with_upstream(tokens, upstreams[0], inputs.n_rows, inputs.dtype())
        options = options._replace(loss=options.loss._replace(token_outputs=()))
        made = LinearPass(inputs, options, tokens, Wanted(*plan.wanted))
        return made.engine.run(made.row_loss).of(hidden)


def fake(inputs: problem.LinearInputs, options: problem.LinearOptions, plan: Plan):
    wanted = plan.wanted if plan.made == FORWARD else NO_GRADIENTS
    gradients = tuple(
        x.new_empty(x.shape) if want else None
        for x, want in zip(inputs.student, wanted, strict=True)
    )
    inputs = shaped_as_all(inputs, options.blocks.token_ranks)
    if plan.made == BACKWARD and options.loss.split.group is not None:
        gradients = linear_split.kept_fakes(inputs, options.loss)
    return loss_fakes(inputs, options.loss), gradients


linear_loss = LossOperator(
    "linear_loss", problem.LinearInputs, problem.LinearOptions, forward=forward, gradient=gradient, fake=fake,
    check=contents.of_linear_loss,
    students=("student_hidden", "student_weight", "student_bias"), outputs=LOSS_OUTPUTS, kept=3,
    references={
        "linear_topk_distillation_loss": "topk_distillation_loss of the student's logits",
        "linear_support_distillation_loss": "support_distillation_loss of both models' logits",
    },
)  # fmt: skip
