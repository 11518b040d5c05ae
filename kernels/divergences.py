"""``value_and_slope`` of each built-in divergence: one function each (semantics.md, section 2).

A function receives, for one column or a tile of columns, the natural logarithms of the student's
and the teacher's probability, ``log_q`` and ``log_p``, the probabilities ``q`` and ``p``, and the
divergence's parameters. It returns ``value``, the column's term of the loss in nats, and ``slope``,
its derivative with respect to ``log_q``. With ``D = sum(slope)`` the gradient with respect to the
student's logits is ``(slope - q * D) / temperature``.

The logarithms are finite whenever these functions are called on a row with infinite logits (they
are clamped from below), so ``0 * log`` is 0.

The functions of a mixture of both distributions (``paired`` divergences) receive, instead of the
two logarithms, ``log_ratio = log(p / q)`` and ``ratio = min(p, q) / max(p, q)``. All that they need is
in these two, and what rounding did to the rows' normalisers cancels in the first: near-equal rows
keep their accuracy, and the mixture over the larger of p and q can neither over- nor underflow.
"""

from .math import log_of_normal, mixture, reciprocal
from .portable import constant, device_function, tl

BELOW_ONE = constant(1 - 2**-24)  # a share of 1 could leave a mixture of 0, whose logarithm is none


@device_function
def soft_cross_entropy(log_q, log_p, q, p):
    return -p * log_q, -p


@device_function
def forward_kl(log_q, log_p, q, p):
    return p * (log_p - log_q), -p


@device_function
def reverse_kl(log_q, log_p, q, p):
    value = q * (log_q - log_p)
    return value, value + q


@device_function
def symmetric_kl(log_q, log_p, q, p, weight):
    log_ratio = log_q - log_p
    student = weight * q * log_ratio
    teacher = (1 - weight) * p
    return student - teacher * log_ratio, student + weight * q - teacher


@device_function
def total_variation(log_q, log_p, q, p):
    # compared, not subtracted: the compiler fuses a difference with the product that q is, and equal
    # rows would have the sign of its rounding
    sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return (q - p) * sign, q * sign


@device_function
def alpha_beta(log_q, log_p, q, p, alpha, beta):
    total = alpha + beta
    cross = tl.exp(alpha * log_p + beta * log_q)
    student = tl.exp(total * log_q)
    teacher = tl.exp(total * log_p)
    value = (alpha * teacher + beta * student) / total - cross
    return value / (alpha * beta), (student - cross) / alpha


@device_function
def jensen_shannon(log_ratio, ratio, q, p, beta):
    # m / max(p, q), about its value at p = q: what :func:`mixture` rounds to one side there is as
    # large as the loss of near-equal rows
    m = 1 + tl.where(log_ratio > 0, 1 - beta, beta) * (ratio - 1)
    log_m = log_of_normal(m)
    slope = (beta - 1) * q * (tl.where(log_ratio > 0, log_ratio, 0.0) + log_m)
    return beta * p * (tl.where(log_ratio > 0, 0.0, log_ratio) - log_m) + slope, slope


@device_function
def skew_forward_kl(log_ratio, ratio, q, p, alpha):
    alpha = tl.minimum(alpha, BELOW_ONE)
    m = mixture(log_ratio, ratio, alpha)
    value = p * (tl.where(log_ratio > 0, 0.0, log_ratio) - log_of_normal(m))
    smaller = q * tl.where(log_ratio > 0, 1.0, ratio)
    return value, (alpha - 1) * smaller * reciprocal(m)


@device_function
def skew_reverse_kl(log_ratio, ratio, q, p, alpha):
    alpha = tl.minimum(alpha, BELOW_ONE)
    m = mixture(log_ratio, ratio, 1 - alpha)
    value = -q * (tl.where(log_ratio > 0, log_ratio, 0.0) + log_of_normal(m))
    q_over_m = tl.where(log_ratio > 0, ratio, 1.0) * reciprocal(m)
    return value, value + q - alpha * q * q_over_m
