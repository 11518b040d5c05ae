"""The operators of the token functions inside PyTorch's mechanisms."""

import pytest
import torch

import distill_ops
from distill_ops import SymmetricKL
from tests.support.helpers import make_ids, make_logits
from tests.support.operators import opcheck_of_the_gradient, opcheck_of_the_loss

FUNCTIONS = {
    "token_log_probs": lambda s, t, ids, **options: distill_ops.token_log_probs(s, ids, **options),
    "distillation_statistics": lambda s, t, ids, **options: (
        distill_ops.distillation_statistics(s, t, ids, **options).student_entropy
    ),
    "mixture_token_log_probs": lambda s, t, ids, **options: distill_ops.mixture_token_log_probs(
        s, t, ids, 0.3, **options
    ),
}
each_function = pytest.mark.parametrize("function", list(FUNCTIONS.values()), ids=FUNCTIONS)


@each_function
def test_a_second_backward_and_no_second_derivative(function, backend, device):
    student, teacher = make_logits((3, 40), device=device)
    ids = make_ids((3,), 40, device=device)
    leaf = student.requires_grad_()
    result = function(leaf, teacher, ids, backend=backend).sum()
    (first,) = torch.autograd.grad(result, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(result, leaf, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(result, leaf, create_graph=True)


@each_function
def test_compile_without_a_break(function, backend, device):
    student, teacher = make_logits((3, 40), device=device)
    ids = make_ids((3,), 40, device=device)
    call = lambda s: function(s, teacher, ids, backend=backend).sum()
    grads = []
    for made in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        made(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_ids_made_under_inference_mode(backend, device):
    """A rollout's: they cannot be saved for the backward, and cannot change either."""
    student, teacher = make_logits((3, 40), device=device)
    with torch.inference_mode():
        ids = make_ids((3,), 40, device=device)
    for function in FUNCTIONS.values():
        leaf = student.clone().requires_grad_()
        function(leaf, teacher, ids, backend=backend).sum().backward()
        assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["token_log_probs", "distillation_statistics"])
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(name, keep, backend, device):
    student, teacher = make_logits((3, 40), device=device)
    student.requires_grad_(keep)
    options = {"temperature": 1.5, "backend": backend}
    if name == "token_log_probs":
        arguments, options["return_entropy"] = [student], True
    else:
        arguments = [student, teacher]
        options["divergence"] = SymmetricKL(torch.full((3,), 0.3, device=device))
    call = getattr(distill_ops, name), *arguments, make_ids((3,), 40, device=device)
    opcheck_of_the_loss(*call, **options)
    if keep:
        opcheck_of_the_gradient(*call, **options)
