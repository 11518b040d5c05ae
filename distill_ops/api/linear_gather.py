"""K tokens a row of hidden states: whose logits are the largest, and their log-probabilities."""

import torch

from ..checks.heads import check_head
from ..checks.logits import check_vocabulary
from ..checks.options import block_options, head_options
from ..checks.slots import check_gather
from ..checks.values import TokenRows, check_temperature
from ..operators.linear_gather import linear_gather_log_probs as gather_operator
from ..operators.linear_gather import linear_top_ids
from ..scalars import integer
from ..support import (
    GatherOptions,
    LinearGatherInputs,
    LinearGatherOptions,
    LinearTopInputs,
    LinearTopOptions,
    TopOptions,
)
from .choices import autocast_dtype, choose_backend


def linear_student_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """:func:`student_topk` of a language-model head, without its logits in memory.

    ``torch.topk`` of ``softcap((hidden weight^T + bias) * logit_scale)``, a block of tokens at a time.
    Hidden states ``[..., d]`` and a head ``[V, d]`` go in; ids ``[..., k]`` come out, detached.

    Example:
        >>> import torch, distill_ops
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> distill_ops.linear_student_topk(hidden, weight, 2).tolist()
        [[0, 2], [1, 2]]

    One matrix product; :func:`linear_support_distillation_loss` chooses from the logits that it forms
    for the loss anyway.

    Args:
        hidden: ``[..., d]``, float32, bfloat16, float16 or float64; no gradient flows.
        weight: ``[V, d]``.
        k, vocab_size: as in :func:`student_topk`.
        bias: ``[V]``.
        logit_scale, softcap, logits_dtype, memory_budget: as in :func:`linear_token_log_probs`.

    Result and errors are those of :func:`student_topk`.
    """
    blocks = block_options(logits_dtype, memory_budget)
    head = head_options("", logit_scale, softcap)
    tensors = hidden, weight, bias
    check_head("", *tensors)
    n_cols = check_vocabulary(vocab_size, weight.shape[0])
    top = TopOptions(choose_backend("auto", "hidden", *tensors), integer("k", k, 1, n_cols), n_cols)
    options = LinearTopOptions(top, head, blocks._replace(autocast=autocast_dtype(hidden.device)))
    inputs = LinearTopInputs(*(x if x is None else x.detach() for x in tensors))
    (ids,) = linear_top_ids("linear_student_topk", inputs, options)
    return ids


def linear_gather_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    loss_mask: torch.Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`gather_log_probs` of a language-model head, without its logits in memory.

    ``log_softmax(softcap((hidden weight^T + bias) * logit_scale) / T)`` at the ids, in nats.
    Hidden states ``[..., d]``, a head and ids ``[..., K]`` go in, ``[..., K]`` comes out, detached.

    Example:
        >>> import torch, distill_ops
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> log_probs = distill_ops.linear_gather_log_probs(hidden, weight, torch.tensor([[0, 2], [1, -1]]))
        >>> [[round(x, 4) for x in row] for row in log_probs.tolist()]
        [[-0.6803, -1.1803], [-0.3064, -inf]]

    One matrix product, a block of tokens at a time.

    Args:
        hidden: ``[..., d]``, float32, bfloat16, float16, or float64 (not in Triton); they must not
            require grad while gradients are enabled.
        weight: ``[V, d]``; detached.
        ids: ``[..., K]``, as in :func:`gather_log_probs`.
        bias: ``[V]``; detached.
        logit_scale, softcap, logits_dtype, memory_budget: as in :func:`linear_token_log_probs`.
        temperature, vocab_size, backend: as in :func:`gather_log_probs`.
        loss_mask: ``[...]``: the hidden states of rows of weight 0 are not read.

    Result and errors are those of :func:`gather_log_probs`; float64 where a tensor is.
    """
    blocks = block_options(logits_dtype, memory_budget)
    head = head_options("", logit_scale, softcap)
    tensors = hidden, weight, bias
    check_head("", *tensors, frozen=True)
    n_cols = check_vocabulary(vocab_size, weight.shape[0])
    check_gather(TokenRows("hidden", hidden), ids, loss_mask)
    gather = GatherOptions(
        choose_backend(backend, "hidden", *tensors), check_temperature(temperature), n_cols
    )
    options = LinearGatherOptions(
        gather, head, blocks._replace(autocast=autocast_dtype(hidden.device))
    )
    inputs = LinearGatherInputs(*(x if x is None else x.detach() for x in tensors), ids, loss_mask)
    (log_probs,) = gather_operator("linear_gather_log_probs", inputs, options)
    return log_probs
