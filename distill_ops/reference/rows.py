"""What is said of a row of logits or logarithms throughout the reference."""

import torch

NEG_INF = float("-inf")


def times(probability: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    """``probability * log`` where a probability of 0 makes 0, in the gradient too."""
    dead = probability == 0
    return torch.where(dead, 0.0, probability * torch.where(dead, 0.0, log))


def entropy(log: torch.Tensor) -> torch.Tensor:
    """Of rows of log-probabilities ``[..., V]``, in nats."""
    return -times(log.exp(), log).sum(-1)


def no_maximum(row: torch.Tensor) -> torch.Tensor:
    """``[..., 1]``: whether a row has no finite maximum, and so no softmax."""
    return ~row.detach().amax(-1, keepdim=True).isfinite()
