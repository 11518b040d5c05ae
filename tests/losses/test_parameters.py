"""A divergence's parameters as numbers and tensors: right on every path, and nothing compiled anew."""

import pytest
import torch
import torch._dynamo.testing

import distill_ops
from distill_ops import (
    AlphaBeta,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    distillation_loss,
)
from tests.support.helpers import (
    check,
    make_logits,
    moved,
    run,
)

TOKENS = (2, 3)
VALUES = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.35, 0.65]])
KINDS = {
    "jensen_shannon": JensenShannon,
    "symmetric_kl": SymmetricKL,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "alpha_beta": AlphaBeta,
    "alpha_beta, beta": lambda value: AlphaBeta(0.3, value),
    "alpha_beta, both": lambda value: AlphaBeta(value, value),
}
OPTIONS = {
    "plain": {},
    "backward": {"gradient": "backward"},
    "none": {"reduction": "none"},
    "hard": {"labels": torch.tensor([[1, -100, 2], [3, 4, -100]]), "hard_label_weight": 0.3},
    "temperature": {"temperature": 2.0, "vocab_size": 30},
}


@pytest.mark.covering("kind", "option")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_per_token(kind, option, backend, device):
    options = moved(OPTIONS[option], device)
    student, teacher = make_logits((*TOKENS, 33), device=device)
    divergence = KINDS[kind](VALUES.to(device))
    check(distillation_loss, student, teacher, divergence=divergence, backend=backend, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_its_own(kind, backend, device):
    student, teacher = make_logits((*TOKENS, 65), device=device)
    options = {"reduction": "none", "backend": backend}
    together = run(
        distillation_loss, student, teacher, divergence=KINDS[kind](VALUES.to(device)), **options
    )
    for i in range(TOKENS[0]):
        for j in range(TOKENS[1]):
            number = KINDS[kind](VALUES[i, j].item())
            alone = distillation_loss(student[i, j], teacher[i, j], divergence=number, **options)
            torch.testing.assert_close(alone, together.loss[i, j], rtol=3e-6, atol=0)


@pytest.mark.covering("kind", "dtype")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scalar_tensor_is_a_number(kind, dtype, backend, device):
    student, teacher = make_logits((*TOKENS, 33), device=device)
    for gradient in ("forward", "backward"):
        options = {"backend": backend, "gradient": gradient}
        number = run(distillation_loss, student, teacher, divergence=KINDS[kind](0.25), **options)
        value = torch.tensor(0.25, dtype=dtype, device=device)
        tensor = run(distillation_loss, student, teacher, divergence=KINDS[kind](value), **options)
        torch.testing.assert_close(tensor.loss, number.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(tensor.gradient, number.gradient, rtol=1e-5, atol=1e-8)


def test_strided_and_masked_values(backend, device):
    """What a masked token's value is does not matter, NaN included."""
    student, teacher = make_logits((4, 33), device=device)
    mask = torch.tensor([1.0, 0, 1, 1], device=device)
    wide = torch.tensor([[0.1, 9], [float("nan"), 9], [0.4, 9], [0.7, 9]], device=device)
    for kind in (SkewForwardKL, JensenShannon):
        check(
            distillation_loss, student, teacher, divergence=kind(wide[:, 0]), loss_mask=mask,
            backend=backend,
        )  # fmt: skip


def test_end_points_of_numbers_are_the_kl_that_they_are(backend, device):
    student, teacher = make_logits((3, 40), device=device)
    forward, reverse = (
        run(distillation_loss, student, teacher, divergence=d, backend=backend)
        for d in (distill_ops.ForwardKL(), distill_ops.ReverseKL())
    )
    for divergence, expected in [
        (JensenShannon(0), forward), (JensenShannon(1.0), reverse), (SkewForwardKL(0), forward),
        (SkewReverseKL(0.0), reverse), (AlphaBeta(1, 0), forward), (AlphaBeta(0, 1), reverse),
    ]:  # fmt: skip
        ours = run(distillation_loss, student, teacher, divergence=divergence, backend=backend)
        assert torch.equal(ours.loss, expected.loss)
        assert torch.equal(ours.gradient, expected.gradient)


def test_a_skew_of_one_is_zero(backend, device):
    """m is the distribution itself."""
    student, teacher = make_logits((3, 40), device=device)
    for divergence in (SkewForwardKL(1.0), SkewReverseKL(1.0)):
        ours = run(distillation_loss, student, teacher, divergence=divergence, backend=backend)
        assert ours.loss.abs() < 1e-6
        assert ours.gradient.abs().max() < 1e-6


def test_a_changed_number_compiles_no_kernel():
    """Every number reaches the kernel as an argument, none as a constant of its code."""
    pytest.importorskip("triton")
    from distill_ops.analysis import aot
    from distill_ops.analysis.forms import Form

    target, form = aot.TARGETS["sm_90"], Form(32000)
    for one, other in [
        (JensenShannon(0.3), JensenShannon(0.7)), (SymmetricKL(0.0), SymmetricKL(1.0)),
        (SkewForwardKL(0.1), SkewForwardKL(1.0)), (AlphaBeta(0.2, 0.7), AlphaBeta(1.0, 1.0)),
    ]:  # fmt: skip
        keys = []
        for divergence in (one, other):
            (launch,) = form.launches(divergence, target)
            constants = {
                p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr
            }
            types = {name: aot._type(launch.arguments[name]) for name in ("parameters", "over_t")}
            keys.append((constants, types, launch.arguments["num_warps"]))
        assert keys[0] == keys[1]
        assert one.parameters != other.parameters


@pytest.mark.parametrize("shape", [(), (4,)], ids=["scalar", "per token"])
def test_a_changed_tensor_compiles_no_graph(shape):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(student, teacher, alpha):
        return distillation_loss(student * 1.0, teacher, divergence=SkewForwardKL(alpha))

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    student, teacher = make_logits((4, 33))
    for seed in range(3):
        alpha = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05
        expected = run(step, student, teacher, alpha=alpha)
        ours = run(compiled, student, teacher, alpha=alpha)
        torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.gradient, expected.gradient, rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 1


def test_which_options_compile_a_graph_anew():
    """As README's limits say: numbers do, and normalizer may be a tensor, which does not."""
    student, teacher = make_logits((4, 33))
    labels = torch.tensor([1, 2, 3, 4])
    options = {
        "temperature": ({}, float, 2),
        "hard_label_weight": ({"labels": labels}, float, 2),
        "soft_weight": ({"labels": labels, "hard_label_weight": 0.5}, float, 2),
        "normalizer": ({}, float, 2),
        "normalizer as a tensor": ({}, torch.tensor, 1),
    }
    for title, (others, kind, expected) in options.items():
        torch.compiler.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(distillation_loss, fullgraph=True, backend=counter)
        name = title.split()[0]
        for value in (0.5, 0.7):
            compiled(student, teacher, **{name: kind(value)}, **others)
        assert counter.frame_count == expected, title


def test_a_divergence_object_with_a_tensor_compiles_once():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t, d: distillation_loss(s * 1.0, t, divergence=d), fullgraph=True, backend=counter
    )
    student, teacher = make_logits((4, 33))
    for seed in range(3):
        values = torch.rand(4, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05
        divergence = JensenShannon(values)
        expected = distillation_loss(student, teacher, divergence=divergence)
        torch.testing.assert_close(compiled(student, teacher, divergence), expected)
    assert counter.frame_count == 1


def test_bad_values():
    student, teacher = make_logits((4, 33))
    with pytest.raises(ValueError, match=r"beta of jensen_shannon .*leading shape.*\(4,\).*\(3,\)"):
        distillation_loss(student, teacher, divergence=JensenShannon(torch.full((3,), 0.5)))
    with pytest.raises(ValueError, match="alpha requires grad"):
        SkewForwardKL(torch.tensor(0.5, requires_grad=True))
    with pytest.raises(TypeError, match="floating-point tensor"):
        SkewForwardKL(torch.tensor(1))
    with pytest.raises(TypeError, match=r"weight must be a number in \[0, 1\], or a tensor"):
        SymmetricKL("0.5")
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
            JensenShannon(value)
    for value in (0.0, 1.0, float("nan")):  # a tensor's values are not routed to the KLs
        with pytest.raises(ValueError, match=r"values in \(0, 1\), got"):
            distillation_loss(student, teacher, divergence=JensenShannon(torch.tensor(value)))
    with pytest.raises(ValueError, match="greater than 0 and finite, got 0.0"):
        distillation_loss(student, teacher, divergence=AlphaBeta(torch.tensor(0.0), 0.5))
    edge = SymmetricKL(torch.tensor([0.0, 1.0, 0.5, 0.2]))  # where the formula holds at the ends
    check(distillation_loss, student, teacher, divergence=edge)


def test_any_value_will_do_where_no_token_counts():
    student, teacher = make_logits((2, 3, 7))
    labels = torch.tensor([[1, 2, -100], [-100, 3, 4]])
    weight = torch.full((2, 3), 0.5).masked_fill(labels == -100, float("nan"))
    divergence = SymmetricKL(weight)
    expected = distillation_loss(student, teacher, divergence=divergence, loss_mask=labels != -100)
    assert expected.isfinite()
    assert distillation_loss(student, teacher, divergence=divergence, labels=labels) == expected
    with pytest.raises(ValueError, match=r"weight .* got nan"):
        distillation_loss(student, teacher, divergence=divergence, labels=labels.clamp(min=0))
