"""``distillation_metrics`` against formulas in float64, and where it has to be exact."""

import pytest
import torch

from distill_ops import distillation_metrics, reference
from tests.support.helpers import assert_close, make_logits
from tests.support.operators import opcheck_of_the_loss

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
INF = float("inf")


def formulas(student, teacher, temperature=1.0):
    """The metrics in plain PyTorch, in the dtype of the logits (float32 for half precision)."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype) / temperature, teacher.to(dtype) / temperature
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    found = {
        name: reference.distillation_loss(
            student, teacher, divergence=name, reduction="none", infinities="propagate"
        )
        for name in DIVERGENCES
    }
    found["expected_acceptance"] = torch.minimum(log_q.exp(), log_p.exp()).sum(-1)
    entropy = lambda log: torch.special.entr(log.exp()).sum(-1)
    return found | {"student_entropy": entropy(log_q), "teacher_entropy": entropy(log_p)}


def check(student, teacher, backend, temperature=1.0):
    ours = distillation_metrics(student, teacher, temperature=temperature, backend=backend)
    eager = formulas(student, teacher, temperature)
    truth = formulas(student.double(), teacher.double(), temperature)
    for name in truth:
        mine = getattr(ours, name)
        assert mine.dtype == torch.float32
        assert_close(name, mine, eager[name], truth[name])
    agree = student.argmax(-1) == teacher.argmax(-1)
    assert torch.equal(ours.top1_agreement, agree)
    return ours


@pytest.mark.parametrize("shape", [(5,), (3, 33), (2, 3, 130), (4, 4096), (2, 4099)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_formulas(shape, dtype, backend, device):
    student, teacher = make_logits(shape, dtype=dtype, device=device)
    ours = check(student, teacher, backend)
    assert all(x.shape == shape[:-1] for x in ours)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_strides_and_padding(temperature, backend, device):
    student, teacher = make_logits((2, 6, 50), device=device)
    views = student[:, 1:, 3:], teacher[:, :-1, 3:]
    check(*views, backend, temperature)
    first = distillation_metrics(student, teacher[..., :45], vocab_size=40, backend=backend)
    sliced = distillation_metrics(student[..., :40], teacher[..., :40], backend=backend)
    for mine, expected in zip(first, sliced, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_infinite_logits(backend, device):
    """Infinite where it is infinite; padding counts for nothing; NaN stays in its row."""
    student, teacher = make_logits((6, 70), device=device)
    student[0, 3], teacher[1, 4] = -INF, -INF  # one excludes what the other does not
    student[2, 60:], teacher[2, 60:] = -INF, -INF  # padding
    student[3, 0], student[4] = float("nan"), -INF
    ours = distillation_metrics(student, teacher, backend=backend)
    assert ours.forward_kl[0] == INF
    assert ours.reverse_kl[1] == INF
    assert ours.reverse_kl[0].isfinite()
    assert ours.forward_kl[1].isfinite()
    for mine in ours[:7]:
        assert mine[3].isnan()
        assert mine[4].isnan()
        assert mine[5].isfinite()
    assert not ours.top1_agreement[3:5].any()
    truth = formulas(student[:3].double(), teacher[:3].double())
    for name in truth:
        mine = getattr(ours, name)[:3].double()
        torch.testing.assert_close(mine, truth[name], rtol=1e-5, atol=1e-6)


def test_agreement_of_ties_and_of_the_last_column(backend, device):
    student = torch.tensor([[0.0, 3, 3, 1], [0, 0, 0, 5], [2, 1, 0, 0]], device=device)
    teacher = torch.tensor([[0.0, 4, 4, 1], [0, 0, 0, 1], [0, 1, 0, 0]], device=device)
    ours = distillation_metrics(student, teacher, backend=backend)
    assert ours.top1_agreement.tolist() == [True, True, False]


def test_equal_models(backend, device):
    student, _ = make_logits((4, 333), device=device)
    ours = distillation_metrics(student, student.clone(), backend=backend)
    for name in DIVERGENCES:
        assert getattr(ours, name).abs().max() < 1e-6, name
    torch.testing.assert_close(ours.expected_acceptance, torch.ones(4, device=device))
    assert ours.top1_agreement.all()


def test_acceptance_is_one_minus_total_variation(backend, device):
    student, teacher = make_logits((6, 700), device=device)
    ours = distillation_metrics(student, teacher, backend=backend)
    torch.testing.assert_close(ours.expected_acceptance, 1 - ours.total_variation)


def test_no_gradient_and_no_change(backend, device):
    student, teacher = make_logits((3, 20), device=device)
    kept = student.clone()
    ours = distillation_metrics(student.requires_grad_(), teacher.requires_grad_(), backend=backend)
    assert not any(x.requires_grad for x in ours)
    assert torch.equal(student, kept)


def test_float64():
    student, teacher = make_logits((3, 40), dtype=torch.float64)
    ours = distillation_metrics(student, teacher)
    for name, truth in formulas(student, teacher).items():
        torch.testing.assert_close(getattr(ours, name), truth, rtol=1e-11, atol=1e-13)


def test_no_token(backend, device):
    empty = torch.zeros(2, 0, 7, device=device)
    ours = distillation_metrics(empty, empty, backend=backend)
    assert all(x.shape == (2, 0) for x in ours)


def test_opcheck_and_compile(backend, device):
    student, teacher = make_logits((2, 3, 33), device=device)
    opcheck_of_the_loss(distillation_metrics, student, teacher, temperature=2.0, backend=backend)
    compiled = torch.compile(distillation_metrics, fullgraph=True, backend="aot_eager")
    expected = distillation_metrics(student, teacher, backend=backend)
    for mine, other in zip(compiled(student, teacher, backend=backend), expected, strict=True):
        assert torch.equal(mine, other)


def test_bad_input():
    student, teacher = make_logits((3, 20))
    with pytest.raises(ValueError, match="20 columns and teacher_logits 19"):
        distillation_metrics(student, teacher[:, :-1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        distillation_metrics(student, teacher, temperature=0.0)
    with pytest.raises(TypeError, match="student_logits must be a tensor"):
        distillation_metrics([1.0], teacher)
