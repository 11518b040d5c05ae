"""The operator of token log-probabilities of hidden states: the engine of ``heads/``, token by token."""

import torch

from .. import problem
from ..checks import contents
from ..heads.engine import Engine
from ..heads.projection import Projection
from ..heads.select import on_device, placed, select
from ..kernels.launch import TOKEN_STATISTICS
from ..problem import BACKWARD, NO_GRADIENTS, TokenInputs, Wanted
from ..rows import Tokens
from .path import path_of
from .register import LossOperator, Plan
from .tokens import fake as token_fake
from .tokens import per_row


class TokenPass:
    """One pass over the tokens that count."""

    def __init__(
        self, inputs: problem.LinearTokenInputs, options: problem.LinearTokenOptions, wanted: Wanted
    ):
        self.options, self.path = options.tokens, path_of(options.tokens.backend)
        self.triton = self.options.backend == "triton"
        blocks, dtype, ids = options.blocks, inputs.dtype(), inputs.ids.reshape(-1)
        kept = (ids != self.options.ignore_index).to(dtype)
        tokens = Tokens(ids, kept, 1.0, ())
        tokens, self.selection = select(tokens, ids.numel(), self.options.backend, None)
        self.ids, self.dtype, self.n_tokens = tokens.labels.contiguous(), dtype, ids.numel()
        wide = dtype == torch.float64
        student = Projection.of(
            *inputs[:3], options.head, self.selection, inputs.weight.shape[0], wide,
            blocks.autocast, self.triton,
        )  # fmt: skip
        logits_dtype = torch.float64 if wide else blocks.logits_dtype
        self.engine = Engine(student, logits_dtype, wanted, blocks.memory_budget, 0)

    def log_probs(self, keep: bool) -> tuple[torch.Tensor | None, ...]:
        """Log-probabilities and entropies ``[n]`` of all tokens; what the gradient needs."""
        n, new = self.selection.n_rows, self.ids.new_empty
        found = new(n, dtype=self.dtype)
        entropies = new(n, dtype=self.dtype) if self.options.entropy else None
        kept = None
        if keep and self.triton:
            kept = new((n, TOKEN_STATISTICS), dtype=self.dtype)

        def store(logits, rows, _):
            inputs = TokenInputs(logits, self.ids[rows])
            results = self.path.token_log_probs(inputs, self.options, keep)
            for target, values in zip((found, entropies, kept), results, strict=True):
                if target is not None:
                    target[rows] = values

        self.engine.run(store)
        if entropies is not None:
            entropies = placed(entropies, self.selection, self.n_tokens)
            kept = entropies.clone() if keep and not self.triton else kept
        return placed(found, self.selection, self.n_tokens), entropies, kept

    def gradients(self, kept, upstreams):
        index = self.selection.index
        per_token = [
            x if x is None or index is None or x.numel() == 0 else x.index_select(0, index)
            for x in (kept, *upstreams)
        ]

        def write(logits, rows, gradient):
            of_rows = [x if x is None or x.numel() == 0 else x[rows] for x in per_token]
            inputs = TokenInputs(logits, self.ids[rows])
            self.path.token_gradient(inputs, self.options, of_rows[0], of_rows[1:], gradient)

        return self.engine.run(write)


def forward(inputs: problem.LinearTokenInputs, options: problem.LinearTokenOptions, plan: Plan):
    """Log-probabilities and entropies ``[...]``; what the gradient needs of the rows is kept."""
    with on_device(inputs.hidden):
        found = TokenPass(inputs, options, NO_GRADIENTS)
        log_probs, entropies, kept = found.log_probs(plan.made == BACKWARD)
    entropies = None if entropies is None else entropies.view(inputs.leading)
    return (log_probs.view(inputs.leading), entropies), (kept, None)


def gradient(
    inputs: problem.LinearTokenInputs,
    options: problem.LinearTokenOptions,
    plan: Plan,
    kept,
    upstreams,
):
    with on_device(inputs.hidden):
        made = TokenPass(inputs, options, Wanted(*plan.wanted))
        return made.gradients(kept[0], per_row(upstreams)).of(inputs.hidden)


linear_token_log_probs = LossOperator(
    "linear_token_log_probs", problem.LinearTokenInputs, problem.LinearTokenOptions, forward=forward,
    gradient=gradient, fake=lambda inputs, options, plan: token_fake(inputs, options.tokens, plan),
    check=contents.of_linear_tokens, students=("hidden", "weight", "bias"), outputs=2, kept=2, differentiable=2,
)  # fmt: skip
