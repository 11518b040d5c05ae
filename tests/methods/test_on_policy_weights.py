"""``methods.on_policy``: what a token's term is multiplied and divided by, against the terms themselves, and
when the gradient is made."""

import math

import pytest
import torch

from distill_ops import reverse_kl_estimate, token_log_probs
from distill_ops.methods import on_policy
from tests.support.helpers import make_logits

B, S, V = 4, 3, 7
LOGITS = make_logits((B, S, V), dtype=torch.float64)
IDS = torch.arange(B * S).reshape(B, S) % V
MASK = torch.ones(B, S, dtype=torch.bool)
MASK[0, 0] = MASK[2, 1:] = False
NONE = {"reduction": "none"}
OBJECTIVES = [{}, {"objective": "sampled"}, {"objective": "support", "k": 3}]
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=["full", "sampled", "support"])


def call(rows=slice(None), **options):
    """The result and the gradient of the logits."""
    leaf = LOGITS[0].clone().requires_grad_()
    found = on_policy.loss(leaf[rows], LOGITS[1][rows], IDS[rows], MASK[rows], **options)
    found.loss.sum().backward()
    return found, leaf.grad


@objectives
@pytest.mark.parametrize("make", [int, torch.tensor], ids=["number", "tensor"])
def test_micro_batches_make_the_whole(make, objective):
    whole, gradient = call(**objective)
    count = make(int(MASK.sum()))
    parts = [call(rows, normalizer=count, **objective) for rows in (slice(0, 1), slice(1, B))]
    torch.testing.assert_close(sum(found.loss for found, _ in parts), whole.loss)
    torch.testing.assert_close(sum(part for _, part in parts), gradient)


@objectives
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_token_weights_keep_their_sign(reduction, objective):
    each, _ = call(**NONE, **objective)
    weights = torch.linspace(-1, 1, B * S).double().reshape(B, S)
    found, _ = call(token_weights=weights, reduction=reduction, **objective)
    over = MASK.sum() if reduction == "mean" else 1
    torch.testing.assert_close(found.loss, (weights * each.loss).sum() / over)
    assert found.loss.abs() > 1e-3


# --- importance weights ----------------------------------------------------------------------------


def of_ratios(ratios, teacher=0.0, **options):
    """Tokens of probability 1/8 under the student, by their ratios to what sampled them."""
    student = torch.zeros(len(ratios), 8)
    teacher = student.index_fill(-1, torch.tensor(0), teacher)
    old = -math.log(8) - torch.tensor(ratios).log()
    ids, mask = torch.zeros(len(ratios)).long(), torch.ones(len(ratios))
    return on_policy.loss(student, teacher, ids, mask, behaviour_log_probs=old, **options)


@pytest.mark.parametrize(
    ("importance", "teacher", "ratios", "weights"),
    [
        ("truncate", 0.0, [0.2, 1.9, 2.1], [0.2, 1.9, 2.0]),
        ("mask", 0.0, [0.45, 0.55, 1.9, 2.1], [0.0, 0.55, 1.9, 0.0]),
        ("clip", -1.0, [0.75, 0.85, 1.25], [0.0, 0.85, 1.25]),
        ("clip", 1.0, [0.75, 1.15, 1.25], [0.75, 1.15, 0.0]),
    ],
)
def test_bounds_by_default(importance, teacher, ratios, weights):
    found = of_ratios(ratios, teacher, importance=importance, objective="sampled")
    torch.testing.assert_close(found.importance_weights, torch.tensor(weights))


def test_a_lower_bound_is_none_of_padding():
    old = torch.full((B, S), -0.1).double().masked_fill(~MASK, math.nan)
    for importance in ("truncate", "clip"):
        found, _ = call(
            objective="sampled", importance=importance, bounds=(0.9, 3.0), behaviour_log_probs=old
        )
        assert not found.importance_weights[~MASK].any()
        assert not found.out_of_bounds[~MASK].any()


def test_rounding_of_a_behaviour_is_no_error():
    """The log-probability of a token that is all but certain, as half precision adds it up."""
    old = torch.full((B, S), 1e-2, dtype=torch.float64)
    found, _ = call(importance="truncate", behaviour_log_probs=old)
    assert found.loss.isfinite()


def test_a_row_is_a_sequence():
    """The last axis is, without another: products of ratios go along it."""
    found = of_ratios([0.5, 0.5, 2.0], importance="truncate", importance_level="prefix")
    torch.testing.assert_close(found.importance_weights, torch.tensor([1.0, 0.5, 0.25]))


def verl(log_q, log_p, log_b):
    """Its policy loss at its defaults, of k1 as a reward: clipped on both sides, and dual clip 3."""
    cost = (log_q - log_p).detach().clamp(-10, 10)
    rho = (log_q - log_b).clamp(-20, 20).exp()
    clipped = torch.maximum(cost * rho, cost * rho.clamp(1 - 0.2, 1 + 0.28))
    return torch.where(cost > 0, torch.minimum(3.0 * cost, clipped), clipped)


def test_the_clip_is_verl_s():
    """``loss_mode=k1`` with ``use_policy_gradient``: the row of docs/on-policy.md."""
    logits = make_logits((1, 200, 6), dtype=torch.float64)
    ids, leaf = torch.arange(200)[None] % 6, logits[0].clone().requires_grad_()
    log_q, log_p = (token_log_probs(x, ids) for x in (leaf, logits[1]))
    noise = torch.linspace(-3, 3, 200).roll(67)
    log_b = (log_q.detach() + noise).clamp(max=0)
    expected = verl(log_q, log_p, log_b).mean()
    (gradient,) = torch.autograd.grad(expected, leaf)
    found = on_policy.loss(
        leaf, logits[1], ids, ids >= 0, objective="sampled", importance="clip", bounds=(0.8, 1.28),
        dual_clip=3.0, reward_clip=10.0, behaviour_log_probs=log_b,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaf)[0], gradient)
    above = (log_q - log_b).exp() > 3.0
    capped = above & (log_q > log_p)
    assert 0 < capped.sum() < above.sum()
    assert not found.importance_weights[capped].any()
    assert found.out_of_bounds[capped].all()


# --- a teacher of log-probabilities, and when the gradient is made ---------------------------------


@pytest.mark.parametrize("objective", ["sampled", "support"])
def test_log_probs_of_a_server_are_at_the_temperature(objective):
    served = torch.linspace(-5, -1, B * S).double().reshape(B, S)
    teacher = None if objective == "sampled" else LOGITS[1]
    found = on_policy.loss(
        LOGITS[0], teacher, IDS, MASK, objective=objective, teacher_log_probs=served,
        temperature=2.0, k=None if objective == "sampled" else 3,
    )  # fmt: skip
    log_q = token_log_probs(LOGITS[0], IDS, temperature=2.0)
    for kind in ("k1", "k2", "k3"):
        expected = reverse_kl_estimate(log_q, served, kind=kind)
        torch.testing.assert_close(getattr(found, kind), expected.masked_fill(~MASK, 0.0))
    torch.testing.assert_close(found.teacher_log_prob, served.masked_fill(~MASK, 0.0))


AGAIN = {
    "none": NONE,
    "importance": {"importance": "truncate", "behaviour_log_probs": torch.full((B, S), -0.1)},
    "sampled": {"objective": "sampled"},
}


@pytest.mark.parametrize("name", ["full", "support", *AGAIN])
def test_the_gradient_is_made_in_the_forward(name):
    """Where it can be, and a second backward then says so."""
    options = AGAIN.get(name, OBJECTIVES[0 if name == "full" else 2])
    leaf = LOGITS[0].clone().requires_grad_()
    loss = on_policy.loss(leaf, LOGITS[1], IDS, MASK, **options).loss.sum()
    first, *_ = torch.autograd.grad(loss, leaf, retain_graph=True)
    if name in AGAIN:
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    else:
        with pytest.raises(RuntimeError, match="the first backward used up"):
            torch.autograd.grad(loss, leaf)


@pytest.mark.full  # the profiler takes a second to start
@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 4), ({"reduction": "none"}, 6), ({"objective": "sampled"}, 6), (None, 4)],
)
def test_matrix_products(options, expected):
    """Of hidden states: two forward, and two for the gradients; two more where logits are formed again."""
    draw = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(x, generator=draw, requires_grad=i < 2)
        for i, x in enumerate(2 * [(B, S, 5), (V, 5)])
    ]
    if options is None:  # a server's
        heads[2:], options = (
            [None, None],
            {"objective": "sampled", "teacher_log_probs": -torch.ones(B, S)},
        )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        on_policy.linear_loss(*heads, IDS, MASK, **options).loss.sum().backward()
    names = [event.name for event in profile.events()]
    assert sum(name in ("aten::mm", "aten::addmm") for name in names) == expected
