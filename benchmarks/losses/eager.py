"""The baselines: the losses as trainers write them today, mean over tokens.

``dtype=torch.float32`` computes in float32 whatever the logits' dtype, as MiniLLM, DistiLLM and ABKD
do (arXiv:2306.08543, 2402.03898, 2505.04560); ``dtype=None`` stays in the logits' own, as TRL does.

Parameters default to those of ``distill_ops``' dataclasses.
"""

import math

import torch
import torch.nn.functional as F

from .cases import LOSSES


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    inf_mask = torch.isinf(student)
    probs = F.softmax(teacher, dim=-1, dtype=dtype)
    logprobs = F.log_softmax(student, dim=-1, dtype=dtype)
    products = torch.masked_fill(probs * logprobs, inf_mask, 0)
    return -products.sum(-1).mean()


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    inf_mask = torch.isinf(student)
    probs = F.softmax(teacher, dim=-1, dtype=dtype)
    teacher_logprobs = F.log_softmax(teacher, dim=-1, dtype=dtype)
    student_logprobs = F.log_softmax(student, dim=-1, dtype=dtype)
    products = torch.masked_fill(probs * teacher_logprobs, inf_mask, 0)
    products -= torch.masked_fill(probs * student_logprobs, inf_mask, 0)
    return products.sum(-1).mean()


def reverse_kl(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    inf_mask = torch.isinf(student) | torch.isinf(teacher)
    probs = F.softmax(student, dim=-1, dtype=dtype)
    student_logprobs = F.log_softmax(student, dim=-1, dtype=dtype)
    teacher_logprobs = F.log_softmax(teacher, dim=-1, dtype=dtype)
    products = torch.masked_fill(probs * student_logprobs, inf_mask, 0)
    products -= torch.masked_fill(probs * teacher_logprobs, inf_mask, 0)
    return products.sum(-1).mean()


def jensen_shannon(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None, beta: float = 0.5
) -> torch.Tensor:
    """GKD's generalised form (arXiv:2306.13649, equation 1), ``beta`` the teacher's weight."""
    log_q = F.log_softmax(student, dim=-1, dtype=dtype)
    log_p = F.log_softmax(teacher, dim=-1, dtype=dtype)
    weighted = torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)])
    log_m = torch.logsumexp(weighted, dim=0)
    from_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    from_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (beta * from_teacher + (1 - beta) * from_student).sum(-1).mean()


def symmetric_kl(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None, weight: float = 0.5
) -> torch.Tensor:
    """Both KLs, each on its own, as DistiLLM adds them."""
    forward, reverse = forward_kl(student, teacher, dtype), reverse_kl(student, teacher, dtype)
    return (1 - weight) * forward + weight * reverse


def _kl_to_mixture(
    probs: torch.Tensor,
    logprobs: torch.Tensor,
    other_probs: torch.Tensor,
    alpha: float,
    inf_mask: torch.Tensor,
) -> torch.Tensor:
    mixed_logprobs = torch.log(alpha * probs + (1 - alpha) * other_probs)
    products = torch.masked_fill(probs * logprobs, inf_mask, 0)
    products -= torch.masked_fill(probs * mixed_logprobs, inf_mask, 0)
    return products.sum(-1).mean()


def skew_forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None, alpha: float = 0.1
) -> torch.Tensor:
    """DistiLLM's: the mixture is made of probabilities."""
    inf_mask = torch.isinf(student) | torch.isinf(teacher)
    student_probs = F.softmax(student, dim=-1, dtype=dtype)
    teacher_probs = F.softmax(teacher, dim=-1, dtype=dtype)
    teacher_logprobs = F.log_softmax(teacher, dim=-1, dtype=dtype)
    return _kl_to_mixture(teacher_probs, teacher_logprobs, student_probs, alpha, inf_mask)


def skew_reverse_kl(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None, alpha: float = 0.1
) -> torch.Tensor:
    inf_mask = torch.isinf(student) | torch.isinf(teacher)
    student_probs = F.softmax(student, dim=-1, dtype=dtype)
    teacher_probs = F.softmax(teacher, dim=-1, dtype=dtype)
    student_logprobs = F.log_softmax(student, dim=-1, dtype=dtype)
    return _kl_to_mixture(student_probs, student_logprobs, teacher_probs, alpha, inf_mask)


def total_variation(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    inf_mask = torch.isinf(student) | torch.isinf(teacher)
    student_probs = F.softmax(student, dim=-1, dtype=dtype)
    teacher_probs = F.softmax(teacher, dim=-1, dtype=dtype)
    distances = torch.masked_fill((student_probs - teacher_probs).abs(), inf_mask, 0)
    return 0.5 * distances.sum(-1).mean()


def alpha_beta(
    student: torch.Tensor,
    teacher: torch.Tensor,
    dtype: torch.dtype | None,
    alpha: float = 0.2,
    beta: float = 0.7,
) -> torch.Tensor:
    """ABKD's, by powers of the probabilities."""
    inf_mask = torch.isinf(student) | torch.isinf(teacher)
    student_probs = F.softmax(student, dim=-1, dtype=dtype)
    teacher_probs = F.softmax(teacher, dim=-1, dtype=dtype)
    total = alpha + beta
    terms = teacher_probs.pow(alpha) * student_probs.pow(beta)
    terms = terms - alpha / total * teacher_probs.pow(total)
    terms = terms - beta / total * student_probs.pow(total)
    return -torch.masked_fill(terms, inf_mask, 0).sum(-1).mean() / (alpha * beta)


FORMULAS = {name: globals()[name] for name in LOSSES}  # a loss without its formula is a KeyError
