"""The linear loss against the float64 oracle: every divergence, option, path and shape."""

import math

import pytest
import torch

import distill_ops
from distill_ops import JensenShannon, SymmetricKL, linear_distillation_loss
from tests.support.cases import BOOL_MASK, DIVERGENCES, FLOAT_MASK, LABELS, OPTIONS, TOKENS
from tests.support.declared import renyi_like
from tests.support.linear_cases import CAPPED, N_COLS, Pair, check, make_pair, run

pytest.importorskip("triton")

EVERY = [*DIVERGENCES, renyi_like()]
SMALL = 1680  # bytes that hold blocks of three tokens, with a softcap of two


# What the interpreter is slow at runs in the richer of two forms alone.


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_divergences(divergence, backend, device):
    for options in [CAPPED] if backend == "triton" else [{}, CAPPED]:
        pair = make_pair(bias=bool(options), device=device)
        check(pair, divergence=divergence, backend=backend, **options)


LINEAR_OPTIONS = [name for name, options in OPTIONS.items() if "infinities" not in options]


@pytest.mark.parametrize("option", LINEAR_OPTIONS)
def test_options(option, backend, device):
    options = dict(OPTIONS[option])
    if "ignore_index" in options:
        options["labels"] = options["labels"].clamp(min=0)
    pair = make_pair(device=device, bias=True)
    if options.get("hard_label_weight") == 1:
        pair = pair._replace(teacher_hidden=None, teacher_weight=None, teacher_bias=None)
    for budget in [SMALL] if backend == "triton" else [None, SMALL]:
        check(pair, divergence="reverse_kl", backend=backend, memory_budget=budget, **options)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, weight_dtype, backend, device):
    pair = make_pair((5,), 65, dtype=dtype, weight_dtype=weight_dtype, bias=True, device=device)
    check(pair, divergence="jensen_shannon", backend=backend, memory_budget=4000, **CAPPED)


@pytest.mark.parametrize("which", Pair._fields[:4])
def test_one_float64_tensor_makes_all_of_it_float64(which):
    pair = make_pair(bias=True)
    pair = pair._replace(**{which: getattr(pair, which).double()})
    result = run(linear_distillation_loss, pair, divergence="forward_kl", **CAPPED)
    wide = run(
        linear_distillation_loss, pair.map(torch.Tensor.double), divergence="forward_kl", **CAPPED
    )
    assert result.loss.dtype == torch.float64
    torch.testing.assert_close(result.loss, wide.loss, rtol=1e-14, atol=0)
    for name, gradient in result.gradients.items():
        expected = wide.gradients[name].to(getattr(pair, name).dtype)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_half_precision_logits(logits_dtype, capped, backend, device):
    """Rounded to half precision, and no further: 2**-9 or 2**-12 of logits of size 4."""
    pair, options = make_pair((5,), 129, bias=True, device=device), CAPPED if capped else {}
    options = {**options, "divergence": "forward_kl", "backend": backend}
    exact = run(linear_distillation_loss, pair, **options)
    rounded = run(linear_distillation_loss, pair, logits_dtype=logits_dtype, **options)
    eps = torch.finfo(logits_dtype).eps
    for name, expected in exact.gradients.items():
        error = (rounded.gradients[name] - expected).norm() / expected.norm()
        assert eps / 50 < error < 4 * eps, name


def test_padded_heads(backend, device):
    """The first columns of both; no others are read, and they get gradient 0."""
    pair = make_pair(n_cols=40, teacher_cols=48, bias=True, device=device)
    for tensor in (pair.student_weight, pair.student_bias):
        tensor[N_COLS:] = math.nan
    for tensor in (pair.teacher_weight, pair.teacher_bias):
        tensor[N_COLS:] = math.inf
    for budget in (None, SMALL):
        ours = check(pair, vocab_size=N_COLS, backend=backend, memory_budget=budget)
        assert (ours.gradients["student_weight"][N_COLS:] == 0).all()
        assert (ours.gradients["student_bias"][N_COLS:] == 0).all()


@pytest.mark.parametrize("n_cols", [1, 7, 127, 1031])
@pytest.mark.parametrize("leading", [(), (1,), (3, 1, 2)], ids=str)
def test_shapes(leading, n_cols, backend, device):
    pair = make_pair(leading, n_cols, bias=True, device=device)
    options = {"divergence": "reverse_kl", "backend": backend, "reduction": "sum", **CAPPED}
    if n_cols > 1:
        check(pair, **options)
        return
    ours = run(linear_distillation_loss, pair, **options)
    for value in (ours.loss, *ours.gradients.values()):  # both distributions are certain
        assert (value.abs() <= 2e-6).all()


def test_views(backend, device):
    """A shifted view of the hidden states, and a transposed weight."""
    pair = make_pair((2, 4), bias=True, device=device)
    leaves = pair.trained(("student_hidden", "student_weight"))
    transposed = pair.student_weight.t().contiguous().t().requires_grad_()
    options = {
        "student_bias": leaves.student_bias,
        "teacher_bias": leaves.teacher_bias,
        "backend": backend,
    }
    loss = linear_distillation_loss(
        leaves.student_hidden[:, :-1], transposed, leaves.teacher_hidden[:, 1:], leaves.teacher_weight, **options
    )  # fmt: skip
    loss.backward()
    sliced = pair._replace(
        student_hidden=pair.student_hidden[:, :-1], teacher_hidden=pair.teacher_hidden[:, 1:]
    )
    expected = run(linear_distillation_loss, sliced, upstream_seed=None, backend=backend)
    torch.testing.assert_close(loss.detach(), expected.loss)
    hidden = leaves.student_hidden.grad
    torch.testing.assert_close(hidden[:, :-1], expected.gradients["student_hidden"])
    assert (hidden[:, -1] == 0).all()
    torch.testing.assert_close(transposed.grad, expected.gradients["student_weight"])


# --- which tokens count --------------------------------------------------------------------------

MASKS = {
    "mask": {"loss_mask": FLOAT_MASK, "student_softcap": None},
    "labels": {"labels": LABELS},
    "both": {"loss_mask": BOOL_MASK, "labels": LABELS, "hard_label_weight": 0.5},
    "kept_tokens": {"loss_mask": BOOL_MASK, "kept_tokens": 5},
    "kept_tokens_exactly": {"labels": LABELS, "kept_tokens": 4},
    "kept_tokens_none": {"labels": LABELS, "kept_tokens": 4, "reduction": "none"},
    "per_token": {"loss_mask": BOOL_MASK, "kept_tokens": 4, "divergence": "per token"},
    "backward": {"loss_mask": FLOAT_MASK, "kept_tokens": 5, "gradient": "backward"},
}


@pytest.mark.parametrize("option", MASKS)
def test_masked_tokens_are_not_read(option, backend, device):
    """NaN in their hidden states reaches nothing, and their gradient is exactly 0."""
    options = {"student_softcap": 3.0, "memory_budget": SMALL, "backend": backend} | MASKS[option]
    if options.get("divergence") == "per token":
        options["divergence"] = SymmetricKL(torch.linspace(0.1, 0.9, 6, device=device).view(TOKENS))
    pair = make_pair(bias=True, device=device)
    clean = check(pair, **options)
    kept = options.get("loss_mask", torch.ones(TOKENS)) != 0
    if "labels" in options:
        kept = kept & (options["labels"] != -100)
    assert not kept.all()
    for hidden in (pair.student_hidden, pair.teacher_hidden):
        hidden[~kept] = math.nan
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    dirty = run(linear_distillation_loss, pair, **options)
    assert torch.equal(dirty.loss, clean.loss)
    for name, gradient in dirty.gradients.items():
        assert torch.equal(gradient, clean.gradients[name])
    assert (dirty.gradients["student_hidden"][~kept] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"kept_tokens": 2}], ids=str)
def test_no_kept_token(options, reduction, backend, device):
    pair = make_pair(bias=True, device=device).map(lambda x: x)
    pair.student_hidden.fill_(math.nan)
    mask = torch.zeros(TOKENS, device=device)
    ours = run(
        linear_distillation_loss, pair, loss_mask=mask, reduction=reduction, backend=backend, **options
    )  # fmt: skip
    assert (ours.loss == 0).all()
    assert all((gradient == 0).all() for gradient in ours.gradients.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_at_all(reduction, backend, device):
    pair = make_pair((0, 3), bias=True, device=device)
    ours = run(
        linear_distillation_loss, pair, reduction=reduction, backend=backend, normalizer=None
    )
    assert ours.loss.shape == ((0, 3) if reduction == "none" else ())
    assert ours.loss.sum() == 0
    assert ours.gradients["student_hidden"].shape == (0, 3, 16)
    assert all((gradient == 0).all() for gradient in ours.gradients.values())


def test_too_many_kept_tokens(backend, device, monkeypatch):
    pair = make_pair(device=device)
    options = {"loss_mask": BOOL_MASK.to(device), "kept_tokens": 3, "backend": backend}
    if device == "cpu":
        with pytest.raises(ValueError, match="kept_tokens=3 must bound .* got 4"):
            run(linear_distillation_loss, pair, **options)
    if backend == "triton":  # where a GPU's values are not read, the result tells
        monkeypatch.setattr("distill_ops.checks.contents.readable", lambda *_: False)
        for reduction in ("mean", "none"):
            ours = run(linear_distillation_loss, pair, reduction=reduction, **options)
            assert ours.loss.isnan().any()
            assert ours.gradients["student_weight"].isnan().all()


def test_components(backend, device):
    pair = make_pair(device=device)
    options = {"labels": LABELS.to(device), "backend": backend, "memory_budget": SMALL}
    for reduction in ("mean", "sum", "none"):
        parts = linear_distillation_loss(
            *pair[:4], hard_label_weight=0.3, return_components=True, reduction=reduction, **options
        )
        for weight, name in ((0.0, "divergence"), (1.0, "hard_label")):
            alone = linear_distillation_loss(
                *pair[:4], hard_label_weight=weight, reduction=reduction, **options
            )
            torch.testing.assert_close(getattr(parts, name), alone)
        mixed = 0.7 * parts.divergence + 0.3 * parts.hard_label
        torch.testing.assert_close(parts.loss, mixed)
        assert not parts.divergence.requires_grad
    plain = linear_distillation_loss(*pair[:4], return_components=True, **options)
    assert torch.equal(plain.loss, plain.divergence)
    assert plain.hard_label == 0


@pytest.mark.parametrize("parameter", ["0-d", "per token"])
def test_parameters_in_tensors(parameter, backend, device):
    beta = torch.tensor(0.3) if parameter == "0-d" else torch.linspace(0.2, 0.8, 6).view(TOKENS)
    pair = make_pair(device=device)
    options = {"loss_mask": FLOAT_MASK, "memory_budget": SMALL, "backend": backend}
    check(pair, divergence=JensenShannon(beta.to(device)), **options)


def test_infinite_bias(backend, device):
    """-inf forbids tokens: the terms are dropped as in the dense loss."""
    pair = make_pair(bias=True, device=device)
    pair.student_bias[:2] = -math.inf
    pair.teacher_bias[1:3] = -math.inf
    check(pair, ("student_hidden", "student_weight"), divergence="forward_kl", backend=backend)


def test_module():
    pair = make_pair()
    module = distill_ops.LinearDistillationLoss(divergence="reverse_kl", reduction="sum")
    expected = linear_distillation_loss(*pair[:4], divergence="reverse_kl", reduction="none")
    assert torch.equal(module(*pair[:4], reduction="none"), expected)
    torch.testing.assert_close(module(*pair[:4]), expected.sum())
    assert "divergence='reverse_kl'" in repr(module)
    with pytest.raises(TypeError, match="^LinearDistillationLoss.* 'inplace'"):
        distill_ops.LinearDistillationLoss(inplace=True)


# --- bad input -----------------------------------------------------------------------------------


class Sharded(torch.Tensor):
    """What of a DTensor the check looks at."""

    def full_tensor(self):
        return self


def bad(**changed):
    pair = make_pair(bias=True)
    arguments = dict(zip(Pair._fields, pair, strict=True))
    return arguments | changed


BAD_INPUT = [
    (lambda: bad(student_weight=torch.zeros(N_COLS, 5)), ValueError, "student_hidden must be"),
    (lambda: bad(student_weight=torch.zeros(N_COLS, 0)), ValueError, "student_weight must be"),
    (lambda: bad(teacher_bias=torch.zeros(3)), ValueError, "teacher_bias must be"),
    (lambda: bad(teacher_weight=torch.zeros(40, 24), teacher_bias=None), ValueError, "pass vocab_size"),
    (lambda: bad(teacher_hidden=torch.zeros(*TOKENS, 24, requires_grad=True)), ValueError, "teacher_hidden requires grad.* detach it"),
    (lambda: bad(teacher_hidden=None), ValueError, "needs hard_label_weight=1"),
    (lambda: bad(teacher_hidden=torch.zeros(3, 2, 24)), ValueError, "leading shape of student_hidden"),
    (lambda: bad(student_weight=torch.zeros(N_COLS, 16).as_subclass(Sharded)), TypeError, r"forward of the .*lm_head.unshard\(\), or pass student_weight.full_tensor\(grad_placements=\[Partial\('avg'\)\]\)"),
    (lambda: bad(student_bias=torch.zeros(N_COLS).as_subclass(Sharded)), TypeError, r"pass student_bias.full_tensor\(grad_placements="),
    (lambda: bad(student_hidden=torch.zeros(*TOKENS, 16).as_subclass(Sharded)), TypeError, "pass this rank's tokens"),
    (lambda: bad(teacher_weight=torch.zeros(N_COLS, 24).as_subclass(Sharded)), TypeError, r"pass teacher_weight.full_tensor\(\)"),
    (lambda: bad(loss_mask=torch.zeros(2)), ValueError, "loss_mask .* of student_hidden"),
    (lambda: bad(labels=LABELS.short()), TypeError, "labels must be int64"),
    (lambda: bad(labels=LABELS + 40, hard_label_weight=0.5), ValueError, r"labels must lie in \[0, 33\)"),
    (lambda: bad(student_softcap=0.0), ValueError, "student_softcap must be positive"),
    (lambda: bad(teacher_logit_scale=-1.0), ValueError, "teacher_logit_scale must be positive"),
    (lambda: bad(logits_dtype=torch.int8), ValueError, "logits_dtype must be"),
    (lambda: bad(logits_dtype="float32"), ValueError, "logits_dtype must be"),
    (lambda: bad(memory_budget=0), ValueError, "memory_budget must be at least 1"),
    (lambda: bad(memory_budget=1.5), TypeError, "memory_budget must be an int"),
    (lambda: bad(memory_budget=100), ValueError, "memory_budget=100 is too small: .* take [0-9]+ bytes"),
    (lambda: bad(kept_tokens=0), ValueError, "kept_tokens must be at least 1"),
    (lambda: bad(kept_tokens=True), TypeError, "kept_tokens must be an int"),
    (lambda: bad(vocab_size=34), ValueError, r"vocab_size must be in \[1, 33\]"),
    (lambda: bad(divergence="kl"), ValueError, "kl"),
    (lambda: bad(reduction="batchmean"), ValueError, "reduction must be one of"),
    (lambda: bad(gradient="now"), ValueError, "gradient must be one of"),
    (lambda: bad(gradient="forward", reduction="none"), ValueError, "needs reduction='mean' or 'sum'"),
    (lambda: bad(gradient="forward", student_weight=torch.zeros(N_COLS, 16, dtype=torch.float16)), ValueError, "float16"),
    (lambda: bad(backend="cuda"), ValueError, "backend must be one of"),
    (lambda: bad(normalizer=-1.0), ValueError, "normalizer must be finite"),
    (lambda: bad(student_hidden=torch.zeros(2, 3, 16, dtype=torch.int32)), TypeError, "student_hidden must be float32"),
    (lambda: bad(student_hidden=torch.zeros(2, 3, 16, dtype=torch.float64), backend="triton"), ValueError, "got float64"),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(BAD_INPUT)))
def test_bad_input(i):
    make, error, message = BAD_INPUT[i]
    with pytest.raises(error, match=message):
        linear_distillation_loss(**make())


def test_the_smallest_budget_serves(backend, device):
    pair = make_pair(device=device)
    with pytest.raises(ValueError, match="too small") as caught:
        run(linear_distillation_loss, pair, memory_budget=100, backend=backend)
    smallest = int(str(caught.value).split("take ")[1].split()[0])
    check(pair, memory_budget=smallest, backend=backend)
    with pytest.raises(ValueError, match="too small"):
        run(linear_distillation_loss, pair, memory_budget=smallest - 1, backend=backend)
