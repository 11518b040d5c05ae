"""Rewards of sampled tokens and what policy methods make of them: rewards-to-go, advantages, weights.

Constants of a step, ``[batch, sequence]``. Equations are those of MiniLLM (arXiv:2306.08543).
"""

import torch

from ..checks.sequences import INCLUDED, PRODUCTS, ValidTokens, check_positive
from ..checks.values import check_share
from ..scalars import flag, one_of

EPSILON = 1e-8  # of the variance, as in MiniLLM's code


def token_rewards(
    teacher_log_probs: torch.Tensor,
    student_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float = 0.5,
    clip: float | None = 100.0,
) -> torch.Tensor:
    """How much likelier the teacher finds each sampled token than the student does: the reward, in nats.

    ``r_t = clip((log p(y_t) - log q(y_t)) / scaling)``: below equation 2, scaling and clip of the code.
    Log-probabilities ``[batch, sequence]`` of both models go in, ``[batch, sequence]`` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> log_p, log_q = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
        >>> minillm.token_rewards(log_p, log_q, torch.ones(1, 2)).tolist()  # divided by 0.5
        [[1.0, -2.0]]

    Args:
        teacher_log_probs, student_log_probs: ``[batch, sequence]``, of the sampled tokens, floating-point: of
            the models that the sequences were sampled with. -inf (a token that a model excludes) gives a
            reward at the clip; where both models exclude a token it is 0.
        mask: ``[batch, sequence]``, bool, or 0 and 1: the valid tokens.
        scaling: positive; MiniLLM's scripts have 0.5, which doubles the rewards.
        clip: rewards are clipped to ``[-clip, clip]`` after the scaling; None for no clipping.

    Returns:
        ``[batch, sequence]``, float32 (float64 where an argument is), a constant: no gradient flows
        through it. 0 where a token is not valid.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    valid = ValidTokens.of(mask)
    scaling = check_positive("scaling", scaling)
    clip = check_positive("clip", clip, "for no clipping")
    log_p = valid.numbers("teacher_log_probs", teacher_log_probs).detach()
    log_q = valid.numbers("student_log_probs", student_log_probs).detach()
    neither = log_p.isneginf() & log_q.isneginf()
    rewards = (log_p.masked_fill(neither, 0.0) - log_q.masked_fill(neither, 0.0)) / scaling
    return rewards if clip is None else rewards.clamp(-clip, clip)


def rewards_to_go(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 0.95,
    include: str = "next",
    length_normalization: bool = True,
) -> torch.Tensor:
    """What each token's reward and those after it add up to, each divided by their number.

    ``R_t = r_t + gamma R_{t+1}`` ("current", equation 2) or ``R_{t+1}`` ("next", equation 3).
    Rewards ``[batch, sequence]`` go in, ``[batch, sequence]`` comes out, not differentiable.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3)
        >>> minillm.rewards_to_go(rewards, mask, gamma=1.0).tolist()  # (2 + 4) / 2, 4 / 1, 0
        [[3.0, 4.0, 0.0]]
        >>> current = {"include": "current", "length_normalization": False}
        >>> minillm.rewards_to_go(rewards, mask, gamma=0.5, **current).tolist()
        [[3.0, 4.0, 4.0]]

    "next" goes with the single-step term, which is the exact gradient of the token's own reward: "current"
    beside it, as in MiniLLM's code, counts that twice. Without the single-step term "current" is right,
    and "next" is not.

    Args:
        rewards, mask: ``[batch, sequence]``, as :func:`token_rewards` takes and gives them. Tokens that are
            not valid are passed over wherever they stand: they are no step, and take no discount.
        gamma: in [0, 1]; 1 in the paper, 0.95 in its code. "next" is R_{t+1} itself, not gamma times it.
        include: "next" (the paper's), or "current" (its code's).
        length_normalization: divide by the number of valid tokens in the sum (equation 6, which prints
            T - t - 1 for the T - t terms of its sum), as the code does.

    Returns:
        ``[batch, sequence]``, float32 (float64 of float64), a constant; 0 where a token is not valid, and
        with "next" at the last valid one.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    valid = ValidTokens.of(mask)
    gamma = check_share("gamma", gamma)
    one_of("include", include, INCLUDED)
    flag("length_normalization", length_normalization)
    total = valid.numbers("rewards", rewards).detach()
    # R_t = total_t + factor_t R_{t+1}: doubling the number of tokens summed, until it is all of them
    factor = torch.where(valid.mask, gamma, 1.0).to(total.dtype)
    least = (
        torch.finfo(total.dtype).tiny if gamma else 0.0
    )  # an infinite reward is not discounted away
    reach = 1
    while reach < total.shape[-1]:
        total = total + (factor * _later(total, reach)).masked_fill(factor == 0, 0.0)
        factor = (factor * _later(factor, reach, beyond=1.0)).clamp(min=least)
        reach *= 2
    count = valid.mask.flip(-1).cumsum(-1).flip(-1)
    if include == "next":
        total, count = _later(total, 1), count - 1
    if length_normalization:
        total = total / count.clamp(min=1)
    return total.masked_fill(~valid.mask, 0.0)


def _later(values: torch.Tensor, steps: int, beyond: float = 0.0) -> torch.Tensor:
    """Of each token that which stands some steps later."""
    later = torch.nn.functional.pad(values[..., steps:], (0, steps), value=beyond)
    return later[..., : values.shape[-1]]  # of no tokens too


def whiten(
    values: torch.Tensor, mask: torch.Tensor, *, count_padding: bool = False
) -> torch.Tensor:
    """Values less their mean, divided by their standard deviation, of the valid tokens of the batch.

    ``(x - mean) / sqrt(variance + 1e-8)``, the variance divided by the number of values.
    Values ``[batch, sequence]`` go in, ``[batch, sequence]`` comes out, not differentiable.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]])
        >>> minillm.whiten(values, mask).tolist()
        [[-1.0, 1.0, 0.0]]

    Args:
        values, mask: ``[batch, sequence]``; values finite where valid.
        count_padding: take mean and variance of all entries, those of tokens that are not valid being 0,
            as MiniLLM's code does: then they depend on how long the batch was padded. (Its variance is
            that of all processes; on a single one it is divided by one less.)

    Returns:
        ``[batch, sequence]``, float32 (float64 of float64), a constant; 0 where a token is not valid.
        Equal values, or a single one, give 0. The batch is this process's.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    valid = ValidTokens.of(mask)
    flag("count_padding", count_padding)
    x = valid.numbers("values", values, finite=True).detach()
    counted = torch.ones_like(valid.mask) if count_padding else valid.mask
    n = counted.sum().clamp(min=1)
    wide = x.double()  # a mean that is rounded, over the root of EPSILON, would be no small number
    centred = (wide - wide.sum() / n).masked_fill(~counted, 0.0)
    scale = torch.rsqrt(centred.square().sum() / n + EPSILON)
    return (centred * scale).masked_fill(~valid.mask, 0.0).to(x.dtype)


def advantages(
    teacher_log_probs: torch.Tensor,
    student_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float = 0.5,
    clip: float | None = 100.0,
    gamma: float = 0.95,
    include: str = "next",
    length_normalization: bool = True,
    whitening: bool = True,
    count_padding: bool = False,
) -> torch.Tensor:
    """Rewards, rewards-to-go and whitening in one: what :func:`loss` takes as ``advantages``.

    ``whiten(rewards_to_go(token_rewards(log p, log q)))``
    Log-probabilities ``[batch, sequence]`` of both models go in, ``[batch, sequence]`` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> log_p, log_q = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[-1.5, -1.0, -2.0]])
        >>> found = minillm.advantages(log_p, log_q, torch.ones(1, 3), whitening=False)
        >>> [round(x, 4) for x in found[0].tolist()]  # (-2 + 0.95 * 2) / 2, 2 / 1, 0
        [-0.05, 2.0, 0.0]

    Args:
        teacher_log_probs, student_log_probs, mask, scaling, clip: as in :func:`token_rewards`.
        gamma, include, length_normalization: as in :func:`rewards_to_go`.
        whitening, count_padding: whether to :func:`whiten`, and over what. MiniLLM's code always does.

    Returns:
        ``[batch, sequence]``, a constant; 0 where a token is not valid.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    flag("whitening", whitening)
    flag("count_padding", count_padding)
    rewards = token_rewards(teacher_log_probs, student_log_probs, mask, scaling=scaling, clip=clip)
    found = rewards_to_go(
        rewards, mask, gamma=gamma, include=include, length_normalization=length_normalization
    )
    return whiten(found, mask, count_padding=count_padding) if whitening else found


def importance_weights(
    student_log_probs: torch.Tensor,
    behaviour_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    product: str = "token",
) -> torch.Tensor:
    """How much likelier the student finds what was sampled than the policy that sampled it.

    ``w_t = q(y_t) / b(y_t)``: b the mixture of equation 4, w_t the approximation below equation 5.
    Log-probabilities ``[batch, sequence]`` of both go in, ``[batch, sequence]`` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> q, b = torch.tensor([[0.5, 0.2, 0.6]]), torch.tensor([[0.5, 0.4, 0.4]])
        >>> for product in ("token", "before", "through", "sequence"):
        ...     w = minillm.importance_weights(q.log(), b.log(), torch.ones(1, 3), product=product)
        ...     print([round(x, 4) for x in w[0].tolist()])
        [1.0, 0.5, 1.5]
        [1.0, 1.0, 0.5]
        [1.0, 0.5, 0.75]
        [0.75, 0.75, 0.75]

    A token's weight is at most ``1 / (1 - a)`` where b mixes in the teacher with the share a. Those of
    single tokens leave a bias, as does "through", which is equation 5's weight: rewards that come after a
    token were sampled by b too. Exact are "before" on the single step with "sequence" on the policy's
    term, whose variance grows with the length (docs/minillm.md has both, enumerated).

    Args:
        student_log_probs, behaviour_log_probs: ``[batch, sequence]``, of the sampled tokens. What was sampled
            has a probability: the behaviour's are finite.
        mask: ``[batch, sequence]``, the valid tokens.
        product: of the weights of "token" (that token alone), "before" (the valid ones before it), "through"
            (and itself), or "sequence" (all). A product beyond the largest number is inf, which the losses
            refuse.

    Returns:
        ``[batch, sequence]``, float32 (float64 where an argument is), a constant: no gradient flows
        through it. 1 where a token is not valid.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    valid = ValidTokens.of(mask)
    one_of("product", product, PRODUCTS)
    log_q = valid.numbers("student_log_probs", student_log_probs).detach()
    log_b = valid.numbers("behaviour_log_probs", behaviour_log_probs, finite=True).detach()
    log_w = log_q - log_b
    if product == "sequence":
        log_w = log_w.sum(-1, keepdim=True).expand_as(log_w)
    elif product != "token":
        through = log_w.cumsum(-1)
        before = torch.nn.functional.pad(through[..., :-1], (1, 0))
        log_w = through if product == "through" else before[..., : log_w.shape[-1]]
    return log_w.exp().masked_fill(~valid.mask, 1.0)
