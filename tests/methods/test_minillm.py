"""MiniLLM's functions against the reference in float64: padding anywhere, wrong values where nothing counts."""

import math
from unittest import mock

import pytest
import torch

import distill_ops
from distill_ops.methods import minillm
from distill_ops.operators.functions import OPERATORS
from distill_ops.reference import minillm as reference
from tests.support.helpers import make_ids, make_logits

INF, NAN = float("inf"), float("nan")
V, D = 11, 5
MASKS = {
    "all": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "right": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1]],
    "a row of none": [[1, 1, 1, 0], [0, 0, 0, 0]],
    "none": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "one token": [[1]],
    "no tokens": [[], []],
}


def mask_of(name: str) -> torch.Tensor:
    return torch.tensor(MASKS[name]).bool()


masks = pytest.mark.parametrize("name", MASKS)


def numbers(mask: torch.Tensor, n: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    """Several of each token, float32."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(n, *mask.shape, generator=generator) * scale)


def log_probs(mask: torch.Tensor, n: int = 2, seed: int = 0) -> list[torch.Tensor]:
    return [-x.abs() - 0.1 for x in numbers(mask, n, seed)]


def spoilt(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """With NaN and infinities where the mask has nothing."""
    wrong = torch.tensor([NAN, INF, -INF]).to(x.dtype).repeat(mask.numel())[: mask.numel()]
    return torch.where(mask, x, wrong.view(mask.shape))


def doubled(*tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


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


# --- the whole loss ------------------------------------------------------------------------------


def problem(mask, dtype=torch.float32, linear=False):
    """Tensors of ``loss`` or ``linear_loss``, and which of them learn."""
    if linear:
        hidden, others = make_logits((*mask.shape, D), dtype=dtype)
        weights = make_logits((V, D), seed=2, dtype=dtype)
        tensors = [hidden, weights[0], others, weights[1]]
    else:
        tensors = list(make_logits((*mask.shape, V), dtype=dtype))
    ids = make_ids(mask.shape, V, ignored=False)
    return tensors, ids


def compute(function, tensors, ids, mask, **options):
    """The result, and gradients of the student's tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors[: len(tensors) // 2]]
    result = function(*leaves, *tensors[len(leaves) :], ids, mask, **options)
    result.loss.backward()
    return result, [x.grad for x in leaves]


def options_of(mask, old):
    advantages, weights, steps = numbers(mask, 3, seed=5)
    options = {"advantages": advantages, "weights": weights.exp(), "single_step_weights": steps.abs()}  # fmt: skip
    if old is not None:
        options["old_log_probs"] = old
    return options


@masks
@pytest.mark.parametrize("first", [True, False], ids=["first update", "later"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
def test_loss(name, first, linear):
    mask = mask_of(name)
    tensors, ids = problem(mask, linear=linear)
    old = None if first else log_probs(mask, 1, seed=4)[0]
    options = options_of(mask, old) | {"entropy_coef": 0.1}
    wrong_ids = torch.where(mask, ids, 10**9)
    spoilt_options = {
        k: spoilt(x, mask) if isinstance(x, torch.Tensor) else x for k, x in options.items()
    }
    rows = [x.clone() for x in tensors]
    for x in rows:
        if x.shape[:-1] == mask.shape:
            x[~mask] = NAN
    function = minillm.linear_loss if linear else minillm.loss
    found, gradients = compute(function, rows, wrong_ids, mask.int(), **spoilt_options)
    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    expected, true_gradients = compute(of_logits, doubled(*tensors), ids, mask, **wide)
    for field in ("loss", "policy", "single_step", "entropy", "clipped"):
        mine, theirs = getattr(found, field), getattr(expected, field)
        assert mine.dim() == 0
        assert mine.requires_grad == (field == "loss")
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6, msg=field)
    for mine, theirs in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
        if mine.shape[:-1] == mask.shape:
            assert (mine[~mask] == 0).all()


def of_logits(*arguments, **options):
    """The reference of either: hidden states make logits."""
    *tensors, ids, mask = arguments
    if len(tensors) == 4:
        hidden, weight, teacher_hidden, teacher_weight = tensors
        tensors = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    return reference.loss(*tensors, ids, mask, **options)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
def test_the_first_update_is_that_of_old_log_probabilities_of_now(linear):
    mask = mask_of("right")
    tensors, ids = problem(mask, torch.float64, linear)
    function = minillm.linear_loss if linear else minillm.loss
    more = {"logits_dtype": torch.float64} if linear else {}
    options = options_of(mask, None) | {"entropy_coef": -0.2, "reduction": "sum"} | more
    found, gradients = compute(function, tensors, ids, mask, **options)
    assert found.clipped > 0
    options["old_log_probs"] = found.statistics.student_log_prob
    other, other_gradients = compute(function, tensors, ids, mask, **options)
    for mine, theirs in zip((*found[:5], *gradients), (*other[:5], *other_gradients), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Per-token numbers are float32, the gradient is of the logits' dtype."""
    mask = mask_of("left")
    tensors, ids = problem(mask, dtype)
    for old in (None, log_probs(mask, 1)[0].to(dtype)):
        options = {"advantages": numbers(mask, 1)[0].to(dtype), "old_log_probs": old}
        found, gradients = compute(minillm.loss, tensors, ids, mask, **options)
        assert gradients[0].dtype == dtype
        assert {x.dtype for x in (*found[:4], *found.statistics[:5])} == {torch.float32}
        wide = {k: x if x is None else x.double() for k, x in options.items()}
        expected, true_gradients = compute(reference.loss, doubled(*tensors), ids, mask, **wide)
        torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[0].double(), true_gradients[0], rtol=1e-2, atol=1e-3)


def test_without_the_single_step_and_the_entropy():
    mask = mask_of("right")
    tensors, ids = problem(mask)
    tensors[1][..., 0] = -INF  # the teacher excludes a token
    for old in (None, log_probs(mask, 1)[0]):
        options = {"advantages": numbers(mask, 1)[0], "old_log_probs": old}
        found, gradients = compute(minillm.loss, tensors, ids, mask, single_step=False, **options)
        assert torch.equal(found.loss.detach(), found.policy)
        assert found.single_step > 0  # of what is no part of the loss, for logging
        expected, true_gradients = compute(
            reference.loss, tensors, ids, mask, single_step=False, **options
        )
        torch.testing.assert_close(gradients, true_gradients, rtol=1e-5, atol=1e-6)


def calls_of(function) -> dict[str, int]:
    """How often each operator is called."""
    count = {}
    forward = {name: operator.forward for name, operator in OPERATORS.items()}
    patches = [
        mock.patch.object(operator, "forward", wraps=forward[name])
        for name, operator in OPERATORS.items()
    ]
    counting = {name: patch.start() for name, patch in zip(OPERATORS, patches, strict=True)}
    try:
        function()
    finally:
        for patch in patches:
            patch.stop()
    for name, forward in counting.items():
        if forward.call_count:
            count[name] = forward.call_count
    return count


@pytest.mark.parametrize("first", [True, False], ids=["first update", "later"])
def test_one_call_of_the_fused_functions(first):
    mask = mask_of("right")
    old = None if first else log_probs(mask, 1)[0]
    for linear, name in ((False, ""), (True, "linear_")):
        tensors, ids = problem(mask, linear=linear)
        function = getattr(minillm, f"{name}loss")
        options = options_of(mask, old) | {"entropy_coef": 0.1}
        made = calls_of(lambda f=function, t=tensors, i=ids, o=options: f(*t, i, mask, **o))
        assert made == {f"{name}distillation_statistics": 1}


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_pretraining_loss(kd_ratio):
    student, teacher = make_logits((2, 4, V))
    labels = torch.where(mask_of("left"), make_ids((2, 4), V, ignored=False), -100)
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    options = {"kd_ratio": kd_ratio, "lm_coef": 0.7}
    given = teacher if kd_ratio else None
    found = []
    made = calls_of(lambda: found.append(minillm.pretraining_loss(leaf, given, labels, **options)))
    assert made == {"dense_loss": 1}
    expected = reference.pretraining_loss(wide, teacher.double(), labels, **options)
    torch.testing.assert_close(found[0].loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
    weighed = {"divergence": kd_ratio > 0, "hard_label": kd_ratio < 1}
    for part, counts in weighed.items():
        if counts:
            mine, theirs = getattr(found[0], part).double(), getattr(expected, part)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    found[0].loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)


def test_nothing_to_learn_has_a_graph():
    mask = mask_of("none")
    tensors, ids = problem(mask)
    found, (gradient,) = compute(minillm.loss, tensors, ids, mask, advantages=torch.ones(2, 4))
    assert found.loss == 0
    assert (gradient == 0).all()
    assert math.isfinite(found.clipped)
