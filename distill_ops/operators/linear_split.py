"""The loss of hidden states over a vocabulary that ranks split: each block's logits are compared by the
phases of ``vocab_parallel/``, with their collectives, and turned into the gradient of this rank's columns."""

import torch

from ..checks.values import debug
from ..groups import check_agreement
from ..heads.engine import Gradients
from ..heads.ranks import N_KEPT, Ranks, joined, joined_again
from ..heads.select import placed
from ..problem import LinearInputs, LinearOptions, Options
from ..rows import TopKTeacher
from ..vocab_parallel import rows, topk
from ..vocab_parallel.losses import facts_of
from ..vocab_parallel.rows import local
from .path import phases_of
from .register import Plan


def here(
    inputs: LinearInputs, options: LinearOptions, plan: Plan, kept: torch.Tensor | None = None
) -> tuple[LinearInputs, LinearOptions, Ranks]:
    """The call on this rank: hidden states of all tokens, the teacher's part of a whole one, and the columns
    that count; from what the forward kept of it, where that was before."""
    split, width = options.loss.split, inputs.student_weight.shape[0]
    token_ranks, device = options.blocks.token_ranks, inputs.student_hidden.device
    if kept is None:
        if debug():
            check_agreement(split, facts_of_call(inputs, options, plan), device, width)
        of_teacher = None
        if inputs.teacher_weight is not None:
            of_teacher = inputs.teacher_weight.shape[0]
        elif inputs.teacher_logits is not None:
            of_teacher = inputs.teacher_logits.shape[-1]
        ranks = joined(split, width, inputs.n_rows, device, of_teacher, token_ranks)
    else:
        ranks = joined_again(split, kept, token_ranks)
    inputs = inputs._replace(
        student_hidden=ranks.all_tokens(inputs.student_hidden),
        teacher_hidden=ranks.all_tokens(inputs.teacher_hidden),
        teacher_weight=ranks.of_head(inputs.teacher_weight),
        teacher_bias=ranks.of_head(inputs.teacher_bias),
        teacher_logits=ranks.of_logits(inputs.teacher_logits),
    )
    return inputs, options._replace(loss=options.loss._replace(n_cols=ranks.place.n_cols)), ranks


def facts_of_call(inputs: LinearInputs, options: LinearOptions, plan: Plan) -> dict[str, object]:
    """What the ranks must agree in."""
    return {
        **facts_of(inputs, options.loss), **options._asdict(), "loss": None,
        "when gradients are made": plan.made, "which gradients are wanted": plan.wanted,
    }  # fmt: skip


class SplitRows:
    """The loss of rows of a pass over all tokens, by phases.

    Args:
        made: the pass (``linear.py``): its tokens, teacher, engine, and where results go.
        keep: whether :meth:`statistics` is asked for afterwards.
    """

    def __init__(self, made, ranks: Ranks, keep: bool = False):
        self.made, self.options, self.place = made, made.options, ranks.place
        top_k = made.options.tail is not None
        self.phases, self.order = phases_of(made.options.backend, top_k), topk if top_k else rows
        self.kept = None
        made.tokens = local(made.tokens, ranks.place)
        if keep:
            self.kept = made.losses.new_empty(made.selection.n_rows, self.phases.KEPT)

    def compared(self, part: slice):
        """Tokens of the rows under work, and the teacher as the phases take it."""
        teacher, tokens = self.made.compared(part)
        if isinstance(teacher, TopKTeacher):
            teacher = topk.SlotTeacher.of(teacher, self.place, self.options)
        return tokens, teacher

    def row_loss(self, student, part: slice, gradient) -> None:
        made, (tokens, teacher) = self.made, self.compared(part)
        found = self.order.row_losses(
            self.phases, self.options, tokens, student, teacher, self.place
        )
        made.losses[part] = found.losses
        if len(made.components):
            made.components[:, part] = found.components
        if self.kept is not None:
            self.kept[part] = found.kept
        if gradient is not None:
            one = found.kept.new_ones(())
            self._differentiate(tokens, student, teacher, found.kept, one, gradient)

    def _differentiate(self, tokens, student, teacher, kept, upstream, out) -> None:
        columns = student, teacher, self.place.n_cols
        self.order.differentiate(self.phases, self.options, tokens, *columns, kept, upstream, out)

    def statistics(self, n_tokens: int) -> torch.Tensor:
        """What the backward needs of all tokens, ``[n, KEPT]``."""
        return placed(self.kept.t(), self.made.selection, n_tokens).t().contiguous()

    def gradients(self, kept: torch.Tensor, upstream: torch.Tensor) -> Gradients:
        """For the incoming gradient, ``[]`` or ``[...]``, and what :meth:`statistics` gave: without a
        collective but for the hidden states'."""
        index = self.made.selection.index
        upstream = upstream.to(kept.dtype).reshape(-1).expand(len(kept))
        if index is not None:
            kept, upstream = (x.index_select(0, index) for x in (kept, upstream))
        kept = (
            kept.clone()
        )  # [:, 8]: a row's factor; one of 0 is not read: nor is one whose incoming gradient is 0
        kept[:, 8] = torch.where(upstream == 0, 0.0, kept[:, 8])

        def write(student, part, gradient):
            tokens, teacher = self.compared(part)
            of_rows = kept[part], upstream[part].contiguous()
            self._differentiate(tokens, student, teacher, *of_rows, gradient)

        return self.made.engine.run(write)


def kept_fakes(inputs: LinearInputs, options: Options):
    """Of a forward that makes no gradient; the inputs are those of all tokens."""
    new = inputs.student_hidden.new_empty
    numbers = phases_of(options.backend, options.tail is not None).KEPT
    of_rows = new((inputs.n_rows, numbers), dtype=inputs.dtype())
    return of_rows, new(N_KEPT, dtype=torch.int64, device="cpu"), None
