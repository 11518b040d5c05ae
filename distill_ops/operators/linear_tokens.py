"""The operator of token log-probabilities of hidden states: the engine of ``heads/``, token by token."""

import torch

from .. import problem
from ..checks import contents
from ..checks.values import debug
from ..groups import check_agreement
from ..heads.engine import Engine
from ..heads.projection import Projection
from ..heads.ranks import N_KEPT, Ranks, joined, joined_again
from ..heads.select import on_device, placed, select
from ..kernels.launch import TOKEN_STATISTICS
from ..problem import BACKWARD, NO_GRADIENTS, TokenInputs, Wanted
from ..rows import IGNORED, Tokens
from ..vocab_parallel import tokens as split_tokens
from ..vocab_parallel.losses import facts_of
from .path import path_of, phases_of
from .register import LossOperator, Plan
from .tokens import fake as token_fake
from .tokens import per_row


class TokenPass:
    """One pass over the tokens that count."""

    def __init__(
        self, inputs: problem.LinearTokenInputs, options: problem.LinearTokenOptions, wanted: Wanted,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        self.options, self.path = options.tokens, path_of(options.tokens.backend)
        self.triton = self.options.backend == "triton"
        blocks, dtype, ids = options.blocks, inputs.dtype(), inputs.ids.reshape(-1)
        kept = (ids != self.options.ignore_index).to(dtype)
        tokens = Tokens(ids, kept, 1.0, ())
        tokens, self.selection = select(tokens, ids.numel(), self.options.backend, None)
        self.ids, self.dtype, self.n_tokens = tokens.labels.contiguous(), dtype, ids.numel()
        n_cols, self.phases = inputs.weight.shape[0], None
        if ranks is not None:
            self.place, self.phases = ranks.place, phases_of(self.options.backend)
            n_cols = self.place.n_cols
            self.local_ids = split_tokens.local_ids(self.ids, self.options.ignore_index, self.place)
        wide = dtype == torch.float64
        student = Projection.of(
            *inputs[:3], options.head, self.selection, n_cols, wide, blocks.autocast, self.triton,
            ranks,
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

    def split_log_probs(self) -> tuple[torch.Tensor, ...]:
        """The same where ranks split the vocabulary: one collective, of all tokens."""
        n_numbers = 4 if self.options.entropy else 3
        numbers = self.ids.new_empty((n_numbers, self.selection.n_rows), dtype=self.dtype)

        def store(logits, rows, _):
            numbers[:, rows] = split_tokens.numbers_of(
                self.phases, self.options, logits, self.local_ids[rows], self.place.n_cols, self.dtype
            )  # fmt: skip

        self.engine.run(store)
        row = split_tokens.combined(self.place.group.all_gather(numbers), self.options)
        found, entropies, kept = split_tokens.results(row, self.options, self.local_ids == IGNORED)
        found, entropies, kept = (
            placed(x, self.selection, self.n_tokens) for x in (found, entropies, kept.t())
        )
        return found, entropies if self.options.entropy else None, kept.t().contiguous()

    def gradients(self, kept, upstreams):
        index = self.selection.index
        per_token = [
            x if x is None or index is None or x.numel() == 0 else x.index_select(0, index)
            for x in (kept, *upstreams)
        ]

        def write(logits, rows, gradient):
            of_rows = [x if x is None or x.numel() == 0 else x[rows] for x in per_token]
            if self.phases is not None:
                self.phases.token_gradient(
                    logits, self.local_ids[rows], of_rows[0], self.options.temperature, *of_rows[1:],
                    gradient,
                )  # fmt: skip
                return
            inputs = TokenInputs(logits, self.ids[rows])
            self.path.token_gradient(inputs, self.options, of_rows[0], of_rows[1:], gradient)

        return self.engine.run(write)


def here(
    inputs: problem.LinearTokenInputs,
    options: problem.LinearTokenOptions,
    kept: torch.Tensor | None = None,
) -> tuple[problem.LinearTokenInputs, Ranks]:
    """The call on this rank, with the hidden states of all tokens, and the ranks; ``kept`` is what the
    forward found of them."""
    split, token_ranks = options.tokens.split, options.blocks.token_ranks
    hidden, width = inputs.hidden, inputs.weight.shape[0]
    if kept is not None:
        ranks = joined_again(split, kept, token_ranks)
    else:
        if debug():
            facts = facts_of(inputs, options.tokens) | options._asdict() | {"tokens": None}
            check_agreement(split, facts, hidden.device, inputs.weight.shape[0])
        n_tokens = hidden.shape[:-1].numel()
        ranks = joined(split, width, n_tokens, hidden.device, token_ranks=token_ranks)
    return inputs._replace(hidden=ranks.all_tokens(hidden)), ranks


def forward(inputs: problem.LinearTokenInputs, options: problem.LinearTokenOptions, plan: Plan):
    """Log-probabilities and entropies ``[...]``; what the gradient needs of the rows is kept."""
    keep, of_ranks = plan.made == BACKWARD, None
    with on_device(inputs.hidden):
        if options.tokens.split.group is None:
            log_probs, entropies, kept = TokenPass(inputs, options, NO_GRADIENTS).log_probs(keep)
        else:
            inputs, ranks = here(inputs, options)
            found = TokenPass(inputs, options, NO_GRADIENTS, ranks)
            log_probs, entropies, kept = found.split_log_probs()
            kept, of_ranks = (kept, ranks.kept()) if keep else (None, None)
    entropies = None if entropies is None else entropies.view(inputs.leading)
    return (log_probs.view(inputs.leading), entropies), (kept, of_ranks)


def gradient(
    inputs: problem.LinearTokenInputs,
    options: problem.LinearTokenOptions,
    plan: Plan,
    kept,
    upstreams,
):
    hidden, ranks = inputs.hidden, None
    with on_device(hidden):
        if options.tokens.split.group is not None:
            inputs, ranks = here(inputs, options, kept[1])
        made = TokenPass(inputs, options, Wanted(*plan.wanted), ranks)
        return made.gradients(kept[0], per_row(upstreams)).of(hidden)


def fake(inputs: problem.LinearTokenInputs, options: problem.LinearTokenOptions, plan: Plan):
    outputs, (kept, offset) = token_fake(inputs, options.tokens, plan)
    if offset is not None:
        offset = inputs.ids.new_empty(N_KEPT, device="cpu")
    return outputs, (kept, offset)


linear_token_log_probs = LossOperator(
    "linear_token_log_probs", problem.LinearTokenInputs, problem.LinearTokenOptions, forward=forward,
    gradient=gradient, fake=fake,
    check=contents.of_linear_tokens, students=("hidden", "weight", "bias"), outputs=2, kept=2, differentiable=2,
)  # fmt: skip
