"""MiniLLM's whole loss and its plain-text loss against the reference in float64, of logits and hidden states."""

import math
from unittest import mock

import pytest
import torch

from distill_ops.methods import minillm
from distill_ops.operators.functions import OPERATORS
from distill_ops.reference import minillm as reference
from tests.support.helpers import make_ids, make_logits
from tests.support.sequences import INF, NAN, doubled, log_probs, mask_of, masks, numbers, spoilt

V, D = 11, 5


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


def test_a_sampled_token_that_the_student_excludes():
    """What the rollout says, ratio 1, is taken for true: value and gradient are finite."""
    mask = torch.ones(1, 1)
    student, teacher = make_logits((1, 1, V), dtype=torch.float64)
    student[..., 3] = -INF
    options = {"advantages": torch.full((1, 1), -2.0), "single_step": False}
    found, (gradient,) = compute(
        minillm.loss, [student, teacher], torch.tensor([[3]]), mask, **options
    )
    assert found.loss.item() == 2
    expected = -2 * student.softmax(-1)
    expected[..., 3] += 2
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("first", [True, False], ids=["first update", "later"])
def test_one_graph_under_compile(first):
    mask = mask_of("right")
    (student, teacher), ids = problem(mask)
    log_p, log_q, log_b = log_probs(mask, 3)
    leaf = student.requires_grad_()

    def step(logits):
        advantages = minillm.advantages(log_p, log_q, mask)
        weights = minillm.importance_weights(log_q, log_b, mask)
        old = None if first else log_q
        options = {"advantages": advantages, "weights": weights, "old_log_probs": old}
        return minillm.loss(logits, teacher, ids, mask, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, step))
    torch.testing.assert_close(found, expected)
