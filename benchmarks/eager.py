"""The baselines: the four losses as trainers write them today, mean over tokens.

``dtype=torch.float32`` computes in float32 whatever the logits' dtype, as MiniLLM and DistiLLM do
(arXiv:2306.08543, arXiv:2402.03898); ``dtype=None`` stays in the logits' own, as TRL does.
"""

import math

import torch
import torch.nn.functional as F


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


FORMULAS = {
    "soft_cross_entropy": soft_cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
