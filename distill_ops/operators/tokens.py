"""Registration of the token operators with PyTorch, and their autograd."""

import torch

from . import token_host as host
from .differentiation import check_backward, save_inputs, saved_inputs
from .kernels.launch import TOKEN_STATISTICS
from .ops import empty_gradient, library
from .paths import device_of, flat, working_dtype

_OPTIONS = "float temperature, SymInt ignore_index, str backend"
library.define(
    f"token_log_probs(Tensor logits, Tensor ids, {_OPTIONS}, bool with_entropy, bool keep)"
    " -> (Tensor log_probs, Tensor entropies, Tensor statistics)"
)
library.define(
    "token_gradient(Tensor logits, Tensor ids, Tensor statistics, Tensor? upstream, "
    f"Tensor? upstream_entropy, {_OPTIONS}) -> Tensor"
)


def token_log_probs(logits, ids, temperature, ignore_index, backend, with_entropy, keep):
    """Log-probabilities and entropies ``[...]``; ``statistics`` is what the gradient needs of the
    rows, on the CPU their entropies."""
    shape, dtype, flat_ids = ids.shape, working_dtype(logits), flat(ids)
    new = logits.new_empty
    if backend == "triton":
        from .kernels import token as kernel

        log_probs = new(shape, dtype=dtype)
        entropies = new(shape if with_entropy else 0, dtype=dtype)
        statistics = new((flat_ids.numel(), TOKEN_STATISTICS) if keep else 0, dtype=dtype)
        with device_of(logits):
            kernel.run(
                logits, flat_ids, temperature, ignore_index, log_probs=log_probs,
                entropies=entropies if with_entropy else None,
                statistics=statistics if keep else None,
            )  # fmt: skip
        return log_probs, entropies, statistics
    log_probs, entropies = host.log_probs(
        logits, flat_ids, temperature, ignore_index, dtype, with_entropy
    )
    if not with_entropy:
        return log_probs.view(shape), new(0, dtype=dtype), new(0, dtype=dtype)
    statistics = entropies.clone() if keep else new(0, dtype=dtype)
    return log_probs.view(shape), entropies.view(shape), statistics


def _token_log_probs_fake(logits, ids, temperature, ignore_index, backend, with_entropy, keep):
    shape, dtype, new = ids.shape, working_dtype(logits), logits.new_empty
    kept = 0
    if keep and backend == "triton":
        kept = (ids.numel(), TOKEN_STATISTICS)
    elif keep and with_entropy:
        kept = ids.numel()
    entropies = new(shape if with_entropy else 0, dtype=dtype)
    return new(shape, dtype=dtype), entropies, new(kept, dtype=dtype)


def fill_token_gradient(
    logits, ids, statistics, upstream, upstream_entropy, temperature, ignore_index, backend, gradient
) -> None:  # fmt: skip
    """Write the gradient, which may be over the logits."""
    upstream_entropy = flat(upstream_entropy)
    if upstream is None:
        upstream = torch.zeros_like(upstream_entropy)
    arguments = (flat(ids), flat(upstream), upstream_entropy)
    if backend == "triton":
        from .kernels import token as kernel

        flat_ids, upstream, upstream_entropy = arguments
        with device_of(logits):
            kernel.run(
                logits, flat_ids, temperature, ignore_index, statistics=statistics,
                gradient=gradient, upstream=upstream, upstream_entropy=upstream_entropy,
            )  # fmt: skip
    else:
        flat_ids, *upstreams = arguments
        host.fill_gradient(
            logits, flat_ids, statistics, *upstreams, temperature, ignore_index, gradient
        )


def token_gradient(logits, *others):
    gradient = empty_gradient(logits)
    fill_token_gradient(logits, *others, gradient)
    return gradient


def _setup_context(ctx, inputs, output) -> None:
    logits, ids, *ctx.options, with_entropy, keep = inputs
    if not keep:
        raise RuntimeError("token_log_probs with keep=False got logits that require grad")
    _, entropies, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([] if with_entropy else [entropies]), statistics)
    save_inputs(ctx, (logits, ids, []), statistics)


def _backward(ctx, upstream, upstream_entropy, _):
    others = (None,) * 6
    if upstream is None and upstream_entropy is None:
        return None, *others
    check_backward(ctx, "token_log_probs")
    (logits, ids, _), (statistics,) = saved_inputs(ctx)
    arguments = (logits, ids, statistics, upstream, upstream_entropy, *ctx.options)
    return token_gradient_op(*arguments), *others


for _name, _function, _fake in [
    ("token_log_probs", token_log_probs, _token_log_probs_fake),
    ("token_gradient", token_gradient, lambda logits, *_: logits.new_empty(logits.shape)),
]:
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=library)
torch.library.register_autograd(
    "distill_ops::token_log_probs", _backward, setup_context=_setup_context, lib=library
)
token_log_probs_op = torch.ops.distill_ops.token_log_probs.default
token_gradient_op = torch.ops.distill_ops.token_gradient.default
