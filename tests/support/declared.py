"""Divergences that the tests declare, right and wrong ones."""

from distill_ops import declare_divergence
from distill_ops.language import log, tl


@declare_divergence(domains={"alpha": (0, 1)})
def renyi_like(log_q, log_p, q, p, alpha=0.5):
    """Tsallis' relative entropy, ``(1 - sum(q^a p^(1 - a))) / (1 - a)``."""
    power = tl.exp(alpha * log_q + (1 - alpha) * log_p)
    return (q - power) / (1 - alpha), (q - alpha * power) / (1 - alpha)


@declare_divergence(infinite_at_teacher_zero=True)
def chi_squared(log_q, log_p, q, p):
    """Pearson's, ``sum(q^2 / p) - 1``."""
    ratio = tl.exp(log_q - log_p)
    return q * ratio - q, 2 * q * ratio - q


@declare_divergence
def swapped_sign(log_q, log_p, q, p):
    root = tl.exp(0.5 * (log_q + log_p))
    return 0.5 * (q + p) - root, 0.5 * (q + root)


@declare_divergence
def forgotten_probability(log_q, log_p, q, p):
    return q * (log_q - log(0.5 * (q + p))), q


@declare_divergence
def undeclared_infinity(log_q, log_p, q, p):
    return p * (log_p - log_q), -p


@declare_divergence(infinite_at_student_zero=True)
def declared_but_finite(log_q, log_p, q, p):
    root = tl.exp(0.5 * (log_q + log_p))
    return 0.5 * (q + p) - root, 0.5 * (q - root)


@declare_divergence
def not_a_number_at_zero(log_q, log_p, q, p):
    return q * q / (p + q), q * q * (q + 2 * p) / ((p + q) * (p + q))


@declare_divergence
def constant_at_padding(log_q, log_p, q, p):
    return (q - p) * (q - p) + 1.0, 2 * q * (q - p)


@declare_divergence
def unknown_operation(log_q, log_p, q, p):
    return tl.cdiv(q, p), q
