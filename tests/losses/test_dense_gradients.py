"""When the dense loss makes its gradient, what a second backward gets, and where bits are the same."""

import pytest
import torch

from distill_ops import distillation_loss
from tests.support.cases import DIVERGENCES
from tests.support.helpers import assert_close, make_logits, run, run_reference

pytest.importorskip("triton")


@pytest.mark.parametrize("n_cols", [40, 4099])
def test_no_gradient_is_made_where_none_is_wanted(n_cols, backend, device):
    student, teacher = make_logits((3, n_cols), device=device)
    for divergence in {d.moment: d for d in DIVERGENCES}.values():
        options = {"divergence": divergence, "backend": backend}
        loss = distillation_loss(student, teacher, **options)
        assert not loss.requires_grad
        with torch.no_grad():
            quiet = distillation_loss(student.clone().requires_grad_(), teacher, **options)
        assert not quiet.requires_grad
        truth = run_reference(student, teacher, double=True, divergence=divergence)
        eager = run_reference(student, teacher, double=False, divergence=divergence)
        assert_close("loss", loss, eager.loss, truth.loss)


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_both_gradient_modes_give_the_same_bits(divergence, backend, device):
    for upstream in (1.0, 0.5):
        gradients = []
        for gradient in ("forward", "backward"):
            student, teacher = make_logits((4, 513), dtype=torch.bfloat16, device=device)
            student.requires_grad_()
            loss = distillation_loss(
                student, teacher, divergence=divergence, gradient=gradient, backend=backend
            )
            (loss * upstream).backward()
            gradients.append(student.grad)
        assert torch.equal(*gradients)


def test_backward_twice(backend, device):
    student, teacher = make_logits((3, 40), device=device)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, gradient="backward", backend=backend)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, once + once)
    for upstream in (1.0, 0.5):
        loss = distillation_loss(student, teacher, gradient="forward", backend=backend) * upstream
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="gradient='backward'"):
            loss.backward()


def test_second_derivative_is_an_error(backend, device):
    for gradient in ("forward", "backward"):
        student, teacher = make_logits((3, 40), device=device)
        student.requires_grad_()
        loss = distillation_loss(student, teacher, gradient=gradient, backend=backend)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.covering("divergence.operands n_cols")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("n_cols", [4096, 50257])
def test_same_bits_in_any_batch_position(divergence, n_cols):
    """Of the CPU path; the kernels hold it where rows are aligned, or in deterministic mode."""
    student, teacher = make_logits((7, n_cols))
    options = {"divergence": divergence, "reduction": "none"}
    together = run(distillation_loss, student, teacher, upstream_seed=None, **options)
    for rows in ([3], [6, 3], [0, 1, 2, 3, 4]):
        part = run(distillation_loss, student[rows], teacher[rows], upstream_seed=None, **options)
        assert torch.equal(part.loss, together.loss[rows])
        assert torch.equal(part.gradient, together.gradient[rows])


@pytest.mark.parametrize("n_cols", [48, 49])
def test_same_bits_in_any_batch_position_in_deterministic_mode(n_cols, backend, device):
    student, teacher = make_logits((7, n_cols), device=device)
    options = {"divergence": "jensen_shannon", "reduction": "none", "backend": backend}
    torch.use_deterministic_algorithms(True)
    try:
        together = run(distillation_loss, student, teacher, upstream_seed=None, **options)
        part = run(distillation_loss, student[3:5], teacher[3:5], upstream_seed=None, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(part.loss, together.loss[3:5])
    assert torch.equal(part.gradient, together.gradient[3:5])


def test_components_do_not_share_memory_with_the_loss(backend, device):
    student, teacher = make_logits((2, 7), device=device)
    result = distillation_loss(student, teacher, return_components=True, backend=backend)
    kept = result.divergence.clone()
    result.loss.div_(4)
    assert torch.equal(result.divergence, kept)


def test_same_bits_every_time(backend, device):
    student, teacher = make_logits((5, 3001), dtype=torch.bfloat16, device=device)
    first = run(distillation_loss, student, teacher, backend=backend)
    for _ in range(3):
        again = run(distillation_loss, student, teacher, backend=backend)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.gradient, first.gradient)
