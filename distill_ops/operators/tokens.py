"""The operator of token log-probabilities."""

import torch

from ..checks import contents
from ..problem import BACKWARD, TokenInputs, TokenOptions
from ..vocab_parallel import tokens as split_tokens
from .path import path_of, phases_of
from .register import LossOperator, Plan


def forward(inputs: TokenInputs, options: TokenOptions, plan: Plan):
    """Log-probabilities and entropies ``[...]``; what the gradient needs of the rows is kept, and the
    offset of a split vocabulary's columns."""
    keep = plan.made == BACKWARD
    if options.split.group is not None:
        phases = phases_of(options.backend)
        (log_probs, entropies), kept = split_tokens.log_probs(phases, inputs, options)
        return (log_probs, entropies if options.entropy else None), kept if keep else (None, None)
    log_probs, entropies, kept = path_of(options.backend).token_log_probs(inputs, options, keep)
    return (log_probs, entropies), (kept, None)


def per_row(upstreams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Upstream gradients of log-probabilities and entropies, ``[n]``."""
    upstream, of_entropy = (x if x is None else x.reshape(-1).contiguous() for x in upstreams)
    return torch.zeros_like(of_entropy) if upstream is None else upstream, of_entropy


def gradient(inputs: TokenInputs, options: TokenOptions, plan: Plan, kept, upstreams):
    out = torch.empty_like(inputs.logits, memory_format=torch.contiguous_format)
    upstreams = per_row(upstreams)
    if options.split.group is not None:
        phases = phases_of(options.backend)
        split_tokens.gradient(phases, inputs, options, kept, upstreams, out)
    else:
        path_of(options.backend).token_gradient(inputs, options, kept[0], upstreams, out)
    return (out,)


def fake(inputs, options: TokenOptions, plan: Plan):
    new, dtype, kept, offset = inputs[0].new_empty, inputs.dtype(), None, None
    split = options.split.group is not None
    if plan.made == BACKWARD and split:
        offset = new((), dtype=torch.int64)
    if plan.made == BACKWARD and (split or options.backend == "triton"):
        kept = new((inputs.n_rows, inputs.statistics), dtype=dtype)
    elif plan.made == BACKWARD and options.entropy:
        kept = new(inputs.n_rows, dtype=dtype)
    entropies = new(inputs.leading, dtype=dtype) if options.entropy else None
    return (new(inputs.leading, dtype=dtype), entropies), (kept, offset)


token_log_probs = LossOperator(
    "token_log_probs", TokenInputs, TokenOptions, forward=forward, gradient=gradient, fake=fake,
    check=contents.of_tokens, students=("logits",), outputs=2, kept=2, differentiable=2,
)  # fmt: skip
