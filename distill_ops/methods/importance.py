"""Importance weights of sampled tokens, and the loss of the sampled token alone, for ``on_policy``."""

import math

import torch

from ..api.estimators import reverse_kl_estimate
from ..checks.on_policy import OnPolicyTokens
from ..checks.on_policy_options import OnPolicyArguments


def times(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The product, 0 where a weight is, be the value infinite."""
    return weights * values.masked_fill(weights == 0, 0.0)


def importance_weights(
    log_q: torch.Tensor, tokens: OnPolicyTokens, options: OnPolicyArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """``w_t``, constants, of "clip" the ratios themselves; and which ratios are out of the bounds."""
    log_q = log_q.detach()
    if options.importance == "none":
        return tokens.kept.to(log_q.dtype), torch.zeros_like(tokens.kept)
    log_ratio = log_q - tokens.behaviour_log_probs
    if options.importance_level == "prefix":
        log_ratio = log_ratio.cumsum(-1)
        if options.objective != "sampled":  # D does not depend on the token itself
            before = torch.zeros_like(log_ratio[..., :1]), log_ratio[..., :-1]
            log_ratio = torch.cat(before, -1)
    # an infinite ratio would make NaN of a term that is 0
    largest = math.log(torch.finfo(log_ratio.dtype).max) / 2
    ratio = log_ratio.clamp(max=largest).exp().masked_fill(~tokens.kept, 0.0)
    lower, upper = options.bounds
    out = ((ratio < lower) | (ratio > upper)) & tokens.kept
    if options.importance == "mask":
        ratio = ratio.masked_fill(out, 0.0)
    elif options.importance == "truncate":
        ratio = ratio.clamp(lower, upper).masked_fill(~tokens.kept, 0.0)
    return ratio, out


def sampled_losses(
    log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
    tokens: OnPolicyTokens, options: OnPolicyArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``w_t r_t``, whose gradient is that of ``sg(w_t r_t) log q(y_t)``; the weights of the gradient, and
    which are out of bounds."""
    cost = reverse_kl_estimate(log_q.detach(), log_p, kind="k1")
    if options.reward_clip is not None:
        cost = cost.clamp(-options.reward_clip, options.reward_clip)
    losses = times(weights, cost)
    if options.importance == "clip":
        losses, out = _clipped(losses, cost, weights, out, options)
        weights = weights.masked_fill(out, 0.0)
    # 0 times an infinite term would be a gradient of NaN
    losses = losses.masked_fill(tokens.weights == 0, 0.0)
    moving = log_q.masked_fill((weights == 0) | (log_q == -torch.inf), 0.0)
    growth = (moving - moving.detach()).exp()  # 1, with the slope of log q
    return losses * growth, weights, out


def _clipped(
    losses: torch.Tensor, cost: torch.Tensor, ratio: torch.Tensor, out: torch.Tensor,
    options: OnPolicyArguments,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """PPO's ``-min(A rho, A clip(rho))``, of the advantage A = -cost, and where it is constant."""
    lower, upper = options.bounds
    losses = torch.maximum(losses, times(ratio.clamp(lower, upper), cost))
    out = out & torch.where(cost > 0, ratio < lower, (ratio > upper) & (cost < 0))
    if options.dual_clip is not None:
        capped = (cost > 0) & (ratio > options.dual_clip)
        losses, out = torch.where(capped, options.dual_clip * cost, losses), out | capped
    return losses, out
