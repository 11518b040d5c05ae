"""MiniLLM's estimator against the exact gradient of the sequence's reverse KL, over all sequences.

A vocabulary of 3, three tokens, float64; a sequence may end early. What docs/minillm.md says of biases is
computed here."""

import pytest
import torch

from distill_ops.methods import minillm
from tests.support import ROOT
from tests.support.enumeration import (
    contexts_of,
    exact_gradient,
    expected_gradient,
    full_kl,
    log_probs_of,
    logits_of,
    mask_of,
    mixture_log_probs,
    per_token_reverse_kl,
    random_table,
    sequence_reverse_kl,
    sequences,
    variance,
)

STUDENT, TEACHER, IDS = random_table(0), random_table(1), sequences()
SHARE = 0.2
# the estimator of the paper without what it gives up exactness for
PLAIN = {"scaling": 1.0, "clip": None, "gamma": 1.0, "length_normalization": False, "whitening": False}  # fmt: skip
SUM = {"clip": None, "reduction": "sum"}
ENDS = pytest.mark.parametrize("end", [None, 2], ids=["whole", "ending early"])


def hold(found, expected):
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def of_logits(table, ids, mask, **options):
    logits = [logits_of(x, ids) for x in (table, TEACHER)]
    return minillm.loss(*logits, ids, mask, **options, **SUM).loss


def of_heads(table, ids, mask, **options):
    """A hidden state is the unit vector of its context, the head the table."""
    units = torch.eye(len(table), dtype=torch.float64)
    hidden = units[contexts_of(ids, table.shape[-1])]
    heads = hidden, table.t(), hidden, TEACHER.t()
    options |= {"logits_dtype": torch.float64}
    return minillm.linear_loss(*heads, ids, mask, **options, **SUM).loss


def estimator(end, include, form=of_logits, first=True, **options):
    """The loss of one sequence that the student sampled."""

    def loss(table, ids):
        mask = mask_of(ids, end)
        log_p, log_q = (log_probs_of(x, ids) for x in (TEACHER, table))
        advantages = minillm.advantages(log_p, log_q, mask, include=include, **PLAIN)
        old = None if first else log_q.detach()
        return form(table, ids, mask, advantages=advantages, old_log_probs=old, **options)

    return loss


def exact(end):
    return exact_gradient(lambda table: sequence_reverse_kl(table, TEACHER, end), STUDENT)


def single_step(end):
    return exact_gradient(lambda table: per_token_reverse_kl(table, TEACHER, end), STUDENT)


@pytest.mark.parametrize(("end", "first"), [(None, True), (2, True), (2, False)], ids=str)
def test_next_with_the_single_step_is_exact(end, first):
    hold(expected_gradient(estimator(end, "next", first=first), STUDENT), exact(end))


def test_it_is_from_hidden_states():
    for first in (True, False):
        loss = estimator(2, "next", of_heads, first=first)
        hold(expected_gradient(loss, STUDENT), exact(2))


@ENDS
def test_current_with_the_single_step_counts_it_twice(end):
    found = expected_gradient(estimator(end, "current"), STUDENT)
    hold(found - exact(end), single_step(end))


def test_current_without_the_single_step_is_exact():
    hold(expected_gradient(estimator(2, "current", single_step=False), STUDENT), exact(2))


def test_next_without_the_single_step_is_not():
    found = expected_gradient(estimator(None, "next", single_step=False), STUDENT)
    hold(exact(None) - found, single_step(None))


# --- teacher-mixed sampling ----------------------------------------------------------------------


def mixed(end, policy, step, rewards=None, of=expected_gradient):
    """The expected gradient where the mixture samples; products of the weights of the policy's term, of the
    single step and of each reward, None for none."""

    def loss(table, ids):
        mask = mask_of(ids, end)
        log_p, log_q = (log_probs_of(x, ids) for x in (TEACHER, table))
        log_b = mixture_log_probs(table, TEACHER, SHARE, ids)
        w = {
            product: minillm.importance_weights(log_q, log_b, mask, product=product)
            for product in ("token", "before", "through", "sequence")
        } | {None: None}
        r = minillm.token_rewards(log_p, log_q, mask, scaling=1.0, clip=None)
        if rewards is not None:
            r = r * w[rewards]
        to_go = minillm.rewards_to_go(r, mask, gamma=1.0, length_normalization=False)
        weights = {"weights": w[policy], "single_step_weights": w[step]}
        return of_logits(table, ids, mask, advantages=to_go, **weights)

    return of(loss, STUDENT, mixture_log_probs(STUDENT, TEACHER, SHARE, IDS))


@ENDS
def test_products_of_weights_make_teacher_mixed_sampling_exact(end):
    hold(mixed(end, policy="sequence", step="before"), exact(end))


def test_a_weight_for_each_reward_is_exact_too():
    hold(mixed(2, policy=None, step="before", rewards="through"), exact(2))


def test_what_has_less_variance():
    assert variance(estimator(None, "next"), STUDENT) < 0.9 * variance(
        estimator(None, "current", single_step=False), STUDENT
    )
    of_sequences = mixed(None, policy="sequence", step="before", of=variance)
    of_rewards = mixed(None, policy=None, step="before", rewards="through", of=variance)
    assert of_rewards < 0.98 * of_sequences


def test_the_token_itself_may_be_in_the_products_of_the_single_step():
    hold(mixed(2, policy="sequence", step="through"), exact(2))


def by_hand(policy, step):
    """The same expectation without the package: probabilities of all sequences, and sums of them."""
    table = STUDENT.detach().requires_grad_()
    log_q, log_p = log_probs_of(table, IDS), log_probs_of(TEACHER, IDS)
    q, p = log_q.detach().exp(), log_p.exp()
    b = (1 - SHARE) * q + SHARE * p
    w = q / b
    through = w.cumprod(1)
    products = {"token": w, "through": through, None: torch.ones_like(w)}
    r = log_p - log_q.detach()
    after = r.sum(1, keepdim=True) - r.cumsum(1)
    steps = products[step] * full_kl(table, TEACHER, IDS)
    per_sequence = (steps - products[policy] * after * log_q).sum(1)
    (gradient,) = torch.autograd.grad((b.prod(1) * per_sequence).sum(), table)
    return gradient


BIASES = {  # weights of the policy's term and of the single step
    "the paper's, a token's own": ("token", "token"),
    "its code's, none on the single step": ("token", None),
    "none": (None, None),
    "equation 5, those up to the token": ("through", "through"),
}


@pytest.mark.parametrize("name", BIASES)
def test_other_weights_are_biased_by_what_the_page_says(name):
    policy, step = BIASES[name]
    truth, found = exact(None), mixed(None, policy, step)
    torch.testing.assert_close(found, by_hand(policy, step), rtol=0, atol=1e-10)
    bias = ((found - truth).norm() / truth.norm()).item()
    assert bias > 0.02
    page = (ROOT / "docs/minillm.md").read_text()
    assert f"| {name} | {bias:.1%} |" in page
