"""MiniLLM's functions of tokens against the reference in float64: padding anywhere, wrong values where nothing
counts."""

import pytest
import torch

import distill_ops
from distill_ops.methods import minillm
from distill_ops.reference import minillm as reference
from tests.support.helpers import make_ids, make_logits
from tests.support.sequences import INF, doubled, log_probs, mask_of, masks, numbers, spoilt

V = 11


def hold(function, *tensors, mask, **options):
    """A function of numbers of each token: as the reference in float64, whatever stands where it counts not."""
    found = getattr(minillm, function)(*(spoilt(x, mask) for x in tensors), mask.int(), **options)
    expected = getattr(reference, function)(*doubled(*tensors), mask, **options)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.shape == mask.shape
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    return found


@masks
def test_token_rewards(name):
    mask = mask_of(name)
    for options in ({}, {"scaling": 2.0, "clip": 0.3}, {"clip": None}):
        hold("token_rewards", *log_probs(mask), mask=mask, **options)


def test_rewards_of_excluded_tokens():
    log_p, log_q = torch.tensor([[-INF, -1.0, -INF]]), torch.tensor([[-1.0, -INF, -INF]])
    mask = torch.ones(1, 3)
    assert minillm.token_rewards(log_p, log_q, mask).tolist() == [[-100, 100, 0]]
    unclipped = minillm.token_rewards(log_p, log_q, mask, clip=None)
    assert unclipped.tolist() == [[-INF, INF, 0]]
    to_go = minillm.rewards_to_go(unclipped[:, :1].expand(1, 3), mask, gamma=0.0, include="current")
    assert to_go.isneginf().all()  # of no 0 * inf


@masks
@pytest.mark.parametrize("include", ["next", "current"])
def test_rewards_to_go(name, include):
    mask = mask_of(name)
    for gamma, normalized in ((0.95, True), (1.0, False), (0.0, False)):
        options = {"gamma": gamma, "length_normalization": normalized, "include": include}
        hold("rewards_to_go", *numbers(mask, 1), mask=mask, **options)


def test_rewards_to_go_of_long_sequences():
    mask = torch.rand(2, 3000, generator=torch.Generator().manual_seed(1)) > 0.1
    for gamma in (0.95, 1.0, 0.2):
        hold("rewards_to_go", *numbers(mask, 1), mask=mask, gamma=gamma)


@masks
@pytest.mark.parametrize("count_padding", [False, True])
def test_whitening(name, count_padding):
    mask = mask_of(name)
    found = hold("whiten", *numbers(mask, 1, scale=3.0), mask=mask, count_padding=count_padding)
    if mask.sum() > 2 and not count_padding:
        kept = found[mask]
        assert kept.mean().abs() < 1e-6
        assert kept.var(correction=0) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("n", [64, 4096])
def test_whitening_of_equal_values_is_0(n):
    """Whatever their number: a rounded mean would be divided by the root of 1e-8."""
    assert not minillm.whiten(torch.full((4, n), 100.1), torch.ones(4, n)).any()


def test_whitening_of_large_values():
    found = minillm.whiten(torch.tensor([[1e30, -1e30, 0.0]]), torch.ones(1, 3))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 0.0]]) * 1.5**0.5)


def test_an_infinite_reward_is_not_discounted_away():
    rewards = torch.zeros(1, 100)
    rewards[0, -1] = -INF
    found = minillm.rewards_to_go(rewards, torch.ones(1, 100), gamma=0.05, include="current")
    assert (found == -INF).all()


def test_whitening_does_not_depend_on_padding_unless_asked():
    values, mask = torch.randn(2, 4), mask_of("right")
    longer = [torch.nn.functional.pad(x, (0, 5)) for x in (values, mask)]
    for count_padding in (False, True):
        found, other = (
            minillm.whiten(*x, count_padding=count_padding)[:, :4] for x in ((values, mask), longer)
        )
        assert torch.allclose(found, other) is not count_padding


@masks
def test_advantages(name):
    mask = mask_of(name)
    hold("advantages", *log_probs(mask), mask=mask)
    options = {"include": "current", "count_padding": True, "clip": 0.5, "gamma": 1.0}
    hold("advantages", *log_probs(mask), mask=mask, **options)


@masks
@pytest.mark.parametrize("product", ["token", "before", "through", "sequence"])
def test_importance_weights(name, product):
    mask = mask_of(name)
    hold("importance_weights", *log_probs(mask), mask=mask, product=product)


def test_importance_weights_are_bounded_by_the_students_share():
    student, teacher = make_logits((2, 50, V), scale=6.0)
    ids = make_ids((2, 50), V, ignored=False)
    log_q = distill_ops.token_log_probs(student, ids)
    log_b = distill_ops.mixture_token_log_probs(student, teacher, ids, 0.2)
    w = minillm.importance_weights(log_q, log_b, torch.ones(2, 50))
    assert 1.2 < w.max() <= 1.25 * (1 + 1e-6)
    assert w.min() >= 0


# --- the policy's loss ---------------------------------------------------------------------------


@masks
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_policy_loss(name, weighted, reduction):
    mask = mask_of(name)
    log_q, old = log_probs(mask)
    weights, advantages = numbers(mask, 2, seed=1)
    weights = weights.exp() if weighted else None
    for clip in (0.2, None):
        options = {"clip": clip, "reduction": reduction}
        leaf = spoilt(log_q, mask).requires_grad_()
        given = None if weights is None else spoilt(weights, mask)
        others = (spoilt(x, mask) for x in (old, advantages))
        found = minillm.policy_loss(leaf, *others, mask, weights=given, **options)
        found.backward()
        wide = log_q.double().requires_grad_()
        weights_wide = None if weights is None else weights.double()
        expected = reference.policy_loss(
            wide, *doubled(old, advantages), mask, weights=weights_wide, **options
        )
        expected.backward()
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2e-6, atol=2e-6)
        assert (leaf.grad[~mask] == 0).all()


def test_a_ratio_that_overflows():
    """Where it is clipped, or has no advantage, loss and gradient are finite."""
    log_q = torch.zeros(1, 3, requires_grad=True)
    old = torch.tensor([[-200.0, -200.0, 200.0]])
    loss = minillm.policy_loss(log_q, old, torch.tensor([[2.0, 0.0, 1.0]]), torch.ones(1, 3))
    loss.backward()
    assert loss.item() == pytest.approx(-2.4 / 3)
    assert log_q.grad.tolist() == [[0, 0, 0]]
