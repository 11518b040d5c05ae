"""Registration of ``linear_token_log_probs`` with PyTorch, and its autograd: the engine of
``heads.py`` with the token kernel on each block of rows."""

import math
from typing import NamedTuple

import torch

from .differentiation import check_backward, save_inputs, saved_inputs
from .heads import (
    NO_GRADIENTS,
    Engine,
    Gradients,
    Projection,
    Wanted,
    gradient_fakes,
    product_dtype,
)
from .kernels.launch import TOKEN_STATISTICS
from .linear_ops import dtype_name, head_of, named_dtype, on_device, select
from .ops import library
from .paths import Tokens, working_dtype
from .token_ops import fill_token_gradient, token_log_probs


class TokenOptions(NamedTuple):
    """The options of the operators; ``pack`` and ``unpack`` are each other's inverse."""

    backend: str
    logits_dtype: torch.dtype
    autocast: torch.dtype | None  # in which it has products made
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    with_entropy: bool
    memory_budget: int | None
    wanted: Wanted

    def pack(self) -> tuple[list[str], list[float], list[int]]:
        dtypes = [dtype_name(x) for x in self[1:3]]
        softcap = math.nan if self.softcap is None else float(self.softcap)
        numbers = [self.temperature, float(self.logit_scale), softcap]
        sizes = [self.ignore_index, int(self.with_entropy), self.memory_budget or 0]
        return [self.backend, *dtypes], numbers, [*sizes, *map(int, self.wanted)]

    @classmethod
    def unpack(cls, choices: list[str], numbers: list[float], sizes: list[int]) -> "TokenOptions":
        dtypes = [named_dtype(name) for name in choices[1:]]
        temperature, scale, softcap = numbers
        return cls(
            choices[0], *dtypes, temperature, scale, None if math.isnan(softcap) else softcap,
            sizes[0], bool(sizes[1]), sizes[2] or None, Wanted(*map(bool, sizes[3:])),
        )  # fmt: skip


N_TENSORS = 4
N_SHARED = N_TENSORS + 3
_SHARED = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, str[] choices, float[] numbers, "
    "SymInt[] sizes"
)
_GRADIENTS = "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient"
library.define(
    f"linear_token_log_probs({_SHARED}) -> (Tensor log_probs, Tensor entropies, Tensor statistics)"
)
library.define(
    f"linear_token_gradient({_SHARED}, Tensor statistics, Tensor? upstream, "
    f"Tensor? upstream_entropy) -> ({_GRADIENTS})"
)


class _Run:
    """One pass over the tokens that count."""

    def __init__(self, hidden, weight, bias, ids, options: TokenOptions, wanted: Wanted):
        self.options, self.dtype = options, working_dtype(hidden, weight, bias)
        triton = options.backend == "triton"
        ids = ids.reshape(-1)
        weights = (ids != options.ignore_index).to(self.dtype)
        tokens, self.selection = select(
            Tokens(ids, weights, 1.0, ()), ids.numel(), options.backend, None
        )
        self.ids = tokens.labels
        wide = self.dtype == torch.float64
        head = head_of(hidden, weight, bias, options.logit_scale, options.softcap)
        dtype = product_dtype(head.hidden, weight, wide, options.autocast)
        projection = Projection(head, self.selection, weight.shape[0], dtype, triton)
        logits_dtype = torch.float64 if wide else options.logits_dtype
        self.engine = Engine(projection, logits_dtype, wanted, options.memory_budget, 0)
        self.shared = (options.temperature, options.ignore_index, options.backend)

    def placed(self, found: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Results of the selected tokens at their places among all."""
        index = self.selection.index
        return found if index is None else found.new_zeros(n_rows).index_copy_(0, index, found)

    def log_probs(self, n_rows: int, keep: bool) -> tuple[torch.Tensor, ...]:
        n = self.selection.n_rows
        new = self.engine.projection.head.hidden.new_empty
        found = new(n, dtype=self.dtype)
        entropies = new(n if self.options.with_entropy else 0, dtype=self.dtype)
        on_gpu = self.options.backend == "triton"
        shape = (n, TOKEN_STATISTICS) if keep and on_gpu else 0
        statistics = new(shape, dtype=self.dtype)

        def rows_found(logits, rows, _):
            log_probs, entropy, kept = token_log_probs(
                logits, self.ids[rows], *self.shared, self.options.with_entropy, keep
            )
            found[rows] = log_probs
            if self.options.with_entropy:
                entropies[rows] = entropy
            if keep and on_gpu:
                statistics[rows] = kept

        self.engine.run(rows_found)
        log_probs = self.placed(found, n_rows)
        if not self.options.with_entropy:
            return log_probs, entropies, statistics
        entropies = self.placed(entropies, n_rows)
        return log_probs, entropies, entropies.clone() if keep and not on_gpu else statistics

    def gradients(self, statistics, upstream, upstream_entropy) -> Gradients:
        index = self.selection.index
        per_token = (
            x if x is None or index is None or x.numel() == 0 else x.index_select(0, index)
            for x in (statistics, upstream, upstream_entropy)
        )
        per_token = tuple(per_token)

        def write(logits, rows, gradient):
            of_rows = (x if x is None or x.numel() == 0 else x[rows] for x in per_token)
            fill_token_gradient(logits, self.ids[rows], *of_rows, *self.shared, gradient)

        return self.engine.run(write)


def linear_token_log_probs(*arguments):
    """Log-probabilities and entropies ``[...]``; ``statistics`` is what the gradient needs of the
    rows, on the CPU their entropies."""
    hidden, weight, bias, ids = arguments[:N_TENSORS]
    options = TokenOptions.unpack(*arguments[N_TENSORS:])
    with on_device(hidden):
        run = _Run(hidden, weight, bias, ids, options, NO_GRADIENTS)
        log_probs, entropies, statistics = run.log_probs(ids.numel(), any(options.wanted))
    entropies = entropies.view(ids.shape) if options.with_entropy else entropies
    return log_probs.view(ids.shape), entropies, statistics


def linear_token_gradient(*arguments):
    hidden, weight, bias, ids = arguments[:N_TENSORS]
    options = TokenOptions.unpack(*arguments[N_TENSORS:N_SHARED])
    statistics, *upstreams = arguments[N_SHARED:]
    with on_device(hidden):
        run = _Run(hidden, weight, bias, ids, options, options.wanted)
        upstreams = (None if x is None else x.reshape(-1).contiguous() for x in upstreams)
        return run.gradients(statistics, *upstreams).outputs(hidden)


def _linear_token_log_probs_fake(hidden, weight, bias, ids, *options):
    options = TokenOptions.unpack(*options)
    new, dtype = hidden.new_empty, working_dtype(hidden, weight, bias)
    kept = 0
    if any(options.wanted):
        if options.backend == "triton":
            kept = (ids.numel(), TOKEN_STATISTICS)
        elif options.with_entropy:
            kept = ids.numel()
    entropies = new(ids.shape if options.with_entropy else 0, dtype=dtype)
    return new(ids.shape, dtype=dtype), entropies, new(kept, dtype=dtype)


def _linear_token_gradient_fake(*arguments):
    wanted = TokenOptions.unpack(*arguments[N_TENSORS:N_SHARED]).wanted
    return gradient_fakes(arguments[:3], wanted)


def _setup_context(ctx, inputs, output) -> None:
    _, entropies, statistics = output
    ctx.options = inputs[N_TENSORS:]
    options = TokenOptions.unpack(*ctx.options)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([] if options.with_entropy else [entropies]), statistics)
    save_inputs(ctx, (*inputs[:N_TENSORS], []), statistics)


def _backward(ctx, upstream, upstream_entropy, _):
    others = [None] * N_SHARED
    if upstream is None and upstream_entropy is None:
        return tuple(others)
    check_backward(ctx, "linear_token_log_probs")
    (*tensors, _), (statistics,) = saved_inputs(ctx)
    gradients = linear_token_gradient_op(
        *tensors, *ctx.options, statistics, upstream, upstream_entropy
    )
    wanted = TokenOptions.unpack(*ctx.options).wanted
    others[:3] = [x if want else None for x, want in zip(gradients, wanted, strict=True)]
    return tuple(others)


for _name, _function, _fake in [
    ("linear_token_log_probs", linear_token_log_probs, _linear_token_log_probs_fake),
    ("linear_token_gradient", linear_token_gradient, _linear_token_gradient_fake),
]:
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=library)
torch.library.register_autograd(
    "distill_ops::linear_token_log_probs", _backward, setup_context=_setup_context, lib=library
)
linear_token_log_probs_op = torch.ops.distill_ops.linear_token_log_probs.default
linear_token_gradient_op = torch.ops.distill_ops.linear_token_gradient.default
