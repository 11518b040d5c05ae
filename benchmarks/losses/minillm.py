"""MiniLLM's loss of given logits: the package's, and the terms as MiniLLM's code computes them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import distill_ops
from distill_ops.methods import minillm
from distill_ops.reference import minillm as reference

STATISTICS = "statistics"  # the provider that calls them alone
BATCH = 2
TEMPERATURE = 1.0  # the original divides by it all the same
NEG_INF = float("-inf")


class Rollout(NamedTuple):
    """What a step has of the sampled tokens, ``[batch, sequence]``."""

    token_ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: torch.Tensor
    weights: torch.Tensor
    excluded: (
        torch.Tensor
    )  # [batch, sequence, V]: tokens that generation excluded, which the original keeps

    def double(self) -> "Rollout":
        return Rollout(*(x.double() if x.is_floating_point() else x for x in self))


def rollout_of(student: torch.Tensor, labels: torch.Tensor) -> Rollout:
    """Of logits ``[N, V]`` that moved a little since the rollout, the last eighth of it padding."""
    generator = torch.Generator(labels.device).manual_seed(1)
    shape = BATCH, labels.numel() // BATCH
    noise = torch.randn(3, *shape, generator=generator, device=labels.device)
    log_probs = distill_ops.token_log_probs(student.detach(), labels).view(shape)
    mask = torch.ones(shape, dtype=torch.bool, device=labels.device)
    mask[:, shape[1] - shape[1] // 8 :] = False
    dtype = log_probs.dtype
    return Rollout(
        labels.view(shape),
        mask,
        noise[0].to(dtype),
        log_probs + 0.1 * noise[1].to(dtype),
        (0.1 * noise[2].to(dtype)).exp().clamp(max=1.25),
        torch.isinf(student.detach()).view(*shape, -1),
    )


def _batched(x: torch.Tensor) -> torch.Tensor:
    return x.view(BATCH, -1, x.shape[-1])


def _terms(t, with_old: bool) -> tuple[tuple[torch.Tensor, ...], dict]:
    found = t.rollout
    options = {"advantages": found.advantages, "weights": found.weights}
    if with_old:
        options["old_log_probs"] = found.old_log_probs
    return (_batched(t.student), _batched(t.teacher), found.token_ids, found.mask), options


def ours(t) -> torch.Tensor:
    arguments, options = _terms(t, with_old=True)
    return minillm.loss(*arguments, **options).loss


def truth(t) -> torch.Tensor:
    arguments, options = _terms(t, with_old=True)
    return reference.loss(*arguments, **options).loss


def first_update(t) -> torch.Tensor:
    """Where the ratio to the old policy is 1; its loss is another."""
    arguments, options = _terms(t, with_old=False)
    return minillm.loss(*arguments, **options).loss


def first_truth(t) -> torch.Tensor:
    arguments, options = _terms(t, with_old=False)
    return reference.loss(*arguments, **options).loss


def statistics(t) -> torch.Tensor:
    """One call of the statistics and the mean of what it gives, which no method can do without."""
    (student, teacher, ids, mask), _ = _terms(t, with_old=False)
    found = distill_ops.distillation_statistics(student, teacher, ids.masked_fill(~mask, -100))
    return (found.divergence + found.student_log_prob + found.student_entropy).mean()


def statistics_truth(t) -> torch.Tensor:
    (student, teacher, ids, mask), _ = _terms(t, with_old=False)
    found = distill_ops.reference.distillation_statistics(
        student, teacher, ids.masked_fill(~mask, -100)
    )
    return (found.divergence + found.student_log_prob + found.student_entropy).mean()


def original(t) -> torch.Tensor:
    """As its code has it: both models' logits at the temperature and without what generation excluded, then
    each term from distributions of its own, which autograd keeps."""
    (logits, teacher, ids, mask), options = _terms(t, with_old=True)
    generated = t.rollout.excluded
    logits = (logits / TEMPERATURE).masked_fill(generated, NEG_INF)
    log_q = F.log_softmax(logits, dim=-1).masked_fill(generated, NEG_INF)
    log_q = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)
    ratio = ((log_q - options["old_log_probs"]) * mask).exp() * options["weights"]
    losses = [-options["advantages"] * x for x in (ratio, ratio.clamp(0.8, 1.2))]
    policy = (torch.maximum(*losses) * mask).sum() / mask.sum()

    teacher = (teacher / TEMPERATURE).masked_fill(generated, NEG_INF)
    wide = {"dim": -1, "dtype": torch.promote_types(logits.dtype, torch.float32)}
    excluded = torch.isinf(logits) | torch.isinf(teacher) | generated
    q, log_p = F.softmax(logits, **wide), F.log_softmax(teacher, **wide)
    cross_entropy = -(q * log_p.masked_fill(excluded, 0.0)).sum(-1) * mask
    excluded = torch.isinf(logits) | generated
    q, log_q = F.softmax(logits, **wide), F.log_softmax(logits, **wide)
    entropy = -(q * log_q.masked_fill(excluded, 0.0)).sum(-1) * mask
    return policy + ((cross_entropy - entropy) * mask).sum() / mask.sum()


def build(function):
    """A provider's ``build``."""
    return lambda case, device: function
