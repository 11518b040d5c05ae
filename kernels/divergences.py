"""``value_and_slope`` of each built-in divergence: one function each (semantics.md, section 2).

A function receives, for one column or a tile of columns, the natural logarithms of the student's
and the teacher's probability, ``log_q`` and ``log_p``, the probabilities ``q`` and ``p``, and the
divergence's parameters. It returns ``value``, the column's term of the loss in nats, and ``slope``,
its derivative with respect to ``log_q``. With ``D = sum(slope)`` the gradient with respect to the
student's logits is ``(slope - q * D) / temperature``.

The logarithms are finite whenever these functions are called on a row with infinite logits (they
are clamped from below), so ``0 * log`` is 0.
"""

from .math import log
from .portable import device_function


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
