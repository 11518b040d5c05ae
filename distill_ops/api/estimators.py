"""Estimates of the reverse KL from the log-probabilities of sampled tokens (on-policy)."""

import torch

from ..checks.tokens import check_sampled_log_probs
from ..scalars import one_of

KINDS = ("k1", "k2", "k3")
NEG_INF = float("-inf")


def reverse_kl_estimate(
    student_log_prob: torch.Tensor, teacher_log_prob: torch.Tensor, *, kind: str
) -> torch.Tensor:
    """Estimate ``KL(student || teacher)`` from one token that the student sampled, in nats.

    ``k1 = log(q/p)``, ``k2 = log(q/p)**2 / 2``, ``k3 = p/q - 1 + log(q/p)``, of the token's q and p.
    Log-probabilities ``[...]`` of both models go in, ``[...]`` comes out, differentiable in log q.

    Example:
        >>> import torch, distill_ops
        >>> log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> log_p = torch.tensor([-1.5, -1.0])
        >>> distill_ops.reverse_kl_estimate(log_q, log_p, kind="k1").tolist()
        [0.5, -1.0]
        >>> loss = distill_ops.reverse_kl_estimate(log_q, log_p, kind="k2")
        >>> loss.sum().backward()
        >>> loss.tolist(), log_q.grad.tolist()
        ([0.125, 0.5], [0.5, -1.0])

    ``q`` is the student's and ``p`` the teacher's probability of the token; with the expectation ``E``
    over tokens sampled from ``q`` (Schulman, "Approximating KL divergence", 2020):

    | kind | value | gradient through ``student_log_prob`` |
    |---|---|---|
    | k1 | unbiased; of either sign; its variance is large | 1: E[gradient] = 0, useless as a loss |
    | k2 | biased, by the third order of ``log(q/p)``; >= 0 | ``log(q/p)``: E[gradient] is that of the reverse KL |
    | k3 | unbiased; >= 0; less variance than k1 where q is near p, more where p/q is large | ``1 - p/q``: E[gradient] is that of the forward KL, ``KL(teacher || student)`` |

    So log k1 or k3, and differentiate k2; ``k1.detach() * student_log_prob``, the policy-gradient
    form, has the gradient of k2. No kind has both the right value and the right gradient, hence no
    default.

    Off-policy or truncated tokens need importance weights, and k3 a student that excludes none of the
    teacher's tokens (docs/estimators.md).

    Args:
        student_log_prob: ``[...]``, float32 or float64: ``log q`` of the tokens, differentiable.
        teacher_log_prob: ``[...]``, float32 or float64: ``log p`` of the same tokens; a constant.
        kind: "k1", "k2" or "k3".

    Returns:
        ``[...]``, float32, or float64 where an argument is. A log-probability may be -inf:

        | | k1, its gradient | k2 | k3 |
        |---|---|---|---|
        | the teacher's | +inf, 1 | +inf, +inf | +inf, 1 |
        | the student's | -inf, 1 | +inf, -inf | +inf, -inf |
        | both (a token that nobody samples) | 0, 0 | 0, 0 | 0, 0 |

        NaN gives NaN. k3 overflows to +inf where ``p/q`` does, at ``log(p/q)`` above 88 in float32.
        Near q = p its error is about one unit in the last place of ``log(q/p)``, which may leave 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    one_of("kind", kind, KINDS)
    check_sampled_log_probs(student_log_prob, teacher_log_prob)
    neither = (student_log_prob == NEG_INF) & (teacher_log_prob == NEG_INF)
    log_ratio = student_log_prob.masked_fill(neither, 0.0) - teacher_log_prob.masked_fill(
        neither, 0.0
    )
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # p/q outgrows its logarithm: inf, not inf - inf
    return torch.expm1(-log_ratio) + log_ratio.masked_fill(log_ratio == NEG_INF, 0.0)
