"""The operators of the statistics, with coefficients and without, inside PyTorch's mechanisms."""

import pytest
import torch

import distill_ops
from distill_ops import SymmetricKL
from distill_ops.api import choices
from distill_ops.operators import transforms
from tests.support.forms import FORMS, N, tensors_of
from tests.support.operators import call_of, opcheck_of_the_gradient, opcheck_of_the_loss

FUNCTIONS = "distillation_statistics", "linear_distillation_statistics"
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def factors(device="cpu", seed=5):
    """A tensor of one a token, a number and a 0-d tensor."""
    values = torch.randn(N, generator=torch.Generator().manual_seed(seed)).to(device)
    return values, -0.7, torch.tensor(0.3, device=device)


def arguments_of(name, device, dtype=torch.float32, seed=0):
    """Tensors of a function, those that are positional and the others; the students are leaves."""
    form = FORMS[name]
    tensors = {
        key: (x.to(dtype) if x.is_floating_point() else x).to(device)
        for key, x in tensors_of(name, seed).items()
    }
    for key in form.students:
        tensors[key].requires_grad_()
    return tensors, [tensors[key] for key in form.positional], {k: tensors[k] for k in form.named}


OPCHECKS = {  # function, whether with coefficients, dtype: of float16 the backward makes the gradient
    "linear": (FUNCTIONS[1], False, torch.float32),
    "loss": (FUNCTIONS[0], True, torch.float32),
    "linear loss": (FUNCTIONS[1], True, torch.float32),
    "linear float16 loss": (FUNCTIONS[1], True, torch.float16),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case, backend, device):
    name, given, dtype = OPCHECKS[case]
    _, positional, named = arguments_of(name, device, dtype)
    options = named | {"divergence": SymmetricKL(torch.full((N,), 0.3, device=device))}
    options |= {"coefficients": factors(device) if given else None, "backend": backend}
    function = getattr(distill_ops, name)
    opcheck_of_the_loss(function, *positional, **options)
    if not given or dtype == torch.float16:
        opcheck_of_the_gradient(function, *positional, **options)


@each_function
def test_the_loss_alone_is_differentiable(name):
    """Where the forward makes the gradient, which is the loss's."""
    _, positional, named = arguments_of(name, "cpu")
    call = call_of(getattr(distill_ops, name), *positional, coefficients=factors(), **named)
    loss, *others = call.operator.op(*call.arguments())
    assert loss.requires_grad
    assert not any(x.requires_grad for x in others)


@each_function
def test_compile_without_a_break(name, backend, device):
    given, results = factors(device), []

    def call(positional, named, values):
        loss, found = getattr(distill_ops, name)(
            *positional, coefficients=(values, *given[1:]), backend=backend, **named
        )
        return 3.0 * loss, found

    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        tensors, positional, named = arguments_of(name, device)
        loss, found = function(positional, named, given[0])
        assert not any(x.requires_grad for x in found)
        loss.backward()
        results.append([loss.detach(), *found, *(tensors[k].grad for k in FORMS[name].students)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@each_function
def test_vmap_over_problems_and_their_coefficients(name, device):
    """Without a gradient; the ids are a fact of all."""
    each = [arguments_of(name, device, seed=seed)[0] for seed in (0, 1)]
    for tensors in each:
        tensors["token_ids"] = each[0]["token_ids"]
    batches = {key: torch.stack([x[key].detach() for x in each]) for key in each[0]}
    values = torch.stack([factors(device, seed)[0] for seed in (5, 6)])
    form, rest = FORMS[name], factors(device)[1:]

    def call(tensors, values):
        given = [tensors[key] for key in form.positional]
        named = {key: tensors[key] for key in form.named}
        loss, found = form.function(*given, coefficients=(values, *rest), **named)
        return loss, found.divergence

    mapped = torch.func.vmap(call)(batches, values)
    looped = [
        call({k: x.detach() for k, x in tensors.items()}, v)
        for tensors, v in zip(each, values, strict=True)
    ]
    for one, others in zip(mapped, zip(*looped, strict=True), strict=True):
        assert torch.equal(one, torch.stack(others))


@each_function
@pytest.mark.parametrize("given", ["plain", "coefficients"])
def test_nothing_is_read_on_the_host(name, given, monkeypatch):
    """From the public function to the gradients, on tensors without values; what is launched."""
    pytest.importorskip("triton")
    from distill_ops.analysis import aot
    from tests.interface.test_no_sync import ComputingOperations, let_values_be_read

    let_values_be_read(monkeypatch)
    monkeypatch.setattr(choices, "INTERPRETED", True)  # the Triton path without a GPU
    monkeypatch.setattr(transforms, "dispatches", lambda *_: False)
    tensors, positional, named = arguments_of(name, "meta", torch.bfloat16)

    def call():
        coefficients = factors("meta") if given == "coefficients" else None
        found = getattr(distill_ops, name)(
            *positional, coefficients=coefficients, backend="triton", **named
        )
        loss = found[0] if coefficients else sum(x.sum() for x in found[:4])
        (0.5 * loss).backward()

    with ComputingOperations() as computing:
        launches = [x.kernel.__name__ for x in aot.record(call, aot.TARGETS["sm_90"].facts)]
    linear = name.startswith("linear")
    formed = ["finish_kernel"] * 2 * linear  # the biases of both heads
    if given == "coefficients":
        n_gradients = len(FORMS[name].students)
        assert launches == formed + ["statistics_kernel"] * 2 + ["scale_kernel"] * n_gradients
    else:
        assert launches == (formed + ["statistics_kernel"]) * 2
    products = [x for x in computing.names if x.startswith(("aten::mm", "aten::addmm"))]
    assert len(products) == linear * (4 if given == "coefficients" else 6)
    for key in FORMS[name].students:
        assert tensors[key].grad.shape == tensors[key].shape
