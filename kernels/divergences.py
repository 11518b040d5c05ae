"""``value_and_slope`` of each built-in divergence: one function each (semantics.md, section 2).

A function receives, for one column or a tile of columns, what the divergence's ``operands`` name
(``terms.py``), then its parameters:

* ``log_q``, ``log_p``: the natural logarithms of the student's and the teacher's probability;
* ``q``, ``p``: the probabilities;
* ``difference = p - q``, ``log_ratio = log(p / q)``, ``log2_ratio = log2(p / q)``,
  ``ratio = min(p, q) / max(p, q)``, ``log2_larger = log2(max(p, q))``.

It returns ``value``, the column's term of the loss in nats, and ``slope``, its derivative with respect
to ``log_q``. With ``D = sum(slope)`` the gradient with respect to the student's logits is
``(slope - q * D) / temperature``.

The logarithms are finite whenever these functions are called on a row with infinite logits (they
are clamped from below), so ``0 * log`` is 0.

Most take the ratio's logarithm instead of two logarithms: what rounding did to the rows' normalisers cancels
in it, so near-equal rows keep their accuracy. With ``ratio`` beside it, a mixture over the larger of p
and q can neither over- nor underflow.
"""

from .math import LN2, log2_of_normal, mixture, reciprocal, uncancelled
from .portable import constant, device_function, tl

BELOW_ONE = constant(1 - 2**-24)  # a share of 1 could leave a mixture of 0, whose logarithm is none


@device_function
def soft_cross_entropy(log_q, log_p, q, p):
    return -p * log_q, -p


@device_function
def forward_kl(log_ratio, q, p):
    return p * log_ratio, -p


@device_function
def reverse_kl(log_ratio, q, p):
    value = -q * log_ratio
    return value, value + q


@device_function
def symmetric_kl(log_ratio, difference, q, weight):
    difference = uncancelled(difference, log_ratio, q)
    mixed = (1 - weight) * difference + (1 - 2 * weight) * q  # (1 - weight) p - weight q
    slope = -q * (weight * log_ratio + (1 - 2 * weight)) - (1 - weight) * difference
    return mixed * log_ratio, slope


@device_function
def total_variation(log_q, log_p, q, p):
    # compared, not subtracted: the compiler fuses a difference with the product that q is, and equal
    # rows would have the sign of its rounding
    sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return (q - p) * sign, q * sign


@device_function
def alpha_beta(log2_ratio, log2_larger, alpha, beta):
    # q, p and p**alpha q**beta to these powers, over the larger of the first two
    total = alpha + beta
    share = alpha / total
    distance = -tl.abs(log2_ratio)
    power = tl.exp2(distance * total)
    student = tl.where(log2_ratio > 0, power, 1.0)
    teacher = tl.where(log2_ratio > 0, 1.0, power)
    cross = tl.exp2(distance * tl.where(log2_ratio > 0, beta, alpha))
    larger = tl.exp2(log2_larger * total) * (1 / alpha)
    slope = student - cross
    value = share * (teacher - cross) + (1 - share) * slope  # exactly 0 where p = q
    return larger * (1 / beta) * value, larger * slope


@device_function
def jensen_shannon(log2_ratio, ratio, q, p, beta):
    # m / max(p, q), about its value at p = q: what :func:`mixture` rounds to one side there is as
    # large as the loss of near-equal rows
    m = 1 + tl.where(log2_ratio > 0, 1 - beta, beta) * (ratio - 1)
    log2_m = log2_of_normal(m)
    slope = q * ((beta - 1) * LN2) * (tl.where(log2_ratio > 0, log2_ratio, 0.0) + log2_m)
    teacher = p * (beta * LN2) * (tl.where(log2_ratio > 0, 0.0, log2_ratio) - log2_m)
    return teacher + slope, slope


@device_function
def skew_forward_kl(log2_ratio, ratio, q, p, alpha):
    alpha = tl.minimum(alpha, BELOW_ONE)
    m = mixture(log2_ratio, ratio, alpha, 1 - alpha)
    log2_p_over_m = tl.where(log2_ratio > 0, 0.0, log2_ratio) - log2_of_normal(m)
    smaller = q * tl.where(log2_ratio > 0, 1.0, ratio)
    return (p * LN2) * log2_p_over_m, (alpha - 1) * smaller * reciprocal(m)


@device_function
def skew_reverse_kl(log2_ratio, ratio, q, alpha):
    alpha = tl.minimum(alpha, BELOW_ONE)
    m = mixture(log2_ratio, ratio, 1 - alpha, alpha)
    log2_m_over_q = tl.where(log2_ratio > 0, log2_ratio, 0.0) + log2_of_normal(m)
    value = (q * -LN2) * log2_m_over_q
    q_over_m = tl.where(log2_ratio > 0, ratio, 1.0) * reciprocal(m)
    return value, value + q * (1 - alpha * q_over_m)
