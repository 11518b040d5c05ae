"""MiniLLM's formulas in eager PyTorch, a sum or a loop each (arXiv:2306.08543; docs/minillm.md).

Of ``[batch, sequence]`` and logits ``[batch, sequence, V]``; what stands at tokens that are not valid is
replaced first. Arguments and errors are those of :mod:`distill_ops.methods.minillm`."""

import torch
import torch.nn.functional as F

from ..checks.sequences import ValidTokens
from ..results import LossComponents, PolicyLoss
from .dense import distillation_loss, log_mixture
from .tokens import distillation_statistics


def token_rewards(
    teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor, mask: torch.Tensor, *,
    scaling: float = 0.5, clip: float | None = 100.0,
) -> torch.Tensor:  # fmt: skip
    """``r_t = clip((log p(y_t) - log q(y_t)) / scaling)``.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> minillm.token_rewards(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.ones(1, 1))
        tensor([[4.]])
    """
    valid = ValidTokens.of(mask)
    log_p = valid.numbers("teacher_log_probs", teacher_log_probs).detach()
    log_q = valid.numbers("student_log_probs", student_log_probs).detach()
    both = (log_p == -torch.inf) & (log_q == -torch.inf)
    rewards = torch.where(both, 0.0, log_p - log_q) / scaling
    limit = torch.inf if clip is None else clip
    return rewards.clamp(min=-limit, max=limit)


def rewards_to_go(
    rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 0.95, include: str = "next",
    length_normalization: bool = True,
) -> torch.Tensor:  # fmt: skip
    """``R_t = r_t + gamma R_{t+1}`` over the valid tokens, backwards one by one; R_{t+1} with "next".

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> minillm.rewards_to_go(torch.ones(1, 3), torch.ones(1, 3), gamma=0.5)
        tensor([[0.7500, 1.0000, 0.0000]])
    """
    valid = ValidTokens.of(mask)
    rewards = valid.numbers("rewards", rewards).detach()
    found = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        after, n = 0.0, 0  # of the valid tokens after this one
        for t in reversed(range(rewards.shape[1])):
            if not valid.mask[row, t]:
                continue
            now = rewards[row, t] + (gamma * after if gamma else 0.0)
            total, terms = (now, n + 1) if include == "current" else (after, n)
            found[row, t] = total / max(terms, 1) if length_normalization else total
            after, n = now, n + 1
    return found


def whiten(
    values: torch.Tensor, mask: torch.Tensor, *, count_padding: bool = False
) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + 1e-8)`` of the valid tokens, or of all with 0 for the others.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> minillm.whiten(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2))
        tensor([[-1.,  1.]])
    """
    valid = ValidTokens.of(mask)
    x = valid.numbers("values", values).detach()
    counted = x.flatten() if count_padding else x[valid.mask]
    if counted.numel() == 0:
        return torch.zeros_like(x)
    found = (x - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
    return found.masked_fill(~valid.mask, 0.0)


def advantages(
    teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor, mask: torch.Tensor, *,
    whitening: bool = True, **options,
) -> torch.Tensor:  # fmt: skip
    """``whiten(rewards_to_go(token_rewards(...)))``, each with its options.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> zeros = torch.zeros(1, 2)
        >>> minillm.advantages(zeros, zeros, torch.ones(1, 2))
        tensor([[0., 0.]])
    """
    padding = options.pop("count_padding", False)
    of_rewards = {name: options.pop(name) for name in ("scaling", "clip") if name in options}
    rewards = token_rewards(teacher_log_probs, student_log_probs, mask, **of_rewards)
    found = rewards_to_go(rewards, mask, **options)
    return whiten(found, mask, count_padding=padding) if whitening else found


def importance_weights(
    student_log_probs: torch.Tensor, behaviour_log_probs: torch.Tensor, mask: torch.Tensor, *,
    product: str = "token",
) -> torch.Tensor:  # fmt: skip
    """``w_t = q(y_t) / b(y_t)``, or its product over the valid s < t, s <= t, or all s.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> q, b = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.25, 0.5]])
        >>> minillm.importance_weights(q.log(), b.log(), torch.ones(1, 2), product="through")
        tensor([[2., 1.]])
    """
    valid = ValidTokens.of(mask)
    log_q = valid.numbers("student_log_probs", student_log_probs).detach()
    log_b = valid.numbers("behaviour_log_probs", behaviour_log_probs).detach()
    w = log_q.exp() / log_b.exp()
    if product == "sequence":
        w = w.prod(-1, keepdim=True).expand_as(w)
    elif product != "token":
        ones = torch.ones_like(w[:, :1])
        w = torch.cat([ones, w.cumprod(-1)], 1)
        w = w[:, 1:] if product == "through" else w[:, :-1]
    return w.masked_fill(~valid.mask, 1.0)


def policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    *, weights: torch.Tensor | None = None, clip: float | None = 0.2, reduction: str = "mean",
) -> torch.Tensor:  # fmt: skip
    """``mean max(-A rho, -A clip(rho))``, ``rho = exp(log q - log q_old) w``.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
        >>> minillm.policy_loss(zeros, zeros, ones, ones)
        tensor(-1.)
    """
    return _policy(log_probs, old_log_probs, advantages, mask, weights, clip, reduction)[0]


def _policy(log_probs, old_log_probs, advantages, mask, weights, clip, reduction):
    """The loss, and the share of the valid tokens whose ratio is clipped."""
    valid = ValidTokens.of(mask)
    log_q = valid.numbers("log_probs", log_probs)
    rho = (log_q - valid.numbers("old_log_probs", old_log_probs)).exp()
    if weights is not None:
        rho = rho * valid.numbers("weights", weights, fill=1.0)
    a = valid.numbers("advantages", advantages)
    limited = rho if clip is None else rho.clamp(1 - clip, 1 + clip)
    terms = torch.maximum(-a * rho, -a * limited)
    clipped = (-a * limited > -a * rho).to(terms.dtype)
    return _reduced(terms, valid.mask, reduction), _reduced(clipped, valid.mask, "mean")


def _reduced(terms, valid, reduction):
    total = terms.masked_fill(~valid, 0.0).sum()
    return total / max(int(valid.sum()), 1) if reduction == "mean" else total


def loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, token_ids: torch.Tensor,
    mask: torch.Tensor, *, advantages: torch.Tensor, old_log_probs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None, single_step: bool = True,
    single_step_weights: torch.Tensor | None = None, clip: float | None = 0.2,
    entropy_coef: float = 0.0, reduction: str = "mean", temperature: float = 1.0,
) -> PolicyLoss:  # fmt: skip
    """``policy_loss + mean v_t KL(q_t || p_t) - entropy_coef mean H(q_t)``.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> logits, ones = torch.zeros(1, 2, 3), torch.ones(1, 2)
        >>> minillm.loss(logits, logits, torch.tensor([[0, 1]]), ones, advantages=ones).loss
        tensor(-1.)
    """
    valid = ValidTokens.of(mask)
    found = distillation_statistics(
        student_logits, teacher_logits, valid.ids(token_ids), temperature=temperature
    )
    old = found.student_log_prob.detach() if old_log_probs is None else old_log_probs
    policy, clipped = _policy(
        found.student_log_prob, old, advantages, mask, weights, clip, reduction
    )
    v = 1.0
    if single_step_weights is not None:
        v = valid.numbers("single_step_weights", single_step_weights)
    step = _reduced(v * found.divergence, valid.mask, reduction)
    entropy = _reduced(found.student_entropy, valid.mask, reduction)
    total = policy + (step if single_step else 0.0) - entropy_coef * entropy
    detached = type(found)(*(x.detach() for x in found))
    return PolicyLoss(total, policy.detach(), step.detach(), entropy.detach(), clipped, detached)


def pretraining_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, *,
    lm_coef: float = 1.0, kd_ratio: float = 0.5, ignore_index: int = -100,
) -> LossComponents:  # fmt: skip
    """``lm_coef ((1 - kd_ratio) cross_entropy + kd_ratio distil)``.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> logits = torch.zeros(1, 1, 2)
        >>> minillm.pretraining_loss(logits, logits, torch.tensor([[1]]), lm_coef=2.0).loss
        tensor(1.3863)
    """
    flat = student_logits.flatten(0, -2), labels.flatten().long()
    hard = F.cross_entropy(*flat, ignore_index=ignore_index, reduction="sum")
    hard = hard / max(int((labels != ignore_index).sum()), 1)
    kept = labels != ignore_index
    soft = distillation_loss(student_logits, teacher_logits, loss_mask=kept)
    total = lm_coef * ((1 - kd_ratio) * hard + kd_ratio * soft)
    return LossComponents(total, soft.detach(), hard.detach())


def mix(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, teacher_share: float = 0.2, *,
    temperature: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """``log((1 - a) q + a p)``.

    Example:
        >>> import torch
        >>> from distill_ops.reference import minillm
        >>> minillm.mix(torch.zeros(2), torch.zeros(2)).exp()
        tensor([0.5000, 0.5000])
    """
    log_q, log_p = (
        F.log_softmax(x.detach() / temperature, -1) for x in (student_logits, teacher_logits)
    )
    return log_mixture(teacher_share, log_p, log_q)
