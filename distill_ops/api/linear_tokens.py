"""Log-probabilities of given tokens from hidden states and a language-model head."""

from typing import Any

import torch

from ..checks.heads import check_head
from ..checks.options import block_options, head_options
from ..checks.split_heads import check_sequence_parallel, split_heads
from ..checks.tokens import check_token_ids
from ..checks.values import TokenRows
from ..operators.linear_tokens import linear_token_log_probs as operator
from ..problem import LinearTokenInputs, LinearTokenOptions, TokenOptions
from ..scalars import flag
from .choices import autocast_dtype, choose_backend, gradient_mode


def linear_token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Any = None,
    vocab_offset: int | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`token_log_probs` of a language-model head, without its logits in memory.

    ``log_softmax(softcap((hidden weight^T + bias) * logit_scale) / T)`` at the tokens' ids, in nats.
    Hidden states ``[..., d]``, a head and ids ``[...]`` go in, ``[...]`` comes out, differentiable.

    Example:
        >>> import torch, distill_ops
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> log_probs = distill_ops.linear_token_log_probs(hidden, weight, torch.tensor([0, 1]))
        >>> [round(x, 4) for x in log_probs.tolist()]
        [-0.6803, -0.3064]

    With ``softcap(x) = c tanh(x / c)``. Logits are formed a block of tokens at a time: one matrix
    product forward; in the backward, whose incoming gradients are not known before, they are formed
    again, and two more products give the gradients of hidden states and weight.

    Args:
        hidden: ``[..., d]``, float32, bfloat16, float16, or float64 (not in Triton).
        weight: ``[V, d]``.
        token_ids: ``[...]``, int64 or int32, aligned with the hidden states: of a model's own input pass
            ``hidden[:, :-1]`` and ``input_ids[:, 1:]``. Where it is ``ignore_index`` the hidden
            state is not read: results and gradient are 0.
        bias: ``[V]``.
        logit_scale, softcap: positive; no cap where None.
        temperature, return_entropy: as in :func:`token_log_probs`.
        logits_dtype, memory_budget: as in :func:`linear_distillation_loss`.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.
        group, vocab_offset, sequence_parallel: as in :func:`linear_distillation_loss`, of a column-parallel head.
            One collective beside the exchange of widths, and one in the backward, which sums the gradient of
            the hidden states.

    Returns:
        Nats, ``[...]``, float32 (float64 where a tensor is), or a pair (log-probabilities, entropies).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    flag("return_entropy", return_entropy)
    blocks, head = (
        block_options(logits_dtype, memory_budget),
        head_options("", logit_scale, softcap),
    )
    split, weight, bias = split_heads(group, vocab_offset, None, weight=weight, bias=bias)
    ranks = check_sequence_parallel(sequence_parallel, group, hidden=hidden)
    tensors = hidden, weight, bias
    check_head("", *tensors, least=int(split.group is None))
    ids, temperature, ignore_index = check_token_ids(
        TokenRows("hidden", hidden, ranks), token_ids, temperature, ignore_index
    )
    backend = choose_backend(backend, "hidden", *tensors)
    options = LinearTokenOptions(
        TokenOptions(backend, temperature, ignore_index, return_entropy, split), head,
        blocks._replace(autocast=autocast_dtype(hidden.device), token_ranks=ranks),
    )  # fmt: skip
    made = gradient_mode("backward", "none", *tensors)
    inputs = LinearTokenInputs(*tensors, ids)
    outputs = operator("linear_token_log_probs", inputs, options, made)
    return outputs if return_entropy else outputs[0]
