"""The top-k loss's operators inside PyTorch's mechanisms."""

import pytest
import torch
import torch._dynamo.testing

from tests.support.cases import FLOAT_MASK, LABELS, TOKENS
from tests.support.helpers import assert_compiled_equals_eager, make_logits, moved, run, topk_of
from tests.support.operators import call_of, opcheck_of_the_gradient, opcheck_of_the_loss

pytest.importorskip("triton")

from distill_ops import ForwardKL, JensenShannon, SkewForwardKL, topk_distillation_loss

OPTIONS = {
    "forward": {},
    "backward": {"gradient": "backward", "tail": "ignore"},
    "none": {"reduction": "none"},
    "mask": {"loss_mask": FLOAT_MASK},
    "hard": {"labels": LABELS, "hard_label_weight": 0.5, "return_components": True},
    "normalizer": {"normalizer": torch.tensor(7.0)},
    "parameters": {"divergence": JensenShannon(torch.full(TOKENS, 0.3))},
    "drop": {
        "divergence": ForwardKL(), "tail": "drop", "mass_terms": True, "log_prob_floor": -9.0,
    },
}  # fmt: skip


def make_topk(shape=(*TOKENS, 33), k=5, device="cpu"):
    student, teacher = make_logits(shape, device=device)
    return student, *topk_of(teacher, k)


@pytest.mark.covering("option", "backend")
@pytest.mark.parametrize("option", OPTIONS)
def test_opcheck_of_the_loss(option, backend, device):
    options = moved(OPTIONS[option], device)
    if "divergence" in options:
        options["divergence"] = options["divergence"].map_tensors(lambda x: x.to(device))
    student, *others = make_topk(device=device)
    student.requires_grad_()
    opcheck_of_the_loss(topk_distillation_loss, student, *others, backend=backend, **options)


def test_opcheck_of_the_gradient(backend, device):
    student, *others = make_topk(device=device)
    student.requires_grad_()
    options = {"gradient": "backward", "backend": backend}
    opcheck_of_the_gradient(topk_distillation_loss, student, *others, **options)


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_equals_eager(option):
    student, log_p, ids = make_topk()
    options = {"divergence": "reverse_kl", "teacher_ids": ids, **OPTIONS[option]}
    assert_compiled_equals_eager(topk_distillation_loss, student, log_p, **options)


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(topk_distillation_loss, fullgraph=True, dynamic=True, backend=counter)
    for shape, k in [((4, 33), 5), ((7, 50), 8), ((5, 41), 6)]:
        arguments = make_topk(shape, k)
        torch.testing.assert_close(compiled(*arguments), topk_distillation_loss(*arguments))
    assert counter.frame_count == 1


def test_a_changed_parameter_tensor_compiles_no_graph():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, p, i, a: topk_distillation_loss(s * 1.0, p, i, divergence=SkewForwardKL(a)),
        fullgraph=True, backend=counter,
    )  # fmt: skip
    arguments = make_topk((4, 33))
    for alpha in (0.1, 0.3, 0.6):
        alpha = torch.tensor(alpha)
        expected = topk_distillation_loss(*arguments, divergence=SkewForwardKL(alpha))
        torch.testing.assert_close(compiled(*arguments, alpha), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint(reentrant):
    student, log_p, ids = make_topk()

    def checkpointed(student, log_p):
        return torch.utils.checkpoint.checkpoint(
            lambda s: topk_distillation_loss(s * 2.0, log_p, ids), student, use_reentrant=reentrant
        )

    plain = lambda s, log_p: topk_distillation_loss(s * 2.0, log_p, ids)
    ours, expected = run(checkpointed, student, log_p), run(plain, student, log_p)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.gradient, expected.gradient)


def test_second_backward_and_second_derivative(backend, device):
    student, *others = make_topk(device=device)
    student.requires_grad_()
    loss = topk_distillation_loss(student, *others, gradient="backward", backend=backend)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, once + once)
    loss = topk_distillation_loss(student, *others, gradient="forward", backend=backend) * 0.5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"topk_distillation_loss.*gradient='backward'"):
        loss.backward()
    for gradient in ("forward", "backward"):
        loss = topk_distillation_loss(student, *others, gradient=gradient, backend=backend)
        with pytest.raises(RuntimeError, match="topk_distillation_loss has no second derivative"):
            torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.covering("divergence tail", "option")
@pytest.mark.parametrize("option", ["forward", "mask", "hard"])
@pytest.mark.parametrize("tail", ["bucket", "ignore", "restrict", "drop"])
@pytest.mark.parametrize("divergence", ["jensen_shannon", "reverse_kl", "alpha_beta"])
def test_the_gradient_may_be_the_student_s_memory(divergence, tail, option, backend, device):
    """As a linear form calls it, on blocks of logits that it made."""
    options = {**moved(OPTIONS[option], device), "divergence": divergence, "tail": tail}
    student, *others = make_topk(device=device)
    options["gradient"] = "forward"
    student.requires_grad_()
    call = call_of(topk_distillation_loss, student, *others, backend=backend, **options).detached()
    (loss, *_), (gradient, *_) = call.results()
    inputs = call.inputs._replace(student=call.inputs.student.clone())
    (again, *_), _ = call.operator.forward(inputs, *call[2:], into=inputs.student)
    assert torch.equal(again, loss)
    assert torch.equal(inputs.student, gradient)
