"""Tensors made under inference mode have no version: a change between forward and backward is nobody's
to notice, so a backward never meets one."""

import pytest
import torch

from distill_ops import JensenShannon, distillation_loss
from tests.support.forms import FORMS, HEADS, LOGITS, LOSSES, tensors_of

# too large to copy: what a backward reads again is refused
WIDE = set(LOGITS) | set(HEADS) | {"logits", "hidden", "weight"}
CASES = [
    (form, name, made)
    for form, call in FORMS.items()
    for name in tensors_of(form)
    for made in (("backward",) if call.of_token else ("forward", "backward"))
    if call.students != (name,)  # without a student there is no backward
]


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


def change(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.copy_(tensor.flip(0))


def gradients_after_a_change(form, name: str, **options) -> tuple[list, list]:
    """Of a call whose tensor ``name`` changes before the backward, and as they should be."""
    tensors = tensors_of(form)
    expected = FORMS[form].gradients(tensors, **options)
    changed = inference(tensors[name])
    leaves = {x: tensors[x].clone().requires_grad_() for x in FORMS[form].students if x != name}
    loss = FORMS[form]({**tensors, **leaves, name: changed}, **options)
    change(changed)
    loss.sum().backward()
    names = FORMS[form].students
    return [leaves[x].grad for x in leaves], [
        gradient for x, gradient in zip(names, expected, strict=True) if x != name
    ]


@pytest.mark.parametrize(("form", "name", "made"), CASES)
def test_a_change_before_the_backward(form, name, made):
    """Nothing of the gradient is of the changed tensor: it is copied, or not taken."""
    options = {} if FORMS[form].of_token else {"gradient": made, "hard_label_weight": 0.3}
    # of a mixture, the weight is one number a token, and the teacher's log-probabilities are constant;
    # on a support, the teacher's logits are read by the forward alone
    small = form == "mixture_token_log_probs" and name == "teacher_weight"
    gathered = form in ("mixture_token_log_probs", "support_distillation_loss")
    gathered = gathered and name == "teacher_logits"
    if made == "backward" and name in WIDE and not (small or gathered):
        with pytest.raises(ValueError, match=f"^{name} was made under .*torch.no_grad.*'forward'"):
            gradients_after_a_change(form, name, **options)
        return
    found, expected = gradients_after_a_change(form, name, **options)
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("inplace", [False, True])
def test_parameters_and_normalizer(inplace):
    student, teacher = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(1))
    beta, normalizer = torch.tensor([0.1, 0.2, 0.7, 0.4]), torch.tensor(3.0)

    def gradient(beta, normalizer, then=lambda: None):
        leaf = student.clone().requires_grad_()
        loss = distillation_loss(
            leaf * 1, teacher, divergence=JensenShannon(beta), normalizer=normalizer,
            gradient="backward", inplace=inplace,
        )  # fmt: skip
        then()
        loss.backward()
        return leaf.grad

    expected = gradient(beta, normalizer)
    beta, normalizer = inference(beta), inference(normalizer)

    def then():
        change(beta)
        with torch.inference_mode():
            normalizer.add_(1)

    assert torch.equal(gradient(beta, normalizer, then), expected)


@pytest.mark.parametrize("form", LOSSES)
def test_everything_is_taken_where_the_forward_makes_the_gradient(form):
    tensors = tensors_of(form)
    expected = FORMS[form].gradients(tensors, gradient="forward")
    leaves = {x: tensors[x].clone().requires_grad_() for x in FORMS[form].students}
    others = {name: inference(x) for name, x in tensors.items() if name not in leaves}
    loss = FORMS[form]({**others, **leaves}, gradient="forward")
    for tensor in others.values():
        change(tensor)
    loss.backward()
    for leaf, gradient in zip(leaves.values(), expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_without_a_gradient_everything_is_taken():
    for form, call in FORMS.items():
        tensors = tensors_of(form)
        found = call({name: inference(x) for name, x in tensors.items()})
        assert torch.equal(found, call(tensors))
