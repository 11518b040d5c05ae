"""One description of an operator gives everything PyTorch needs: a toy's."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from distill_ops.operators import packing, register, transforms
from distill_ops.operators.register import LossOperator
from distill_ops.problem import BACKWARD, FORWARD, NO_GRADIENT


class Inputs(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor | None
    factors: list[torch.Tensor]


class Inner(NamedTuple):
    name: str
    share: float | None


class Options(NamedTuple):
    backend: str
    power: int
    dtype: torch.dtype | None
    numbers: tuple[float, ...]
    inner: Inner
    wide: bool


def weighted(inputs, options):
    result = inputs.x * options.numbers[0]
    for factor in inputs.factors:
        result = result * factor
    return result if inputs.weight is None else result * inputs.weight


def forward(inputs, options, plan, into=None):
    """``sum(a x**2)``, of which the gradient is ``2 a x``; and the number of entries."""
    scaled = weighted(inputs, options)
    loss, count = (scaled * inputs.x).sum(), torch.tensor(inputs.x.numel())
    if plan.made == FORWARD:
        if into is not None:
            into.copy_(2 * scaled)
        return (loss, count), (2 * scaled if into is None else into,)
    return (loss, count), (scaled if plan.made == BACKWARD else None,)


def gradient(inputs, options, plan, kept, upstreams, into=None):
    out = torch.empty_like(inputs.x) if into is None else into
    return (out.copy_(2 * kept[0] * upstreams[0]),)


def fake(inputs, options, plan):
    new = inputs.x.new_empty
    kept = None if plan.made == NO_GRADIENT else new(inputs.x.shape)
    return (new(()), new((), dtype=torch.int64)), (kept,)


@pytest.fixture(scope="module")
def toy():
    with mock.patch.object(
        register, "library", torch.library.Library("distill_ops_toy", "DEF")
    ) as library:
        operator = LossOperator(
            "toy", Inputs, Options, forward=forward, gradient=gradient, fake=fake, students=("x",),
            outputs=2, kept=1, inplace=True, namespace="distill_ops_toy",
        )  # fmt: skip
        yield operator
    del register.OPERATORS["toy"]
    library._destroy()


OPTIONS = Options("torch", 2, torch.bfloat16, (0.5, 3.0), Inner("a", None), True)


def inputs_of(x):
    return Inputs(x, torch.linspace(0.5, 2, 4), [torch.tensor(2.0)])


def call(toy, x, made=FORWARD, **others):
    return toy("toy_loss", inputs_of(x), OPTIONS, made, **others)[0]


def truth(x):
    return (x * x * torch.linspace(0.5, 2, 4)).sum()


def leaf():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_schema(toy):
    assert str(toy.op._schema) == (
        "distill_ops_toy::toy(Tensor x, Tensor? weight, Tensor[] factors, str[] choices, "
        "float[] numbers, SymInt[] sizes) -> (Tensor, Tensor, Tensor)"
    )
    assert "Tensor(a!) x" in str(toy.inplace_op._schema)


def test_options_come_back(toy):
    plan = register.Plan("toy_loss", FORWARD, (True, False))
    arguments = (*inputs_of(leaf()), *toy.packed(OPTIONS, plan))
    assert toy.unpacked(arguments)[1:3] == (OPTIONS, plan)


@pytest.mark.parametrize("made", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dispatched", [False, True])
def test_autograd(toy, dispatched, made):
    x, again = leaf(), leaf()
    with mock.patch.object(transforms, "dispatches", return_value=dispatched):
        loss = call(toy, x, made) * 3
        loss.backward()
    expected = truth(again) * 3
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, again.grad)


@pytest.mark.parametrize("made", [FORWARD, BACKWARD])
def test_in_place(toy, made):
    x, again = leaf(), leaf()
    logits = x * 1.0
    version = logits._version
    call(toy, logits, made, inplace=True).backward()
    assert logits._version > version
    truth(again).backward()
    torch.testing.assert_close(x.grad, again.grad)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_see_the_operator(toy):
    with Seen() as seen:
        call(toy, leaf(), BACKWARD).backward()
    assert {"distill_ops_toy.toy.default", "distill_ops_toy.toy_gradient.default"} <= seen.names


def test_fake_and_compile(toy):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: call(toy, x), fullgraph=True, backend="aot_eager")
    x, again = leaf(), leaf()
    compiled(x).backward()
    truth(again).backward()
    torch.testing.assert_close(x.grad, again.grad)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(toy, dim):
    """Over any dimension; the weight and the factors are not mapped."""
    x = torch.randn(4, 4, 4)
    mapped = torch.func.vmap(lambda x: call(toy, x, NO_GRADIENT), dim)(x)
    torch.testing.assert_close(mapped, torch.stack([truth(row) for row in x.unbind(dim)]))


@pytest.mark.parametrize("made", [FORWARD, BACKWARD])
def test_opcheck(toy, made):
    x = leaf()
    plan = toy.plan("toy_loss", [x], made)
    arguments = (*inputs_of(x), *toy.packed(OPTIONS, plan))
    torch.library.opcheck(toy.op, arguments)
    kept = toy.op(*arguments)[2].detach()
    arguments = (x.detach(), *arguments[1:])
    torch.library.opcheck(toy.gradient_op, (*arguments, kept, torch.tensor(0.5)))


def test_options_are_read_without_their_annotations(toy):
    """Reading the annotations takes longer than a small call: once, where the operator is made."""
    with (
        mock.patch.object(packing, "get_type_hints", side_effect=AssertionError),
        mock.patch.object(transforms, "dispatches", return_value=True),
    ):
        call(toy, leaf(), BACKWARD).backward()


@pytest.mark.parametrize("made", [FORWARD, BACKWARD])
def test_in_place_goes_around_the_dispatcher(toy, made):
    with mock.patch.object(LossOperator, "packed", side_effect=AssertionError):
        call(toy, leaf() * 1.0, made, inplace=True).backward()


def test_one_output_and_nothing_kept(toy):
    """Such an operator returns its result alone, and not in a tuple."""

    class Alone(NamedTuple):
        x: torch.Tensor

    class Few(NamedTuple):
        backend: str

    operator = LossOperator(
        "toy_of_one", Alone, Few, students=("x",), namespace="distill_ops_toy",
        forward=lambda inputs, options, plan: (((inputs.x**2).sum(),), ()),
        gradient=lambda inputs, options, plan, kept, upstreams: (2 * inputs.x * upstreams[0],),
        fake=lambda inputs, options, plan: ((inputs.x.new_empty(()),), ()),
    )  # fmt: skip
    x = leaf()
    with mock.patch.object(transforms, "dispatches", return_value=True):
        (loss,) = operator("toy_of_one", Alone(x), Few("torch"), BACKWARD)
        loss.backward()
    del register.OPERATORS["toy_of_one"]
    torch.testing.assert_close(loss, (x**2).sum())
    torch.testing.assert_close(x.grad, 2 * x)


def test_errors_name_the_function(toy):
    x = leaf()
    with pytest.raises(RuntimeError, match="toy_loss has no second derivative"):
        torch.autograd.grad(call(toy, x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="toy_loss cannot be differentiated"):
        torch.func.grad(lambda x: call(toy, x))(x.detach())
    loss = call(toy, x) * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"toy_loss was called .*gradient='backward'"):
        loss.backward()
