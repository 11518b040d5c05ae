"""The top-k loss and the token log-probabilities of a language-model head, against their oracles on
explicit logits."""

import math

import pytest
import torch

import distill_ops
from distill_ops import linear_token_log_probs, linear_topk_distillation_loss, reference
from distill_ops.divergences.built_in import BUILT_IN
from distill_ops.reference.linear import head_logits
from tests.support.declared import renyi_like
from tests.support.linear_cases import hold, leaves, weighted_sum
from tests.support.operators import opcheck_of_the_gradient, opcheck_of_the_loss

DIVERGENCES = [*(kind() for kind in BUILT_IN.values()), renyi_like()]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "logit_scale": 1.3, "softcap": 5.0},
}


def make_head(n_rows, dim, n_cols, *, dtype=torch.float32, device="cpu", bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_rows, dim), (n_cols, dim), (n_cols,)]
    scales = [1.0, 2.0 / math.sqrt(dim), 1.0]
    hidden, weight, of_bias = (
        (torch.randn(s, generator=generator) * f).to(dtype).to(device)
        for s, f in zip(shapes, scales, strict=True)
    )
    return hidden, weight, of_bias if bias else None


def make_slots(n_rows, n_cols, k, *, device="cpu"):
    """A teacher's top k; the second row has an unused slot."""
    logits = torch.randn(n_rows, n_cols, generator=torch.Generator().manual_seed(7)) * 2
    top = distill_ops.teacher_topk(logits, k)
    log_probs, ids = top.log_probs.clone(), top.ids.clone()
    if k > 1 and n_rows > 1:
        ids[1, -1] = -1
    return log_probs.to(device), ids.to(device)


def of_logits(hidden, weight, bias, unread, logit_scale=1.0, softcap=None):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n_cols = weight.shape[0]
    return head_logits(hidden, weight, bias, logit_scale, softcap, unread, n_cols, dtype)


# --- top-k ---------------------------------------------------------------------------------------


def check_topk(backend, device, *, head=None, shape=(7, 16, 90), k=5, budget=None, **options):
    head = dict(HEADS[head or "plain"])
    dtype = options.pop("dtype", torch.float32)
    tensors = make_head(*shape, dtype=dtype, device=device, bias=head.pop("bias", False))
    log_probs, ids = make_slots(shape[0], shape[2], k, device=device)
    unread = torch.zeros(shape[0], dtype=torch.bool, device=device)
    if options.get("loss_mask") is not None:
        unread = options["loss_mask"] == 0
    form = {f"student_{name}": value for name, value in head.items()}

    def ours(hidden, weight, bias):
        return linear_topk_distillation_loss(
            hidden, weight, log_probs, ids, student_bias=bias, backend=backend,
            memory_budget=budget, **form, **options,
        )  # fmt: skip

    def theirs(hidden, weight, bias):
        logits = of_logits(hidden, weight, bias, unread, **head)
        rest = {name: x for name, x in options.items() if name not in ("gradient", "logits_dtype")}
        return reference.topk_distillation_loss(logits, log_probs.to(logits.dtype), ids, **rest)

    return hold(ours, theirs, tensors)


@pytest.mark.covering("divergence", "tail")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore", "restrict", "drop"])
def test_topk(divergence, tail, backend, device):
    check_topk(backend, device, divergence=divergence, tail=tail)


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_topk_mass_terms_and_floor(gradient, backend, device):
    check_topk(
        backend, device, divergence="reverse_kl", tail="drop", mass_terms=True, log_prob_floor=-4.0,
        gradient=gradient,
    )  # fmt: skip


@pytest.mark.covering("head", "gradient")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_topk_heads(head, gradient, backend, device):
    check_topk(backend, device, head=head, gradient=gradient, divergence="jensen_shannon")


@pytest.mark.parametrize("k", [1, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_blocks(k, dtype, backend, device):
    """Blocks of two or three tokens that do not divide seven, with what does not count between."""
    mask = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0], device=device)
    labels = torch.tensor([1, 2, 3, 4, -100, 6, 7], device=device)
    check_topk(
        backend, device, k=k, dtype=dtype, budget=3500, loss_mask=mask * (labels != -100),
        labels=labels, hard_label_weight=0.3, temperature=1.7, reduction="sum",
    )  # fmt: skip


def test_topk_per_token_losses(backend, device):
    check_topk(backend, device, reduction="none", divergence="reverse_kl", head="all")


@pytest.mark.parametrize("views", [(True, True), (True, False), (False, True)])
def test_topk_of_the_first_slots_that_are_stored(views, backend, device):
    """Views, whose rows do not lie one behind the other."""
    hidden, weight, _ = make_head(6, 8, 30, device=device)
    stored = [x[:, :4] for x in make_slots(6, 30, 9, device=device)]
    given = [x if view else x.contiguous() for x, view in zip(stored, views, strict=True)]
    ours, expected = (
        linear_topk_distillation_loss(hidden, weight, *slots, reduction="none", backend=backend)
        for slots in (given, [x.contiguous() for x in stored])
    )
    assert torch.equal(ours, expected)


def test_topk_of_no_token(backend, device):
    hidden, weight, _ = make_head(3, 8, 30, device=device)
    hidden = hidden[:0].requires_grad_()
    slots = (x[:0] for x in make_slots(3, 30, 4, device=device))
    loss = linear_topk_distillation_loss(hidden, weight, *slots, backend=backend)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == hidden.shape


def test_topk_without_a_teacher_is_cross_entropy(backend, device):
    hidden, weight, _ = make_head(4, 8, 30, device=device)
    labels = torch.tensor([0, 29, -100, 5], device=device)
    loss = linear_topk_distillation_loss(
        hidden, weight, None, None, labels=labels, hard_label_weight=1.0, backend=backend
    )
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(loss, expected)


# --- token log-probabilities ---------------------------------------------------------------------


def check_tokens(backend, device, *, head=None, shape=(7, 16, 90), budget=None, **options):
    head = dict(HEADS[head or "plain"])
    dtype = options.pop("dtype", torch.float32)
    tensors = make_head(*shape, dtype=dtype, device=device, bias=head.pop("bias", False))
    ids = torch.arange(shape[0], device=device) * 11 % shape[2]
    if shape[0] > 4:
        ids[4] = -100

    def ours(hidden, weight, bias):
        return linear_token_log_probs(
            hidden, weight, ids, bias=bias, backend=backend, memory_budget=budget, **head, **options
        )

    def theirs(hidden, weight, bias):
        logits = of_logits(hidden, weight, bias, ids == -100, **head)
        return reference.token_log_probs(logits, ids, **options)

    return hold(ours, theirs, tensors)


@pytest.mark.covering("head", "dtype return_entropy")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("return_entropy", [True, False], ids=["entropy", "alone"])
def test_tokens(head, dtype, return_entropy, backend, device):
    options = {"dtype": dtype, "return_entropy": return_entropy, "temperature": 1.3}
    check_tokens(backend, device, head=head, **options)


@pytest.mark.parametrize("n_rows", [0, 1, 7])
def test_tokens_in_blocks(n_rows, backend, device):
    shape = (n_rows, 16, 91)
    check_tokens(backend, device, shape=shape, budget=2500, return_entropy=True)


def test_nan_in_an_ignored_hidden_state(backend, device):
    """Neither results nor the weight's gradient hear of it."""
    hidden, weight, _ = make_head(4, 8, 30, device=device)
    hidden[2] = math.nan
    ids = torch.tensor([3, 1, -100, 29], device=device)
    students = leaves((hidden, weight), False)
    outputs = linear_token_log_probs(*students, ids, return_entropy=True, backend=backend)
    weighted_sum(outputs).backward()
    assert all(x[2] == 0 for x in outputs)
    assert (students[0].grad[2] == 0).all()
    assert students[1].grad.isfinite().all()
    assert students[1].grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen, backend, device):
    hidden, weight, _ = make_head(4, 8, 30, device=device)
    ids = torch.tensor([3, 1, 2, 29], device=device)
    students = leaves((hidden, weight), False)
    linear_token_log_probs(*students, ids, backend=backend).sum().backward()
    half = leaves((hidden, weight), False)
    half[frozen].requires_grad_(False)
    linear_token_log_probs(*half, ids, backend=backend).sum().backward()
    assert half[frozen].grad is None
    assert torch.equal(half[1 - frozen].grad, students[1 - frozen].grad)


def test_tokens_under_compile_and_without_a_second_derivative(backend, device):
    hidden, weight, _ = make_head(4, 8, 30, device=device)
    ids = torch.tensor([3, 1, 2, 29], device=device)
    call = lambda h, w: linear_token_log_probs(h, w, ids, backend=backend).sum()
    grads = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        students = leaves((hidden, weight), False)
        function(*students).backward()
        grads.append([x.grad for x in students])
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    students = leaves((hidden, weight), False)
    with pytest.raises(RuntimeError, match="linear_token_log_probs has no second derivative"):
        torch.autograd.grad(call(*students), students, create_graph=True)


def test_opcheck(backend, device):
    hidden, weight, bias = make_head(4, 8, 30, device=device, bias=True)
    ids = torch.tensor([3, 1, -100, 29], device=device)
    hidden, weight, bias = leaves((hidden, weight, bias), False)
    options = {
        "bias": bias, "logit_scale": 0.8, "softcap": 4.0, "temperature": 1.5, "return_entropy": True,
        "backend": backend,
    }  # fmt: skip
    opcheck_of_the_loss(linear_token_log_probs, hidden, weight, ids, **options)
    opcheck_of_the_gradient(linear_token_log_probs, hidden, weight, ids, **options)


HIDDEN, WEIGHT, IDS = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([1, 4])
SLOTS = torch.full((2, 3), -2.0), torch.tensor([[0, 1, 2], [4, 2, -1]])

HARD = {"hard_label_weight": 1, "labels": IDS}


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        ("linear_token_log_probs", (HIDDEN, WEIGHT[:, :3], IDS), {}, ValueError, r"hidden must be \[\.\.\., 3\]"),
        ("linear_token_log_probs", (HIDDEN, WEIGHT, IDS + 1), {}, ValueError, r"token_ids must lie in \[0, 5\)"),
        ("linear_token_log_probs", (HIDDEN, WEIGHT, IDS), {"memory_budget": 3}, ValueError, "memory_budget=3 is too small.* take [0-9]+"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, SLOTS[0], SLOTS[1] + 1), {}, ValueError, r"teacher_ids must lie in \[0, 5\)"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, SLOTS[0][:1], SLOTS[1]), {}, ValueError, "teacher_log_probs must have the leading shape of student_hidden"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, *SLOTS), {"tail": "dropped"}, ValueError, "tail must be one of"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, None, None), {}, ValueError, "teacher_log_probs is None"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, None, None), HARD | {"temperature": -3.0}, ValueError, "temperature must be positive"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, None, None), HARD | {"tail": "dropped"}, ValueError, "tail must be one of"),
        ("linear_topk_distillation_loss", (HIDDEN, WEIGHT, SLOTS[0], "x"), HARD, TypeError, "teacher_ids must be a tensor"),
    ],
)  # fmt: skip
def test_bad_input(function, arguments, options, error, message):
    if "memory_budget" in options:
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(error, match=message):
        getattr(distill_ops, function)(*arguments, **options)
