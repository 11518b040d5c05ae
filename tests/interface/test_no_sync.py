"""Nothing waits for the GPU: the whole host code runs on tensors whose values nobody can read.

Fake CUDA tensors raise where a value is wanted (``.item()``, ``bool()``, a boolean index), take the
branches of a GPU, and need none; the kernels are replaced by recorders. They cannot carry autograd
in a CPU build of PyTorch, so the way through it runs once more on ``meta`` tensors, which raise too.
On a GPU, ``test_gpu.py`` asks CUDA itself.
"""

import contextlib
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import distill_ops
from distill_ops import (
    AlphaBeta,
    JensenShannon,
    SymmetricKL,
    differentiation,
    distillation_loss,
    losses,
    metrics,
    ops,
    topk,
    topk_distillation_loss,
    topk_ops,
)
from tests.support.cases import DIVERGENCES, KINDS, OPTIONS, TOKENS
from tests.support.helpers import make_logits

pytest.importorskip("triton")

from distill_ops.analysis import aot

FACTS = aot.TARGETS["sm_90"].facts
MODES = (ops.NO_GRADIENT, ops.FORWARD, ops.BACKWARD)
N_COLS = 33


def index(x, key):
    """``x[key]`` by operators."""
    keys = key if isinstance(key, tuple) else (key,)
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys = (*keys[:at], *(slice(None),) * (x.dim() - len(keys) + 1), *keys[at + 1 :])
    dim = 0
    for k in keys:
        if isinstance(k, slice):
            x = torch.ops.aten.slice.Tensor(
                x, dim, k.start, k.stop, 1 if k.step is None else k.step
            )
            dim += 1
        elif isinstance(k, torch.Tensor):
            if k.dtype == torch.bool:
                (k,) = torch.ops.aten.nonzero(k).unbind(-1)
            x = torch.ops.aten.index.Tensor(x, [None] * dim + [k])
            dim += 1
        elif k is None:
            x = x.unsqueeze(dim)
            dim += 1
        else:
            x = x.select(dim, k)
    return x


class WithoutDeviceGuard(TorchFunctionMode):
    """Some methods make the tensor's device the current one in C++, before any operator is called;
    a CPU build of PyTorch knows no GPU. Their operators alone do without."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return index(*args)
        if function is torch.Tensor.__float__:
            return args[0].item()
        if function is torch.Tensor.nonzero:
            return torch.ops.aten.nonzero(*args)
        if function is torch.Tensor.contiguous and not args[0].is_contiguous():
            return args[0].clone(memory_format=torch.contiguous_format)
        return args[0] if function is torch.Tensor.contiguous else function(*args, **(kwargs or {}))


class ComputingOperations(TorchDispatchMode):
    """Notes PyTorch's operations but for allocations and views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, returns = function.name(), function._schema.returns
        aliases = [r.alias_info for r in returns]
        view = aliases and all(alias is not None and not alias.is_write for alias in aliases)
        harmless = ("aten::empty", "aten::new_empty", "aten::promote_types", "prim::")
        if not (view or name.startswith(harmless)):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def unreadable(value, device):
    """A tensor like ``value`` without memory; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=device)


def arguments_on(device, option, dtype=torch.bfloat16):
    options = {name: unreadable(value, device) for name, value in OPTIONS[option].items()}
    student, teacher = (unreadable(x, device) for x in make_logits((*TOKENS, N_COLS), dtype=dtype))
    return student, None if options.get("hard_label_weight") == 1 else teacher, options


@pytest.fixture
def fake_gpu(monkeypatch):
    """Inside, ``device="cuda"`` makes fake tensors, and operators run as on plain ones."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(losses, "dense_loss", ops.dense_loss)
    with FakeTensorMode(), WithoutDeviceGuard():
        yield


def launches_of(monkeypatch, module, operators, call, mode):
    """What a call and its backward launch, lists of the kernels' names; and PyTorch's operations.

    ``operators``: where ``module`` has its differentiable operator, the loss and gradient without
    autograd, and how many arguments these share."""
    name, loss, gradient, n_shared = operators
    captured = []

    def operator(*arguments):
        captured.append((arguments, loss(*arguments)))
        return captured[0][1]

    monkeypatch.setattr(module, name, operator)
    monkeypatch.setattr(module, "gradient_mode", lambda *_: mode)

    def backward():
        arguments, (result, _, kept) = captured[0]
        upstream = torch.empty(result.shape, device="cuda")
        if mode == ops.BACKWARD:
            gradient(*arguments[:n_shared], kept, upstream)
        elif mode == ops.FORWARD:
            differentiation.scale_(kept, upstream, "triton")

    with ComputingOperations() as computing:
        launches = [aot.record(part, FACTS) for part in (call, backward)]
    names = [[launch.kernel.__name__ for launch in made] for made in launches]
    return *names, computing.names


def fake_calls(monkeypatch, option, mode, **more):
    """:func:`launches_of` the dense loss with an option."""
    student, teacher, options = arguments_on("cuda", option)
    operators = ("dense_loss", ops.dense_loss, ops.dense_gradient, ops.N_SHARED)
    call = lambda: distillation_loss(student, teacher, **options, **more)
    return launches_of(monkeypatch, losses, operators, call, mode)


# a gradient of "none" made in the forward is refused: the incoming gradients are not known
CASES = [
    (option, mode)
    for option, options in OPTIONS.items()
    for mode in MODES
    if not (mode == ops.FORWARD and options.get("reduction") == "none")
]


def expected_launches(kernel, option, mode):
    """Of the forward and of the backward: what a form's kernel is launched between."""
    forward = ["weights_kernel"] if {"loss_mask", "labels"} & set(OPTIONS[option]) else []
    forward.append(kernel)
    if OPTIONS[option].get("reduction") != "none":
        forward.append("total_kernel")
    return forward, {ops.NO_GRADIENT: [], ops.FORWARD: ["scale_kernel"], ops.BACKWARD: [kernel]}[
        mode
    ]


@pytest.mark.parametrize(("option", "mode"), CASES)
def test_nothing_is_read_on_the_host(option, mode, fake_gpu, monkeypatch):
    """... and no kernel of PyTorch's runs: at most three launches forward, and one backward."""
    for divergence in KINDS:
        forward, backward, computing = fake_calls(monkeypatch, option, mode, divergence=divergence)
        assert (forward, backward) == expected_launches("dense_kernel", option, mode)
        assert computing == []


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_for_components(mode, fake_gpu, monkeypatch):
    for option in ("hard", "hard_masked", "hard_only", "hard_temperature"):
        *_, computing = fake_calls(monkeypatch, option, mode, return_components=True)
        assert computing == []


@pytest.mark.parametrize("view", [lambda x: x[:, 1:], lambda x: x[..., 1:], lambda x: x.mT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_is_read_of_views(view, dtype, fake_gpu):
    student = view(torch.empty(4, 6, 6, dtype=dtype, device="cuda"))
    aot.record(lambda: distillation_loss(student, student), FACTS)


PARAMETERS = {
    "0-d": lambda device: JensenShannon(torch.empty((), device=device)),
    "per token": lambda device: SymmetricKL(torch.empty(TOKENS, device=device)),
    "one of two": lambda device: AlphaBeta(0.5, torch.empty(TOKENS, device=device)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_nothing_is_read_of_parameters(parameters, mode, fake_gpu, monkeypatch):
    divergence = PARAMETERS[parameters]("cuda")
    forward, _, computing = fake_calls(monkeypatch, "float_mask", mode, divergence=divergence)
    assert len(forward) == 3
    assert computing == []


def test_nothing_is_read_for_metrics(fake_gpu, monkeypatch):
    monkeypatch.setattr(metrics, "metrics_op", metrics._metrics)  # not its fake
    student, teacher, _ = arguments_on("cuda", "plain")
    with ComputingOperations() as computing:
        launches = aot.record(lambda: distill_ops.distillation_metrics(student, teacher), FACTS)
    assert [launch.kernel.__name__ for launch in launches] == ["metrics_kernel"]
    assert computing.names == []


def fake_topk_calls(monkeypatch, option, mode, **more):
    """:func:`launches_of` the top-k loss with an option."""
    student, _, options = arguments_on("cuda", option)
    teacher = [torch.empty(*TOKENS, 5, device="cuda"), torch.empty(*TOKENS, 5, device="cuda").int()]
    operators = (
        "differentiable_topk_loss", topk_ops.topk_loss, topk_ops.topk_gradient, topk_ops.N_SHARED,
    )  # fmt: skip
    call = lambda: topk_distillation_loss(student, *teacher, **options, **more)
    return launches_of(monkeypatch, topk, operators, call, mode)


TOPK_CASES = [
    (option, mode)
    for option, mode in CASES
    if "infinities" not in OPTIONS[option] and OPTIONS[option].get("hard_label_weight") != 1
]


@pytest.mark.parametrize(("option", "mode"), TOPK_CASES)
def test_nothing_is_read_for_the_top_k(option, mode, fake_gpu, monkeypatch):
    for divergence, tail in [
        ("forward_kl", "bucket"),
        ("reverse_kl", "ignore"),
        ("alpha_beta", "ignore"),
    ]:
        forward, backward, computing = fake_topk_calls(
            monkeypatch, option, mode, divergence=divergence, tail=tail
        )
        assert (forward, backward) == expected_launches("topk_kernel", option, mode)
        assert computing == []


SYNCHRONISATIONS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() == 0),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x + 1),
    "any": lambda x: x.any() and x,
    "boolean index": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("name", SYNCHRONISATIONS)
def test_reading_a_value_would_raise(name, fake_gpu):
    """These tests can fail."""
    x = torch.empty(3, device="cuda")
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        aot.record(lambda: SYNCHRONISATIONS[name](x), FACTS)


def test_a_copy_to_the_host_would_be_noted(fake_gpu):
    """Fake tensors allow it; a GPU would wait."""
    x = torch.empty(3, device="cuda")
    with ComputingOperations() as computing:
        x.to("cpu")
    assert computing.names == ["aten::_to_copy"]


def test_debug_checks_do_read_values(fake_gpu):
    """And the package's own code raises where it is meant to synchronise."""
    student, teacher, options = arguments_on("cuda", "hard")
    aot.record(lambda: distillation_loss(student, teacher, **options), FACTS)
    distill_ops.set_debug(True)
    try:
        with pytest.raises(DataDependentOutputException):
            aot.record(lambda: distillation_loss(student, teacher, **options), FACTS)
    finally:
        distill_ops.set_debug(False)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_is_read_through_autograd(option, gradient, inplace, monkeypatch):
    """From the public function to the student's gradient."""
    if OPTIONS[option].get("reduction") == "none":
        gradient = "backward"
    monkeypatch.setattr(losses, "INTERPRETED", True)  # the Triton path without a GPU
    # which sees shared memory: without any, all tensors lie at address 0
    monkeypatch.setattr(losses, "check_inplace", lambda *_: None)
    for name in ("dense_loss", "dense_loss_inplace", "dense_gradient", "dense_gradient_inplace"):
        function = getattr(ops, name.replace("_inplace", "_"))
        monkeypatch.setattr(ops, f"{name}_op", function)  # not its fake
    for divergence in DIVERGENCES[2:4]:  # with a closed moment and without
        leaf, teacher, options = arguments_on("meta", option)
        leaf.requires_grad_()
        options |= {"divergence": divergence, "gradient": gradient, "backend": "triton"}

        def call(leaf=leaf, teacher=teacher, options=options):
            logits = leaf * 2.0
            versions = [logits._version]
            loss = distillation_loss(logits, teacher, inplace=inplace, **options)
            versions.append(logits._version)
            (loss * 0.5).sum().backward()
            # no kernel runs: what says that the logits changed is the launchers' own word
            changed = [a < b for a, b in pairwise([*versions, logits._version])]
            assert changed == [inplace and gradient == "forward", inplace]

        names = [launch.kernel.__name__ for launch in aot.record(call, FACTS)]
        assert names.count("dense_kernel") == (2 if gradient == "backward" else 1)
        assert names[-1] == ("dense_kernel" if gradient == "backward" else "scale_kernel")
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("name", SYNCHRONISATIONS)
def test_reading_a_value_of_a_meta_tensor_would_raise(name):
    x = torch.empty(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        aot.record(lambda: SYNCHRONISATIONS[name](x), FACTS)
