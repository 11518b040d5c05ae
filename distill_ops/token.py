"""Log-probabilities of given tokens, and what on-policy methods need beside them."""

import torch

from .checks import check_mixture, check_statistics, check_token_log_probs
from .differentiation import refuse_transforms
from .divergences import Divergence, ReverseKL
from .losses import use_triton
from .paths import Options
from .reference import DistillationStatistics
from .reference.dense import log_mixture
from .statistics_ops import distillation_statistics_op
from .token_ops import token_log_probs_op


def _log_probs(name, logits, token_ids, temperature, ignore_index, triton, with_entropy):
    if not torch.compiler.is_compiling():
        refuse_transforms(logits, function=name)
    keep = torch.is_grad_enabled() and logits.requires_grad
    log_probs, entropies, _ = token_log_probs_op(
        logits, token_ids, float(temperature), ignore_index, "triton" if triton else "torch",
        with_entropy, keep,
    )  # fmt: skip
    return log_probs, entropies


def token_log_probs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
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
    nothing of the vocabulary's size in between. With ``q = softmax(logits / T)`` the gradients with
    respect to logit j are ``(1[j = id] - q_j) / T`` and ``-q_j (log q_j + H) / T``; both are made at
    once.

    A logit of -inf has no part in the entropy; an id whose logit is -inf gives -inf, with that same
    finite gradient. A row of NaN, of +inf, or all -inf gives NaN.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in Triton). Rows may be
            strided: a view such as ``logits[:, :-1]`` is not copied.
        token_ids: ``[...]``, int64, aligned with the logits: no shift happens inside. Of a model's
            own input pass ``logits[:, :-1]`` and ``input_ids[:, 1:]``. Where it is ``ignore_index``
            the row is not read: results and gradient are 0.
        temperature: T above, positive.
        return_entropy: return the pair (log-probabilities, entropies).
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        ``[...]``, float32 (float64 for float64 logits), or a pair of them; differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    check_token_log_probs(logits, token_ids, temperature, ignore_index)
    triton = use_triton(backend, logits, None)
    log_probs, entropies = _log_probs(
        "token_log_probs", logits, token_ids, temperature, ignore_index, triton, return_entropy
    )
    return (log_probs, entropies) if return_entropy else log_probs


def distillation_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    divergence: Divergence | str = ReverseKL(),
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> DistillationStatistics:
    """Divergence, log-probabilities, entropies and agreement of both models, token by token.

    ``divergence(q, p)``, ``log q_id``, ``log p_id``, ``-sum(q log q)``, ``-sum(p log p)``; in nats.
    Logits ``[..., V]`` and ids ``[...]`` go in; :class:`DistillationStatistics` of ``[...]`` comes out.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]])
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> found = distill_ops.distillation_statistics(student, teacher, torch.tensor([4]))
        >>> [round(x.item(), 4) for x in (found.divergence, found.teacher_log_prob)]
        [0.4723, -0.7164]
        >>> found.top1_agreement
        tensor([False])

    All that an on-policy distillation step needs of a token (MiniLLM, arXiv:2306.08543: importance
    weights, the single-step reverse KL, rewards and entropy) in one call: one launch forward, which
    finds the logits in cache after their first read, and one backward for the three differentiable
    results together. With upstream gradients ``g`` of divergence, student's log-probability and
    student's entropy, the gradient with respect to the student's logit j is::

        [g_d (slope_j - q_j D) + g_lp (1[j = id] - q_j) - g_H q_j (log q_j + H)] / T

    where the q of the first term is the student restricted to the teacher's support, for divergences
    that are infinite outside it.

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in
            Triton); dtypes may differ; no gradient flows to the teacher's.
        token_ids: ``[...]``, int64, aligned with the logits, as in :func:`token_log_probs`. Where it
            is ``ignore_index`` the rows are not read: results and gradient are 0, and there is no
            agreement.
        divergence: a :class:`Divergence` or its name; infinite terms are dropped, as
            :func:`distill_ops.distillation_loss` does by default.
        temperature: T above, positive, of all results.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        :class:`DistillationStatistics`, each ``[...]``, nats, float32 (float64 for float64 logits).
        A row of NaN, of +inf, or all -inf makes what depends on it NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    divergence = check_statistics(
        student_logits, teacher_logits, token_ids, divergence, temperature, ignore_index
    )
    triton = use_triton(backend, student_logits, teacher_logits)
    if not torch.compiler.is_compiling():
        refuse_transforms(student_logits, function="distillation_statistics")
    options = Options.of(
        divergence, "none", "drop", triton, temperature, False, 0.0, None, student_logits.shape[-1],
        ignore_index,
    )  # fmt: skip
    keep = torch.is_grad_enabled() and student_logits.requires_grad
    outputs, agreement, *_ = distillation_statistics_op(
        student_logits, teacher_logits, token_ids, divergence.tensors, *options.pack(), keep
    )
    found, student_log_prob, teacher_log_prob, student_entropy, teacher_entropy = outputs.unbind(0)
    return DistillationStatistics(
        found, student_log_prob, teacher_log_prob.detach(), student_entropy,
        teacher_entropy.detach(), agreement,
    )  # fmt: skip


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
    once; the gradient with respect to the student's logit j is ``r (1[j = id] - q_j) / T`` with the
    student's share ``r = (1 - a) q_id / ((1 - a) q_id + a p_id)``.

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in
            Triton); dtypes may differ; no gradient flows to the teacher's.
        token_ids: ``[...]``, int64, aligned with the logits, as in :func:`token_log_probs`. Where it
            is ``ignore_index`` the rows are not read: result and gradient are 0.
        teacher_weight: a in [0, 1], a number or a tensor, 0-d or ``[...]``.
        temperature: T above, positive.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        ``[...]``, float32 (float64 for float64 logits), differentiable; -inf for an id that is
        impossible under the mixture, NaN for a row of NaN, of +inf, or all -inf.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    check_mixture(
        student_logits, teacher_logits, token_ids, teacher_weight, temperature, ignore_index
    )
    triton = use_triton(backend, student_logits, teacher_logits)
    log_q, log_p = (
        _log_probs(
            "mixture_token_log_probs", x, token_ids, temperature, ignore_index, triton, False
        )[0]
        for x in (student_logits, teacher_logits.detach())
    )
    dtype = torch.promote_types(log_q.dtype, log_p.dtype)
    mixture = log_mixture(teacher_weight, log_p.to(dtype), log_q.to(dtype))
    return mixture.masked_fill(token_ids == ignore_index, 0.0)
