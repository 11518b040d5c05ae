"""Divergences that a user declares: every path, and what is refused."""

import pickle
import re

import pytest
import torch
from distill_ops.kernels.portable import triton

import distill_ops
from distill_ops import Divergence, check_divergence, declare_divergence, distillation_loss
from distill_ops.api.choices import INTERPRETED
from distill_ops.divergences.base import DIVERGENCES
from distill_ops.divergences.built_in import BUILT_IN
from examples.squared_hellinger import squared_hellinger
from tests.support import declared
from tests.support.helpers import check, make_logits, moved, run

RIGHT = [squared_hellinger, declared.renyi_like, declared.chi_squared]
OPTIONS = [
    {},
    {"temperature": 2.0, "scale_by_temperature_squared": True},
    {"labels": torch.tensor([1, -100, 3, 4]), "hard_label_weight": 0.3},
    {"loss_mask": torch.tensor([0.5, 0.0, 1.0, 2.0]), "reduction": "none"},
    {"gradient": "backward", "normalizer": 3.0},
    {"vocab_size": 70},
]


@pytest.mark.covering("kind", "options")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.name)
def test_declared_divergence_on_every_path(kind, options, backend, device):
    student, teacher = make_logits((4, 77), device=device)
    options = moved(options, device)
    check(distillation_loss, student, teacher, divergence=kind(), backend=backend, **options)


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_declared_divergence_with_infinite_logits(kind, dtype, backend, device):
    student, teacher = make_logits((4, 77), dtype=dtype, device=device)
    student[:, 3:9], teacher[:, 6:12] = float("-inf"), float("-inf")
    ours = check(distillation_loss, student, teacher, divergence=kind(), backend=backend)
    assert (ours.gradient[:, 3:9] == 0).all()


def test_declared_divergence_by_name_and_compiled():
    student, teacher = make_logits((4, 77))
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    expected = run(distillation_loss, student, teacher, divergence=squared_hellinger())
    for ours in (distillation_loss, compiled):
        result = run(ours, student, teacher, divergence="squared_hellinger")
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(result.gradient, expected.gradient)


def test_declared_parameters():
    kind = declared.renyi_like
    assert issubclass(kind, Divergence)
    assert kind() == kind(0.5) == kind(alpha=0.5) != kind(0.25)
    assert pickle.loads(pickle.dumps(kind(0.25))) == kind(0.25)
    assert repr(kind(0.25)) == "renyi_like(alpha=0.25)"
    for value in (0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\)"):
            kind(value)
    with pytest.raises(TypeError, match="alpha must be a number"):
        kind("0.5")


# --- check_divergence ------------------------------------------------------------------------------


@pytest.mark.covering("backend")
@pytest.mark.parametrize("name", [*BUILT_IN, *(kind.name for kind in RIGHT)])
def test_check_passes_for_right_divergences(name, backend):
    report = check_divergence(name)
    assert report.name == name
    assert report.slope_error < 1e-10
    assert backend in report.paths
    assert (report.instructions is not None) == (triton is not None and not INTERPRETED)


def test_check_counts_instructions():
    pytest.importorskip("triton")
    cheap, dear = check_divergence("forward_kl"), check_divergence("alpha_beta")
    assert 20 < cheap.instructions < dear.instructions < 100
    assert 4 < cheap.special < dear.special
    assert "instructions" in str(cheap)


def test_check_with_per_token_parameters(backend, device):
    weight = torch.rand(2, 3, device=device, generator=torch.Generator(device).manual_seed(0))
    assert check_divergence(distill_ops.SymmetricKL(weight)).slope_error < 1e-10


@pytest.mark.covering("divergence", "backend")
@pytest.mark.parametrize(
    "divergence",
    [
        distill_ops.SymmetricKL(0), distill_ops.SymmetricKL(1.0),
        distill_ops.SymmetricKL(torch.tensor([0.0, 1.0, 0.5])), distill_ops.SkewForwardKL(1),
        distill_ops.SkewReverseKL(1), distill_ops.AlphaBeta(0.01, 0.01),
    ],
    ids=str,
)  # fmt: skip
def test_check_with_parameters_at_their_ends(divergence, backend):
    assert backend in check_divergence(divergence).paths


WRONG = {
    "swapped_sign": r"slope is not the derivative.*q = .*p = .*slope .*d value / d log_q = ",
    "forgotten_probability": "slope is not the derivative",
    "undeclared_infinity": "declare infinite_at_student_zero=True",
    "declared_but_finite": "leave the declaration out",
    "not_a_number_at_zero": "is nan, not finite",
    "constant_at_padding": "padding",
    "unknown_operation": r"tl\.cdiv has no PyTorch counterpart",
}


@pytest.mark.parametrize("name", WRONG)
def test_check_refuses(name):
    with pytest.raises((ValueError, AttributeError), match=WRONG[name]):
        check_divergence(name)


def test_check_names_the_numbers_of_the_column():
    """They can be put into the formula by hand."""
    with pytest.raises(ValueError, match="at the column") as error:
        check_divergence("swapped_sign")
    number = r"(-?\d[\d.e+-]*\d)"
    pattern = (
        rf"q = {number}, p = {number} the value is {number} and the slope {number}, .* = {number}"
    )
    q, p, value, slope, derivative = map(float, re.search(pattern, str(error.value)).groups())
    root = (q * p) ** 0.5
    assert value == pytest.approx(0.5 * (q + p) - root, rel=1e-4)
    assert slope == pytest.approx(0.5 * (q + root), rel=1e-4)
    assert derivative == pytest.approx(0.5 * (q - root), rel=1e-4)


# --- what cannot be declared -------------------------------------------------------------------------


def test_a_function_without_a_file_is_refused():
    names = {"declare_divergence": declare_divergence}
    text = "def typed(log_q, log_p, q, p):\n    return q, q\ndeclare_divergence(typed)"
    with pytest.raises(ValueError, match="define it in a file"):
        exec(text, names)


def test_a_function_with_local_variables_is_refused():
    factor = 2.0

    def scaled(log_q, log_p, q, p):
        return factor * q, factor * q

    with pytest.raises(ValueError, match=r"local variables.*\(factor\)"):
        declare_divergence(scaled)


def wrong_order(p, q, log_p, log_q):
    return q, q


def forward_kl(log_q, log_p, q, p):
    return q, q


def with_parameter(log_q, log_p, q, p, alpha):
    return q * alpha, q * alpha


def test_other_signatures_and_taken_names_are_refused():
    with pytest.raises(TypeError, match="log_q, log_p, q, p"):
        declare_divergence(wrong_order)
    with pytest.raises(ValueError, match="called 'forward_kl' already"):
        declare_divergence(forward_kl)
    with pytest.raises(TypeError, match="takes a function"):
        declare_divergence("forward_kl")
    with pytest.raises(ValueError, match="no parameter: beta"):
        declare_divergence(with_parameter, domains={"beta": (0, 1)})
    assert DIVERGENCES["forward_kl"] is distill_ops.ForwardKL
