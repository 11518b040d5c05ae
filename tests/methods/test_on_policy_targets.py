"""On-policy estimators against what they are said to estimate: expectations over all sequences of a
3-token vocabulary and length 3, float64, to 1e-10; of a biased one the bias, by the formula of
docs/on-policy.md."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill_ops import JensenShannon, reference, reverse_kl_estimate, token_log_probs
from distill_ops.methods import on_policy
from tests.support.enumeration import (
    exact_gradient,
    expected_gradient,
    full_kl,
    log_probs_of,
    logits_of,
    mask_of,
    per_token_reverse_kl,
    random_table,
    sequence_reverse_kl,
    sequences,
)

IDS = sequences()
Q, P = random_table(0), random_table(1)
B = Q + 0.4 * random_table(2)  # the policy that sampled: near the student
LOG_B = log_probs_of(B, IDS)
INF = math.inf
ALL = (0.0, INF)  # bounds that leave every ratio as it is


def expectation(behaviour=None, end=None, **options) -> torch.Tensor:
    """Of the gradient of ``on_policy.loss``, the tokens drawn from the student or from ``behaviour``."""

    def loss(table, ids):
        given = dict(options)
        if "importance" in given:
            given["behaviour_log_probs"] = log_probs_of(behaviour, ids)
        logits = logits_of(table, ids), logits_of(P, ids)
        return on_policy.loss(*logits, ids, mask_of(ids, end), reduction="sum", **given).loss

    return expected_gradient(loss, Q, None if behaviour is None else log_probs_of(behaviour, IDS))


def per_token(of_rows, drawn_by=Q, end=None) -> torch.Tensor:
    """The gradient of ``E_y sum_t of_rows(student's logits, teacher's)[t]``, y drawn by a table."""
    drawn = log_probs_of(drawn_by, IDS).sum(1).exp()

    def objective(table):
        values = of_rows(logits_of(table, IDS), logits_of(P, IDS))
        return (drawn * (values * mask_of(IDS, end)).sum(1)).sum()

    return exact_gradient(objective, Q)


def policy_gradient(coefficient, drawn_by=Q) -> torch.Tensor:
    """``E_y sum_t sum_v c_t(v) grad log q_t(v)``, c made of the rows' q, b and r = log(q / p)."""
    log_q, log_p, log_b = (F.log_softmax(logits_of(x, IDS), -1) for x in (Q, P, B))
    weights = coefficient(log_q.exp(), log_b.exp(), log_q - log_p)
    return per_token(lambda rows, _: (weights * F.log_softmax(rows, -1)).sum(-1), drawn_by)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def target(end=None, drawn_by=None) -> torch.Tensor:
    """Of ``E_{y ~ sg(q)} sum_t KL(q_t || p_t)``, or with y drawn by another table."""
    return exact_gradient(lambda table: per_token_reverse_kl(table, P, end, drawn_by), Q)


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("objective", ["full", "sampled"])
def test_full_and_sampled_are_exact(objective, end):
    assert_equal(expectation(objective=objective, end=end), target(end))


@pytest.mark.parametrize("divergence", ["forward_kl", JensenShannon(0.3), "soft_cross_entropy"])
def test_full_of_any_divergence(divergence):
    def rows(student, teacher):
        return reference.distillation_loss(
            student, teacher, divergence=divergence, reduction="none"
        )

    assert_equal(expectation(divergence=divergence), per_token(rows))


def test_the_sequence_s_reverse_kl_has_the_sampling_as_well():
    """The same value; its gradient is the per-token objective's and that of the later tokens' KL."""
    assert sequence_reverse_kl(Q, P).item() == pytest.approx(
        per_token_reverse_kl(Q, P).item(), abs=1e-12
    )
    kl = full_kl(Q, P, IDS)
    later = kl.flip(1).cumsum(1).flip(1) - kl
    drawn = log_probs_of(Q, IDS).sum(1).exp()
    through_sampling = exact_gradient(
        lambda table: (drawn * (later * log_probs_of(table, IDS)).sum(1)).sum(), Q
    )
    whole = exact_gradient(lambda table: sequence_reverse_kl(table, P), Q)
    assert_equal(whole - expectation(objective="sampled"), through_sampling)


def of_support(k, tail="bucket", divergence="reverse_kl", support="student"):
    def rows(student, teacher):
        return reference.support_distillation_loss(
            student, teacher, k=k, divergence=divergence, tail=tail, support=support,
            reduction="none",
        )  # fmt: skip

    return rows


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 2, "tail": "restrict"},
        {"k": 2, "support": "teacher", "divergence": "forward_kl"},
    ],
    ids=str,
)
def test_support_is_exact_for_its_own_divergence(options):
    assert_equal(expectation(objective="support", **options), per_token(of_support(**options)))


def test_a_support_of_all_tokens_is_full():
    assert_equal(expectation(objective="support", k=3), target())


def test_the_support_s_cut():
    """The bucket's divergence lacks what the rest's own is, weighted by q of the rest."""

    def lacking(student, teacher):
        log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        first = student.argmax(-1, keepdim=True)  # k = 1
        rest = torch.ones_like(log_q).scatter(-1, first, 0.0) == 1
        q, p = (x.exp()[rest].unflatten(0, (27, 3, 2)) for x in (log_q, log_p))
        inner = (q / q.sum(-1, keepdim=True)).log() - (p / p.sum(-1, keepdim=True)).log()
        return (q * inner).sum(-1)

    assert_equal(target() - expectation(objective="support", k=1), per_token(lacking))


@pytest.mark.parametrize(
    ("kind", "forward"), [("k1", None), ("k2", False), ("k3", True)], ids=["k1", "k2", "k3"]
)
def test_estimates_that_are_differentiated(kind, forward):
    """k1: nothing; k2: the reverse KL's gradient; k3: the forward KL's."""

    def loss(table, ids):
        log_q = token_log_probs(logits_of(table, ids), ids)
        return reverse_kl_estimate(log_q, log_probs_of(P, ids), kind=kind).sum()

    found = expected_gradient(loss, Q)
    if forward is None:
        torch.testing.assert_close(found, torch.zeros_like(Q), rtol=0, atol=1e-10)
        return
    name = "forward_kl" if forward else "reverse_kl"
    rows = lambda *logits: reference.distillation_loss(*logits, divergence=name, reduction="none")
    assert_equal(found, per_token(rows))
    assert ((found - target()).norm() > 1e-2) == forward


# --- samples of another policy ---------------------------------------------------------------------


def target_of(objective, drawn_by):
    return per_token(of_support(1), drawn_by) if "k" in objective else target(drawn_by=drawn_by)


objectives = pytest.mark.parametrize(
    "objective",
    [{}, {"objective": "sampled"}, {"objective": "support", "k": 1}],
    ids=["full", "sampled", "support"],
)


@objectives
def test_prefix_weights_are_unbiased(objective):
    found = expectation(
        B, importance="truncate", bounds=ALL, importance_level="prefix", **objective
    )
    assert_equal(found, target_of(objective, Q))


@objectives
def test_token_weights_leave_the_prefixes_to_the_behaviour(objective):
    found = expectation(B, importance="truncate", bounds=ALL, **objective)
    assert_equal(found, target_of(objective, B))
    assert (found - target_of(objective, Q)).norm() > 1e-3


def test_full_needs_no_token_weights():
    """Their mean is 1 whatever the prefix: they are noise alone."""
    weighted = expectation(B, importance="truncate", bounds=ALL)
    assert_equal(weighted, expectation(B))


def clipped(q, b, r):
    lower, upper = 0.9, 1.1
    rho = q / b
    return ((r > 0) & (rho < lower)) | ((r < 0) & (rho > upper))


BIASES = {  # options of "sampled", and what they add to q r in E_b sum_v c(v) grad log q(v)
    "none": ({}, lambda q, b, r: (b - q) * r),
    "truncate": (
        {"importance": "truncate", "bounds": (0.9, 1.1)},
        lambda q, b, r: (b * (q / b).clamp(0.9, 1.1) - q) * r,
    ),
    "mask": (
        {"importance": "mask", "bounds": (0.9, 1.1)},
        lambda q, b, r: -q * r * ((q / b < 0.9) | (q / b > 1.1)),
    ),
    "clip": (
        {"importance": "clip", "bounds": (0.9, 1.1)},
        lambda q, b, r: -q * r * clipped(q, b, r),
    ),
    "dual_clip": (
        {"importance": "clip", "bounds": (0.0, INF), "dual_clip": 1.1},
        lambda q, b, r: -q * r * ((r > 0) & (q / b > 1.1)),
    ),
    "reward_clip": (
        {"importance": "truncate", "bounds": ALL, "reward_clip": 0.5},
        lambda q, b, r: q * (r.clamp(-0.5, 0.5) - r),
    ),
    "reward_clip, truncate": (
        {"importance": "truncate", "bounds": (0.9, 1.1), "reward_clip": 0.5},
        lambda q, b, r: b * (q / b).clamp(0.9, 1.1) * r.clamp(-0.5, 0.5) - q * r,
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_of_sampled(name):
    """Against ``E_{y ~ b} sum_t KL(q_t || p_t)``, for which the token's whole ratio is unbiased."""
    options, bias = BIASES[name]
    found = expectation(B, objective="sampled", **options)
    assert_equal(found - target(drawn_by=B), policy_gradient(bias, B))


def test_biases_of_full():
    """A bounded weight scales a token's divergence by its mean under the behaviour."""

    def weighted(bound):
        q, b = (F.softmax(logits_of(x, IDS), -1) for x in (Q, B))
        return (b * bound(q / b)).sum(-1)

    for importance, bound in (
        ("truncate", lambda rho: rho.clamp(0.0, 1.05)),
        ("mask", lambda rho: rho * (rho <= 1.05)),
    ):
        lost = weighted(bound) - 1
        rows = lambda student, teacher, lost=lost: (
            lost
            * reference.distillation_loss(
                student, teacher, divergence="reverse_kl", reduction="none"
            )
        )
        found = expectation(B, importance=importance, bounds=(0.0, 1.05))
        bias = found - target(drawn_by=B)
        torch.testing.assert_close(bias, per_token(rows, B), rtol=0, atol=1e-10)
        assert bias.norm() > 1e-3


def test_rewards_of_the_behaviour_lack_its_own_kl():
    """Tinker's advantage ``log p - log b``: the gradient is less by that of ``KL(q_t || b_t)``."""
    log_p, log_b = (F.log_softmax(logits_of(x, IDS), -1) for x in (P, B))
    theirs = policy_gradient(lambda q, b, r: q * (log_b - log_p), B)
    own = per_token(
        lambda rows, _: reference.distillation_loss(
            rows, logits_of(B, IDS), divergence="reverse_kl", reduction="none"
        ),
        B,
    )
    assert_equal(target(drawn_by=B) - theirs, own)


@pytest.mark.parametrize(
    "options", [{}, {"objective": "sampled"}, {"objective": "support", "k": 3}]
)
def test_values(options):
    """The expected loss is the reverse KL of the sequence, whatever estimates it."""
    found = on_policy.loss(
        logits_of(Q, IDS), logits_of(P, IDS), IDS, mask_of(IDS), reduction="none", **options
    ).loss
    value = (log_probs_of(Q, IDS).sum(1).exp() * found.sum(1)).sum().item()
    assert value == pytest.approx(sequence_reverse_kl(Q, P).item(), abs=1e-10)
