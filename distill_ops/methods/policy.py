"""PPO's clipped loss of sampled tokens, with importance weights."""

from typing import NamedTuple

import torch

from ..checks.sequences import ValidTokens, check_clip, check_reduction, working_dtype


class PolicyTerms(NamedTuple):
    """What the policy's loss is made of, checked: ``[batch, sequence]``, 0 or 1 where a token is not valid."""

    valid: ValidTokens
    advantages: torch.Tensor
    old_log_probs: torch.Tensor | None  # None: the policy is the old one
    weights: torch.Tensor | None
    clip: float | None
    shares: torch.Tensor  # of the reduction

    @classmethod
    def of(
        cls,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        weights: torch.Tensor | None,
        clip: float | None,
        reduction: str,
        like: torch.Tensor | None = None,
    ) -> "PolicyTerms":
        """Checked; ``like``: logits whose float64 is the shares' too."""
        valid, clip = ValidTokens.of(mask), check_clip(clip)
        check_reduction(reduction)
        given = {"advantages": (advantages, 0.0)}
        if old_log_probs is not None:
            given["old_log_probs"] = old_log_probs, 0.0
        if weights is not None:
            given["weights"] = weights, 1.0
        found = {
            name: valid.numbers(name, x, fill=fill, finite=True, no_gradient=True)
            for name, (x, fill) in given.items()
        }
        others = [like] if isinstance(like, torch.Tensor) else []
        dtype = working_dtype(*found.values(), *others)
        old, weights = found.get("old_log_probs"), found.get("weights")
        return cls(valid, found["advantages"], old, weights, clip, valid.shares(reduction, dtype))

    def ratio(self, log_ratio: torch.Tensor) -> torch.Tensor:
        return log_ratio.exp() if self.weights is None else log_ratio.exp() * self.weights

    def clipped(self, ratio: torch.Tensor) -> torch.Tensor:
        """Where the loss is that of the clipped ratio, and has no gradient."""
        if self.clip is None:
            return torch.zeros_like(self.valid.mask)
        above = (self.advantages > 0) & (ratio > 1 + self.clip)
        return above | ((self.advantages < 0) & (ratio < 1 - self.clip))

    def losses(self, ratio: torch.Tensor, clipped: torch.Tensor) -> torch.Tensor:
        if self.clip is not None:
            edge = torch.where(self.advantages > 0, 1 + self.clip, 1 - self.clip).to(ratio.dtype)
            ratio = torch.where(clipped, edge, ratio)
        return -self.advantages * ratio

    def of_log_probs(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's loss of each token, differentiable, and where it is clipped."""
        log_ratio = log_probs - self.old_log_probs
        with torch.no_grad():
            clipped = self.clipped(self.ratio(log_ratio))
            # an exponential that overflows there would make its gradient, 0, NaN
            without = clipped | (self.advantages == 0) | ~self.valid.mask
        return self.losses(self.ratio(log_ratio.masked_fill(without, 0.0)), clipped), clipped

    def share_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens & self.valid.mask).sum() / self.valid.mask.sum().clamp(min=1)


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    clip: float | None = 0.2,
    reduction: str = "mean",
) -> torch.Tensor:
    """PPO's clipped loss of sampled tokens, the ratio being multiplied by importance weights.

    ``mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip))``, ``rho = exp(log q - log q_old) w``.
    Numbers ``[batch, sequence]`` go in, a 0-d loss comes out, differentiable in ``log_probs``.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> log_probs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
        >>> old, advantages = torch.tensor([[-1.0, -2.0]]), torch.tensor([[2.0, 1.0]])
        >>> loss = minillm.policy_loss(log_probs, old, advantages, torch.ones(1, 2))
        >>> loss.backward()
        >>> round(loss.item(), 4), log_probs.grad.tolist()  # the second ratio, e, is clipped to 1.2
        (-1.6, [[-1.0, 0.0]])

    The clip (arXiv:1707.06347, equation 7) is of the product, as in MiniLLM's code: at the first update
    after a rollout, where log q = log q_old, a weight outside ``[1 - clip, 1 + clip]`` leaves a token
    without a gradient where its advantage points further out.

    Args:
        log_probs: ``[batch, sequence]``, the student's now, of the sampled tokens.
        old_log_probs: ``[batch, sequence]``, the student's at the rollout; constants, finite.
        advantages: ``[batch, sequence]``, as :func:`advantages` makes them; constants, finite.
        mask: ``[batch, sequence]``, the valid tokens.
        weights: ``[batch, sequence]``, importance weights; constants, finite; None for 1.
        clip: half the width of the interval, positive; 0.2 in MiniLLM's code; None for no clipping.
        reduction: "mean" over the valid tokens of the batch (0 if there is none), or "sum".

    Returns:
        0-d, float32 (float64 where an argument is).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    ValidTokens.of(mask).check_shape("old_log_probs", old_log_probs)  # not None here
    terms = PolicyTerms.of(mask, advantages, old_log_probs, weights, clip, reduction)
    losses, _ = terms.of_log_probs(terms.valid.numbers("log_probs", log_probs))
    return (terms.shares * losses).sum()
