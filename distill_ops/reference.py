"""The oracle: the losses restated in plain PyTorch, full tensors and no cleverness.

Needs neither Triton nor a GPU, differentiates by autograd and runs in float64: the tests hold
every other path against it. It restates each formula instead of sharing the kernels' text.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .checks import check_arguments
from .divergences import Divergence, SoftCrossEntropy

NEG_INF = float("-inf")


class LossComponents(NamedTuple):
    """A loss and its two parts, detached and reduced like it, for logging (nats)."""

    loss: torch.Tensor
    divergence: torch.Tensor
    hard_label: torch.Tensor


def _times(probability: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    """``probability * log`` where a probability of 0 makes 0, in the gradient too."""
    dead = probability == 0
    return torch.where(dead, 0.0, probability * torch.where(dead, 0.0, log))


def _log_mixture(weight, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``log(weight p + (1 - weight) q)``, 0 where both are 0; weight a number or ``[..., 1]``."""
    weight = torch.as_tensor(weight, dtype=log_p.dtype, device=log_p.device)
    pair = torch.stack([log_p + weight.log(), log_q + torch.log1p(-weight)])
    return torch.logsumexp(torch.where((pair == NEG_INF).all(0), 0.0, pair), 0)


def _values(divergence: Divergence, log_q, log_p) -> torch.Tensor:
    """The terms whose sum over the vocabulary is the divergence (semantics.md, section 2).

    A divergence that a user declared is its own text: its value alone, of which autograd takes the
    derivative."""
    q, p = log_q.exp(), log_p.exp()
    parameters = divergence.column_parameters(log_q.dtype)
    if divergence.name == "soft_cross_entropy":
        return -_times(p, log_q)
    if divergence.name == "forward_kl":
        return _times(p, log_p - log_q)
    if divergence.name == "reverse_kl":
        return _times(q, log_q - log_p)
    if divergence.name == "jensen_shannon":
        (beta,) = parameters
        log_m = _log_mixture(beta, log_p, log_q)
        return beta * _times(p, log_p - log_m) + (1 - beta) * _times(q, log_q - log_m)
    if divergence.name == "symmetric_kl":
        forward, reverse = _times(p, log_p - log_q), _times(q, log_q - log_p)
        (weight,) = parameters
        return (1 - weight) * forward + weight * reverse
    if divergence.name == "skew_forward_kl":
        return _times(p, log_p - _log_mixture(*parameters, log_p, log_q))
    if divergence.name == "skew_reverse_kl":
        return _times(q, log_q - _log_mixture(*parameters, log_q, log_p))
    if divergence.name == "total_variation":
        return (q - p).abs() / 2
    if divergence.name == "alpha_beta":
        a, b = parameters
        teacher, student = ((a + b) * log_p).exp(), ((a + b) * log_q).exp()
        sums = a / (a + b) * teacher + b / (a + b) * student
        return (sums - (a * log_p + b * log_q).exp()) / (a * b)
    lowest = torch.finfo(log_q.dtype).min
    logs = log_q.clamp(min=lowest), log_p.clamp(min=lowest)
    return divergence.on_columns(*logs, parameters)[0]


def divergence_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    infinities: str = "drop",
) -> torch.Tensor:
    """The terms ``[..., V]`` of the divergence of logits ``[..., V]``, infinite logits included.

    A term with a finite limit takes it. The terms that are infinite are left out by "drop", and
    where the divergence is infinite at the teacher's zeros, "drop" restricts the student to the
    teacher's support."""
    student_zero, teacher_zero = student == NEG_INF, teacher == NEG_INF
    dropped = student_zero & teacher_zero
    if infinities == "drop":
        if divergence.infinite_at_teacher_zero:  # restrict the student to the teacher's support
            student = student.masked_fill(teacher_zero, NEG_INF)
            dropped = dropped | teacher_zero
        if divergence.infinite_at_student_zero:
            dropped = dropped | student_zero
    # a row without a finite maximum has no softmax: NaN, however many of its terms are dropped
    maxima = student.amax(-1, keepdim=True) + teacher.amax(-1, keepdim=True)
    poison = torch.where(maxima.isfinite(), 0.0, math.nan).detach()
    student = student + poison
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_q, log_p = log_q.masked_fill(dropped, 0.0), log_p.masked_fill(dropped, 0.0)
    return _values(divergence, log_q, log_p).masked_fill(dropped, 0.0) + poison


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    *,
    divergence: Divergence | str = SoftCrossEntropy(),
    loss_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    infinities: str = "drop",
    vocab_size: int | None = None,
    return_components: bool = False,
) -> torch.Tensor | LossComponents:
    """:func:`distill_ops.distillation_loss` in eager PyTorch, differentiable by autograd.

    Same arguments, result and errors; half-precision logits are computed in float32, float64 in
    float64.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]], dtype=torch.float64)
        >>> round(reference.distillation_loss(student, teacher).item(), 6)
        1.91892
    """
    divergence, n_cols = check_arguments(
        student_logits, teacher_logits, divergence, loss_mask, labels, ignore_index,
        hard_label_weight, temperature, reduction, normalizer, infinities, vocab_size,
    )  # fmt: skip
    dtype = student_logits.dtype
    if teacher_logits is not None:
        dtype = torch.promote_types(dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)

    weights = torch.ones(student_logits.shape[:-1], dtype=dtype, device=student_logits.device)
    if loss_mask is not None:
        weights = loss_mask.to(dtype)
    if labels is not None:
        weights = weights.masked_fill(labels == ignore_index, 0.0)
    unread = (weights == 0)[..., None]
    student = student_logits[..., :n_cols].to(dtype).masked_fill(unread, 0.0)

    divergence_loss = hard_loss = torch.zeros_like(weights)
    if hard_label_weight < 1:
        teacher = teacher_logits[..., :n_cols].to(dtype).masked_fill(unread, 0.0)
        divergence = (
            divergence.map_tensors(  # whatever unread tokens' parameters hold must not leak
                lambda x: x.masked_fill(unread.squeeze(-1), 0.5) if x.dim() else x
            )
        )
        terms = divergence_terms(student, teacher, divergence, temperature, infinities)
        divergence_loss = terms.sum(-1)
        if scale_by_temperature_squared:
            divergence_loss = divergence_loss * temperature**2
    if hard_label_weight > 0:
        ids = labels.masked_fill(unread.squeeze(-1), 0)[..., None]
        hard_loss = -F.log_softmax(student, dim=-1).gather(-1, ids).squeeze(-1)
    if hard_label_weight == 0:
        loss = divergence_loss
    elif hard_label_weight == 1:
        loss = hard_loss
    else:
        loss = (1 - hard_label_weight) * divergence_loss + hard_label_weight * hard_loss

    def reduced(per_token):
        per_token = torch.where(weights == 0, per_token * 0, per_token * weights)
        if reduction == "none":
            return per_token
        total = per_token.sum()
        if reduction == "sum":
            return total
        if bool(unread.all()):  # no kept token: loss 0 with a graph
            return total
        if normalizer is None:
            return total / weights.sum()
        return total / torch.as_tensor(normalizer, dtype=dtype, device=total.device)

    if not return_components:
        return reduced(loss)
    return LossComponents(
        reduced(loss), reduced(divergence_loss).detach(), reduced(hard_loss).detach()
    )
