"""What PyTorch puts around a call: fakes, tracing, vmap of new and of old, derivatives that cannot be.

Every function gives the right numbers there, or one error that names it."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import distill_ops
from distill_ops import distillation_loss, distillation_metrics, reference, teacher_topk
from tests.support.forms import FORMS, LOSSES, function_of, tensors_of
from tests.support.helpers import make_logits

# as they are, a gradient a token, and made by the backward
WAYS = [(form, {}) for form in FORMS]
WAYS += [(form, {"reduction": "none", "gradient": "backward"}) for form in LOSSES]
each_way = pytest.mark.parametrize(("form", "options"), WAYS, ids=str)
each_form = pytest.mark.parametrize("form", FORMS)


def leaves_of(form: str, tensors: dict) -> dict:
    return {name: tensors[name].detach().requires_grad_() for name in FORMS[form].students}


def with_gradients(form: str, tensors: dict, **options) -> tuple[torch.Tensor, ...]:
    leaves = leaves_of(form, tensors)
    found = FORMS[form]({**tensors, **leaves}, **options)
    return found, *torch.autograd.grad(found.sum(), leaves.values())


def of_student(form: str, tensors: dict, **options):
    """A function of one student, and the student."""
    name = FORMS[form].students[-1]
    return lambda x: FORMS[form]({**tensors, name: x}, **options), tensors[name]


@each_way
def test_tensors_without_values(form, options):
    """On the meta device and in FakeTensorMode: shapes and dtypes as of real ones."""
    tensors = tensors_of(form)
    expected = [(x.shape, x.dtype) for x in with_gradients(form, tensors, **options)]
    on_meta = {name: x.to("meta") for name, x in tensors.items()}
    found = with_gradients(form, on_meta, **options)
    assert [(x.shape, x.dtype) for x in found] == expected
    assert all(x.is_meta for x in found)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in tensors.items()}
        found = with_gradients(form, fake, **options)
        assert [(x.shape, x.dtype) for x in found] == expected
    outside = FORMS[form](fake, **options)  # the tensors are fake, the mode is off
    assert (outside.shape, outside.dtype) == expected[0]


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@each_way
def test_make_fx(form, options, tracing_mode):
    """The graph gives the loss and the gradients of other tensors than it was traced with."""
    tensors, others = tensors_of(form), tensors_of(form, seed=1)

    def function(*given):
        return with_gradients(form, dict(zip(tensors, given, strict=True)), **options)

    graph = make_fx(function, tracing_mode=tracing_mode)(*tensors.values())
    assert any("distill_ops" in str(node.target) for node in graph.graph.nodes)
    found = graph(*others.values())
    for one, other in zip(found, with_gradients(form, others, **options), strict=True):
        torch.testing.assert_close(one, other)


def test_functions_without_a_gradient_are_traced():
    student, teacher = make_logits((4, 11))
    for function in (distillation_metrics, lambda _, teacher: teacher_topk(teacher, 3)):
        graph = make_fx(lambda *pair, f=function: tuple(f(*pair)))(student, teacher)
        for one, other in zip(graph(teacher, student), function(teacher, student), strict=True):
            assert torch.equal(one, other)
        assert function(student.to("meta"), teacher.to("meta"))[0].is_meta


@each_form
def test_functionalized(form):
    call, student = of_student(form, tensors_of(form))
    assert torch.equal(torch.func.functionalize(call)(student), call(student))


@each_way
def test_vmap(form, options):
    """Independent problems, without a gradient."""
    if "gradient" in options:
        options = {"reduction": "none"}
    each = [tensors_of(form, seed) for seed in (0, 1, 2)]
    for tensors in each[1:]:  # a label is a fact of all of them
        tensors.update({name: x for name, x in each[0].items() if not x.is_floating_point()})
    batches = [torch.stack([tensors[name] for tensors in each]) for name in each[0]]
    mapped = torch.func.vmap(lambda *x: FORMS[form](dict(zip(each[0], x, strict=True)), **options))
    looped = [FORMS[form](tensors, **options) for tensors in each]
    assert torch.equal(mapped(*batches), torch.stack(looped))


@pytest.mark.parametrize("form", [form for form in FORMS if len(FORMS[form].students) > 1])
def test_vmap_of_one_student_beside_another(form):
    """One that is mapped hides that it requires grad, whatever the others show."""
    tensors = tensors_of(form)
    leaves = leaves_of(form, {k: x.clone() for k, x in tensors.items()})
    first, *others = leaves
    batch = torch.stack([tensors[first]] * 2).requires_grad_()
    call = lambda x: FORMS[form]({**tensors, **leaves, first: x}).sum()
    words = f"^{function_of(form)} makes no gradient under torch.func"
    with pytest.raises(RuntimeError, match=words):
        torch.func.vmap(call)(batch)
    torch.func.vmap(call)(batch.detach()).sum().backward()  # of the others alone
    FORMS[form]({**tensors, **leaves}).sum().backward()
    for name in others:
        torch.testing.assert_close(
            leaves[name].grad / 3, with_gradients(form, tensors)[1 + list(leaves).index(name)]
        )


def test_vmap_of_an_empty_batch():
    call, student = of_student("distillation_loss", tensors_of("distillation_loss"))
    with pytest.raises(ValueError, match="needs a batch that is not empty"):
        torch.func.vmap(call)(student[None][:0])


def test_vmap_of_metrics():
    student, teacher = make_logits((2, 4, 33))
    mapped = torch.func.vmap(distillation_metrics)(student, teacher)
    looped = [distillation_metrics(*pair) for pair in zip(student, teacher, strict=True)]
    for field, parts in zip(mapped, zip(*looped, strict=True), strict=True):
        assert torch.equal(field, torch.stack(parts))


@each_way
def test_vmap_makes_no_gradient(form, options):
    call, student = of_student(form, tensors_of(form), **options)
    batch = torch.stack([student, student]).requires_grad_()
    with pytest.raises(
        RuntimeError, match=f"^{function_of(form)} makes no gradient under torch.func transforms"
    ):
        torch.func.vmap(call)(batch)


@each_way
def test_a_batch_of_upstreams(form, options):
    """autograd's own vmap, of ``is_grads_batched`` and ``jacobian(vectorize=True)``, is not torch.func's."""
    call, student = of_student(form, tensors_of(form), **options)
    at_once = jacobian(call, student, vectorize=True)
    assert at_once.shape == (*call(student).shape, *student.shape)
    assert torch.equal(at_once, jacobian(call, student))


def test_a_batch_of_upstreams_with_parameters():
    student, teacher = make_logits((4, 33))
    divergence = distill_ops.JensenShannon(torch.tensor([0.1, 0.3, 0.5, 0.7]))
    of = lambda function: partial(
        function, teacher_logits=teacher, divergence=divergence, reduction="none"
    )
    at_once = jacobian(of(distillation_loss), student, vectorize=True)
    torch.testing.assert_close(at_once, jacobian(of(reference.distillation_loss), student))


@pytest.mark.parametrize("made", ["forward", "backward"])
def test_one_gradient_in_place(made):
    student, teacher = make_logits((4, 33))
    call = lambda s: distillation_loss(s * 1, teacher, inplace=True, gradient=made)
    with pytest.raises(NotImplementedError, match=r"^distillation_loss with inplace=True has one"):
        jacobian(call, student, vectorize=True)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="^distillation_loss cannot be differ"):
            transform(call)(student)


@each_form
def test_derivatives_that_cannot_be(form):
    """Each error names the function, and a reference that exists."""
    call, student = of_student(form, tensors_of(form))
    loss_of = lambda x: call(x).sum()
    refused = pytest.raises(
        NotImplementedError, match=f"^{function_of(form)} cannot be differentiated"
    )
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with refused as caught:
            transform(loss_of)(student)
    with refused:
        torch.func.vmap(torch.func.grad(loss_of))(torch.stack([student, student]))
    with refused:
        torch.func.vjp(loss_of, student)
    for forward in (
        lambda: torch.func.jvp(loss_of, (student,), (student,)),
        lambda: torch.func.jacfwd(loss_of)(student),
        lambda: torch.func.linearize(loss_of, student),
    ):
        with pytest.raises(
            NotImplementedError, match=f"^{function_of(form)} (has no forward|cannot be diff)"
        ):
            forward()
    with pytest.raises(RuntimeError, match=f"^{function_of(form)} has no second derivative"):
        torch.autograd.functional.hessian(loss_of, student)
    advised = str(caught.value).split("distill_ops.reference.")[1].split(" ")[0]
    assert hasattr(reference, advised)


def test_the_reference_under_transforms():
    """What the errors advise works, whatever of its arguments is mapped."""
    tensors = tensors_of("topk_distillation_loss")
    student, log_probs, ids = list(tensors.values())[:3]
    loss_of = partial(
        reference.topk_distillation_loss, reduction="sum"
    )  # a mean asks for its tokens
    loss = lambda s: loss_of(s, log_probs, ids)
    hessian = torch.func.hessian(loss)(student)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, student))
    functional = torch.func.functionalize(loss_of)
    assert torch.equal(functional(student, log_probs, ids), loss(student))
    for tracing_mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda s, p, i: loss_of(s, p, i), tracing_mode=tracing_mode)
        assert torch.equal(graph(student, log_probs, ids)(student, log_probs, ids), loss(student))
    teacher, masks = student.flip(0), torch.rand(5, 4)
    of_mask = lambda m: reference.distillation_loss(student, teacher, loss_mask=m, reduction="sum")
    each = torch.stack([of_mask(mask) for mask in masks])
    torch.testing.assert_close(torch.func.vmap(of_mask)(masks), each)


class Watching(torch.Tensor):
    """A tensor around another, whose class sees the operators that are called on it."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        cls.seen.append(function.name())
        inner = lambda x: x.inner if isinstance(x, cls) else x
        return function(*tree_map(inner, arguments), **(options or {}))


def test_a_tensor_class_sees_the_backward_of_a_plain_upstream():
    student, teacher = make_logits((4, 33))
    student = Watching(student).requires_grad_()
    Watching.seen.clear()
    loss = distillation_loss(student, teacher, gradient="backward")
    loss.backward(torch.ones(()))
    assert "distill_ops::dense_loss_gradient" in Watching.seen


class Counting(TorchDispatchMode):
    """A mode that changes nothing, as profilers are."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@each_form
def test_a_mode_that_only_looks(form):
    """The same bits, and labels are still checked."""
    tensors = tensors_of(form)
    expected = with_gradients(form, tensors)
    with Counting():
        found = with_gradients(form, tensors)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        ids = next(name for name in ("labels", "token_ids") if name in tensors)
        hard = {"hard_label_weight": 0.5} if ids == "labels" else {}
        with pytest.raises(ValueError, match=f"^{ids} must lie in"):
            FORMS[form]({**tensors, ids: tensors[ids] + 11}, **hard)
