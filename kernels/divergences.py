"""``value_and_slope`` of each built-in divergence: one function each (semantics.md, section 2).

A function receives, for one column or a tile of columns, the natural logarithms of the student's
and the teacher's probability, ``log_q`` and ``log_p``, the probabilities ``q`` and ``p``, and the
divergence's parameters. It returns ``value``, the column's term of the loss in nats, and ``slope``,
its derivative with respect to ``log_q``. With ``D = sum(slope)`` the gradient with respect to the
student's logits is ``(slope - q * D) / temperature``.

The logarithms are finite whenever these functions are called on a row with infinite logits (they
are clamped from below), so ``0 * log`` is 0.
"""

from .math import log, share
from .portable import device_function, tl


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
def jensen_shannon(log_q, log_p, q, p, beta):
    log_m = log(beta * p + (1 - beta) * q)
    slope = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + slope, slope


@device_function
def symmetric_kl(log_q, log_p, q, p, weight):
    log_ratio = log_q - log_p
    student = weight * q * log_ratio
    teacher = (1 - weight) * p
    return student - teacher * log_ratio, student + weight * q - teacher


@device_function
def skew_forward_kl(log_q, log_p, q, p, alpha):
    m = alpha * p + (1 - alpha) * q
    return p * (log_p - log(m)), -(1 - alpha) * p * share(q, m)


@device_function
def skew_reverse_kl(log_q, log_p, q, p, alpha):
    log_ratio = log_q - log(alpha * q + (1 - alpha) * p)
    value = q * log_ratio
    return value, value + q - alpha * q * tl.exp(log_ratio)


@device_function
def total_variation(log_q, log_p, q, p):
    difference = q - p
    sign = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, 0.0))
    return difference * sign, q * sign


@device_function
def alpha_beta(log_q, log_p, q, p, alpha, beta):
    total = alpha + beta
    cross = tl.exp(alpha * log_p + beta * log_q)
    student = tl.exp(total * log_q)
    teacher = tl.exp(total * log_p)
    value = (alpha * teacher + beta * student) / total - cross
    return value / (alpha * beta), (student - cross) / alpha
