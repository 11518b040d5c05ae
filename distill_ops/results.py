"""What functions give a token, in types, and what a loss multiplies it by."""

from typing import NamedTuple

import torch


class DistillationStatistics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    ``divergence``, ``student_log_prob`` and ``student_entropy`` are differentiable.

    Example:
        >>> import torch, distill_ops
        >>> logits, ids = torch.zeros(2, 4), torch.tensor([3, -100])
        >>> found = distill_ops.distillation_statistics(logits, logits, ids)
        >>> [round(x, 4) for x in found.student_log_prob.tolist()], found.top1_agreement.tolist()
        ([-1.3863, 0.0], [True, False])
    """

    divergence: torch.Tensor
    student_log_prob: torch.Tensor  # of the token's id
    teacher_log_prob: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals


class StatisticsCoefficients(NamedTuple):
    """What a loss multiplies the three differentiable statistics by: a number, a 0-d tensor, one a token
    ``[...]``, or None for none; constants.

    Example:
        >>> import torch, distill_ops
        >>> logits, ids = torch.zeros(2, 4), torch.tensor([3, 0])
        >>> advantages = torch.tensor([1.0, -0.5])
        >>> coefficients = distill_ops.StatisticsCoefficients(log_prob=-advantages, entropy=-0.01)
        >>> loss, _ = distill_ops.distillation_statistics(
        ...     logits, logits, ids, coefficients=coefficients
        ... )
        >>> round(loss.item(), 4)  # 0.5 log(4) - 0.02 log(4)
        0.6654
    """

    divergence: float | torch.Tensor | None = None
    log_prob: float | torch.Tensor | None = None
    entropy: float | torch.Tensor | None = None


class DistillationMetrics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    A divergence that is infinite (one model excludes a token that the other does not) is +inf.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.zeros(3, 4)
        >>> metrics = distill_ops.distillation_metrics(logits, logits)
        >>> metrics.expected_acceptance.tolist(), round(metrics.student_entropy[0].item(), 4)
        ([1.0, 1.0, 1.0], 1.3863)
    """

    forward_kl: torch.Tensor  # KL(teacher || student)
    reverse_kl: torch.Tensor  # KL(student || teacher)
    jensen_shannon: torch.Tensor  # beta 0.5
    total_variation: torch.Tensor
    expected_acceptance: torch.Tensor  # sum(min(p, q)): of speculative decoding (arXiv:2211.17192)
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals
