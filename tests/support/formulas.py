"""The divergences once more, by hand: probabilities instead of logarithms, closed gradients.

Float64 and one row at a time; nothing here calls the package.
"""

import math

import torch

ZERO = torch.zeros((), dtype=torch.float64)


def terms(divergence, q, p):
    """Value and slope of outcomes of probabilities q and p, limits where one is 0, infinite terms
    dropped (semantics.md, sections 2 and 3)."""
    name, parameters = divergence.name, divergence.parameters
    both, student_zero = (q > 0) & (p > 0), (q == 0) & (p > 0)
    teacher_zero = (p == 0) & (q > 0)
    safe_q, safe_p = torch.where(both, q, 1.0), torch.where(both, p, 1.0)
    value, slope = _positive(name, parameters, safe_q, safe_p)
    value, slope = torch.where(both, value, 0.0), torch.where(both, slope, 0.0)
    value = value + torch.where(student_zero, _at_student_zero(name, parameters, p), 0.0)
    limit, limit_slope = _at_teacher_zero(name, parameters, q)
    value = value + torch.where(teacher_zero, limit, 0.0)
    return value, slope + torch.where(teacher_zero, limit_slope, 0.0)


def _positive(name, parameters, q, p):
    if name == "soft_cross_entropy":
        return -p * q.log(), -p
    if name == "forward_kl":
        return p * (p / q).log(), -p
    if name == "reverse_kl":
        return q * (q / p).log(), q * (q / p).log() + q
    if name == "symmetric_kl":
        (w,) = parameters
        value = ((1 - w) * p - w * q) * (p / q).log()
        return value, -(1 - w) * p + w * (q * (q / p).log() + q)
    if name == "jensen_shannon":
        (b,) = parameters
        m = b * p + (1 - b) * q
        slope = (1 - b) * q * (q / m).log()
        return b * p * (p / m).log() + slope, slope
    if name == "skew_forward_kl":
        (a,) = parameters
        m = a * p + (1 - a) * q
        return p * (p / m).log(), -(1 - a) * p * q / m
    if name == "skew_reverse_kl":
        (a,) = parameters
        m = a * q + (1 - a) * p
        value = q * (q / m).log()
        return value, value + q - a * q**2 / m
    if name == "total_variation":
        return (q - p).abs() / 2, q * (q - p).sign() / 2
    assert name == "alpha_beta"
    a, b = parameters
    whole = a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b)
    return (whole - p**a * q**b) / (a * b), q**b * (q**a - p**a) / a


def _at_student_zero(name, parameters, p):
    """The value's limit as q goes to 0; 0 for the terms that are dropped. The slope's is 0."""
    if name == "jensen_shannon":
        return -parameters[0] * p * torch.log(ZERO + parameters[0])
    if name == "skew_forward_kl":
        return -p * torch.log(ZERO + parameters[0])
    if name == "total_variation":
        return p / 2
    if name == "alpha_beta":
        a, b = parameters
        return p ** (a + b) / (b * (a + b))
    return ZERO


def _at_teacher_zero(name, parameters, q):
    """Value and slope as p goes to 0; the KLs that are infinite there get no such outcome."""
    if name == "jensen_shannon":
        limit = -(1 - parameters[0]) * q * torch.log(ZERO + 1 - parameters[0])
        return limit, limit
    if name == "skew_reverse_kl":
        limit = -q * torch.log(ZERO + parameters[0])
        return limit, limit
    if name == "total_variation":
        return q / 2, q / 2
    if name == "alpha_beta":
        a, b = parameters
        return q ** (a + b) / (a * (a + b)), q ** (a + b) / a
    return ZERO, ZERO


def softmax(logits, temperature=1.0, support=True):
    """Of one row; ``support`` says which columns it is restricted to."""
    weights = torch.exp((logits - logits.max()) / temperature) * support
    return weights / weights.sum()


def over_outcomes(
    divergence, student, p, owner, temperature=1.0, counts=True, mass_terms=False, floor=None
):
    """Loss, and its gradient with respect to one row of logits, where column j belongs to outcome
    ``owner[j]``: ``q_j (slope / q_outcome - D) / T``. Outcomes that do not count have no term."""
    support, counts = True, torch.full_like(p, True, dtype=torch.bool) & counts
    if divergence.name in ("reverse_kl", "symmetric_kl") and floor is None:
        support = ((p > 0) | ~counts)[owner]
    q_columns = softmax(student, temperature, support)
    q = torch.zeros_like(p).index_add(0, owner, q_columns)
    lowest = 0.0 if floor is None else math.exp(floor)
    q_seen, p_seen = q.clamp(min=lowest), p.clamp(min=lowest)
    value, slope = terms(divergence, q_seen, p_seen)
    if mass_terms:
        share = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(divergence.name)
        share = divergence.parameters[0] if share is None else share
        kept = (q_seen > 0) & (p_seen > 0)
        value = value + torch.where(kept, (1 - 2 * share) * (q_seen - p_seen), 0.0)
        slope = slope + torch.where(kept, (1 - 2 * share) * q_seen, 0.0)
    counts = counts & ((q > 0) | (p > 0))
    value = torch.where(counts, value, 0.0)
    slope = torch.where(counts & (q >= lowest), slope, 0.0)
    ratio = torch.where(q > 0, slope / torch.where(q > 0, q, 1.0), 0.0)
    return value.sum(), q_columns * (ratio[owner] - slope.sum()) / temperature


def dense(divergence, student, teacher, temperature=1.0):
    columns = torch.arange(len(student))
    return over_outcomes(divergence, student, softmax(teacher, temperature), columns, temperature)


def topk(
    divergence, student, log_p, ids, tail, temperature=1.0, mass_terms=False, log_prob_floor=None
):
    """Of one row: K outcomes, with or without the rest, or all columns."""
    log_p, ids = log_p[ids >= 0], ids[ids >= 0]
    p, n_cols = log_p.exp(), len(student)
    if tail == "restrict":
        owner = torch.arange(len(ids))
        loss, of_listed = over_outcomes(
            divergence, student[ids], p / p.sum(), owner, temperature, floor=log_prob_floor
        )
        return loss, torch.zeros_like(student).index_copy(0, ids, of_listed)
    if tail in ("bucket", "drop"):
        owner = torch.full((n_cols,), len(ids))
        owner[ids] = torch.arange(len(ids))
        counts = torch.ones_like(p, dtype=torch.bool)
        if len(ids) < n_cols:
            rest = (1 - p.sum()).clamp(min=2**-24) if tail == "bucket" else ZERO
            p = torch.cat([p, rest[None]])
            counts = torch.cat([counts, torch.tensor([tail == "bucket"])])
        return over_outcomes(
            divergence, student, p, owner, temperature, counts, mass_terms, log_prob_floor
        )
    if tail == "renormalize":
        p = p / p.sum()
    every = torch.zeros_like(student).index_copy(0, ids, p)
    return over_outcomes(divergence, student, every, torch.arange(n_cols), temperature)
