"""Log-probabilities of given tokens."""

from typing import Any

import torch

from ..checks.split import split_logits
from ..checks.tokens import check_mixture, check_token_log_probs
from ..operators.tokens import token_log_probs as operator
from ..problem import TokenInputs, TokenOptions
from ..scalars import flag
from .choices import choose_backend, gradient_mode


def token_log_probs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
    group: Any = None,
    vocab_offset: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens, in nats, and the entropy of their rows.

    ``log_softmax(logits / T)`` at the ids; with ``return_entropy``, ``H = -sum(q log q)`` too.
    Logits ``[..., V]`` and ids ``[...]`` go in, ``[...]`` or a pair comes out, differentiable.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]])
        >>> log_probs, entropy = distill_ops.token_log_probs(
        ...     logits, torch.tensor([1]), temperature=2.0, return_entropy=True
        ... )
        >>> round(log_probs.item(), 4), round(entropy.item(), 4)
        (-0.982, 1.4915)

    One read of the logits in the forward; one read and one write, of the gradient, in the backward;
    nothing of the vocabulary's size in between. The gradients with respect to logit j are
    ``(1[j = id] - q_j) / T`` and ``-q_j (log q_j + H) / T``; both are made at once.

    A logit of -inf has no part in the entropy; an id whose logit is -inf gives -inf, with that same
    finite gradient. A row of NaN, of +inf, or all -inf gives NaN.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in Triton). Rows may be
            strided: a view such as ``logits[:, :-1]`` is not copied.
        token_ids: ``[...]``, int64 or int32, aligned with the logits: no shift happens inside. Of a model's
            own input pass ``logits[:, :-1]`` and ``input_ids[:, 1:]``. Where it is ``ignore_index``
            the row is not read: results and gradient are 0.
        temperature: T above, positive.
        return_entropy: return the pair (log-probabilities, entropies).
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.
        group: the ranks that split the vocabulary, as in :func:`distill_ops.distillation_loss`: each calls with
            its columns of the logits and the same ids, which count over all columns, and gets the same
            results and the gradient of its columns. One collective, none in the backward
            (docs/vocab-parallel.md).
        vocab_offset: the columns before this rank's; without it the ranks exchange their widths, one more
            collective.

    Returns:
        ``[...]``, float32 (float64 for float64 logits), or a pair of them; differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    flag("return_entropy", return_entropy)
    split, logits, _ = split_logits(group, vocab_offset, None, logits, None, ("logits", ""))
    ids, temperature, ignore_index = check_token_log_probs(
        logits, token_ids, temperature, ignore_index, split
    )
    backend = choose_backend(backend, "logits", logits)
    options = TokenOptions(backend, temperature, ignore_index, return_entropy, split)
    made = gradient_mode("backward", "none", logits)
    outputs = operator("token_log_probs", TokenInputs(logits, ids), options, made)
    return outputs if return_entropy else outputs[0]


def mixture_token_log_probs(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_weight: float | torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> torch.Tensor:
    """Log-probabilities of given tokens under a mixture of student and teacher, in nats.

    ``log((1 - a) q + a p)`` at the ids, q and p the softmax at T: MiniLLM's teacher-mixed sampling.
    Logits ``[..., V]`` and ids ``[...]`` go in, ``[...]`` comes out, differentiable in the student's.

    Example:
        >>> import torch, distill_ops
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, float("-inf")]])
        >>> distill_ops.mixture_token_log_probs(student, teacher, torch.tensor([3]), 0.5).exp()
        tensor([0.1250])

    a is ``teacher_weight`` (arXiv:2306.08543, section 2.2: tokens are drawn from this mixture, and
    the importance weight of a token is ``exp(token_log_probs(student) - this)``). Each row is read
    once.

    Args:
        student_logits, teacher_logits, token_ids, temperature, backend: as in
            :func:`distillation_statistics`. Where the id is ``ignore_index`` result and gradient are 0.
        teacher_weight: a in [0, 1], a number or a tensor, 0-d or ``[...]``.

    Returns:
        ``[...]``, float32 (float64 for float64 logits), differentiable; -inf for an id that is
        impossible under the mixture, NaN for a row of NaN, of +inf, or all -inf.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    (ids, temperature, ignore_index), teacher_weight = check_mixture(
        student_logits, teacher_logits, token_ids, teacher_weight, temperature, ignore_index
    )
    options = TokenOptions(
        choose_backend(backend, "student_logits", student_logits, teacher_logits),
        temperature, ignore_index, False,
    )  # fmt: skip
    log_q, log_p = (
        operator(
            "mixture_token_log_probs", TokenInputs(x, ids), options,
            gradient_mode("backward", "none", x),
        )[0]
        for x in (student_logits, teacher_logits.detach())
    )  # fmt: skip
    dtype = torch.promote_types(log_q.dtype, log_p.dtype)
    mixture = _log_mixture(teacher_weight, log_p.to(dtype), log_q.to(dtype))
    return mixture.masked_fill(ids == ignore_index, 0.0)


def _log_mixture(
    weight: float | torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor
) -> torch.Tensor:
    """``log(weight p + (1 - weight) q)``, -inf without a gradient where that is 0."""
    weight = torch.as_tensor(weight, dtype=log_p.dtype, device=log_p.device)
    both = torch.stack([log_p + weight.log(), log_q + torch.log1p(-weight)])
    impossible = both.isneginf().all(0)
    return both.masked_fill(impossible, 0.0).logsumexp(0).masked_fill(impossible, -torch.inf)
