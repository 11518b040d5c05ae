"""A token's log-probability, and what on-policy methods need beside it (semantics.md, 12)."""

import torch
import torch.nn.functional as F

from ..checks import check_mixture, check_statistics, check_token_log_probs
from ..divergences import Divergence, ReverseKL
from ..problem import DistillationStatistics, working_dtype
from .dense import divergence_terms, log_mixture, no_maximum, times


def _read(logits: torch.Tensor, ignored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits to compute with; the rows of ignored tokens are not read."""
    return logits.to(dtype).masked_fill(ignored[..., None], 0.0)


def _of_tokens(log_q: torch.Tensor, token_ids: torch.Tensor, ignored: torch.Tensor):
    ids = token_ids.masked_fill(ignored, 0)[..., None]
    return log_q.gather(-1, ids).squeeze(-1).masked_fill(ignored, 0.0)


def _entropy(log_q: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    return -times(log_q.exp(), log_q).sum(-1).masked_fill(ignored, 0.0)


def token_log_probs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``log_softmax(logits / temperature)`` at the tokens' ids, in nats, differentiable by autograd.

    With ``q = softmax(logits / T)`` and the entropy ``H = -sum(q log q)``, the gradients with
    respect to logit j are ``(1[j = id] - q_j) / T`` and ``-q_j (log q_j + H) / T``. A logit of
    -inf has no part in the entropy; an id whose logit is -inf gives -inf, with that same finite
    gradient. A row of NaN, of +inf, or all -inf gives NaN.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        token_ids: ``[...]``, int64, aligned with the logits. Where it is ``ignore_index`` the row
            is not read: results and gradient are 0.
        temperature: T above, positive.
        return_entropy: return the pair (log-probabilities, entropies).

    Returns:
        ``[...]``, float32 (float64 for float64 logits), or a pair of them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> logits = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> log_prob = reference.token_log_probs(logits, torch.tensor([1]), temperature=2.0)
        >>> round(log_prob.item(), 9)
        -0.982043571
    """
    check_token_log_probs(logits, token_ids, temperature, ignore_index)
    ignored = token_ids == ignore_index
    log_q = F.log_softmax(_read(logits, ignored, working_dtype(logits)) / temperature, dim=-1)
    log_probs = _of_tokens(log_q, token_ids, ignored)
    return (log_probs, _entropy(log_q, ignored)) if return_entropy else log_probs


def distillation_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    divergence: Divergence | str = ReverseKL(),
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> DistillationStatistics:
    """Divergence, log-probabilities, entropies and agreement of both models, token by token.

    The divergence is that of :func:`distill_ops.reference.distillation_loss` with
    ``infinities="drop"`` (a student restricted to the teacher's support where it must be), the
    rest is of the full rows at the same temperature. With upstream gradients ``g`` of divergence,
    log-probability and entropy, the gradient with respect to the student's logit j is::

        [g_d (slope_j - q_j D) + g_lp (1[j = id] - q_j) - g_H q_j (log q_j + H)] / T

    where the q of the first term is the restricted one.

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16 or float64; dtypes
            may differ; no gradient flows to the teacher's.
        token_ids: ``[...]``, int64. Where it is ``ignore_index`` the rows are not read: results and
            gradient are 0, and there is no agreement.
        divergence: a :class:`distill_ops.Divergence` or its name.
        temperature: T above, positive.

    Returns:
        :class:`DistillationStatistics`. A row of NaN, of +inf, or all -inf makes what depends on it
        NaN: the other model's log-probability and entropy do not. There is no agreement then.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    divergence = check_statistics(
        student_logits, teacher_logits, token_ids, divergence, temperature, ignore_index
    )
    dtype, ignored = working_dtype(student_logits, teacher_logits), token_ids == ignore_index
    student, teacher = (_read(x, ignored, dtype) for x in (student_logits, teacher_logits))
    terms = divergence_terms(student, teacher, divergence, temperature)
    log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    no_answer = (no_maximum(student) | no_maximum(teacher)).squeeze(-1) | ignored
    return DistillationStatistics(
        terms.sum(-1).masked_fill(ignored, 0.0),
        _of_tokens(log_q, token_ids, ignored),
        _of_tokens(log_p, token_ids, ignored),
        _entropy(log_q, ignored),
        _entropy(log_p, ignored),
        (student.argmax(-1) == teacher.argmax(-1)) & ~no_answer,
    )


def mixture_token_log_probs(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_weight: float | torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """``log((1 - a) q + a p)`` at the tokens' ids, in nats: MiniLLM's teacher-mixed sampling.

    q and p are the softmax of student and teacher logits at the temperature T, a is
    ``teacher_weight`` (arXiv:2306.08543, section 2.2). The gradient with respect to the student's
    logit j is ``r (1[j = id] - q_j) / T`` with the student's share
    ``r = (1 - a) q_id / ((1 - a) q_id + a p_id)``. An id that is impossible under the mixture
    (``(1 - a) q_id = a p_id = 0``) gives -inf and a share of 0.

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16 or float64; dtypes
            may differ; no gradient flows to the teacher's.
        token_ids: ``[...]``, int64. Where it is ``ignore_index`` the rows are not read: result and
            gradient are 0.
        teacher_weight: a in [0, 1], a number or a tensor, 0-d or ``[...]``.
        temperature: T above, positive.

    Returns:
        ``[...]``, float32 (float64 for float64 logits). A row of NaN, of +inf, or all -inf gives NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_mixture(
        student_logits, teacher_logits, token_ids, teacher_weight, temperature, ignore_index
    )
    dtype, ignored = working_dtype(student_logits, teacher_logits), token_ids == ignore_index
    log_q, log_p = (
        _of_tokens(F.log_softmax(_read(x, ignored, dtype) / temperature, -1), token_ids, ignored)
        for x in (student_logits, teacher_logits)
    )
    return log_mixture(teacher_weight, log_p, log_q).masked_fill(ignored, 0.0)
