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
    distillation_loss,
    topk_distillation_loss,
)
from distill_ops.api import choices
from distill_ops.checks import values
from distill_ops.operators import saving, transforms
from distill_ops.operators.register import LossOperator, Plan
from distill_ops.problem import BACKWARD, FORWARD, NO_GRADIENT
from tests.support.cases import DIVERGENCES, KINDS, OPTIONS, TOKENS
from tests.support.helpers import make_logits

pytest.importorskip("triton")

from distill_ops.analysis import aot

FACTS = aot.TARGETS["sm_90"].facts
MODES = (NO_GRADIENT, FORWARD, BACKWARD)
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


def let_values_be_read(monkeypatch):
    """Tensors without values stand for a GPU's here: reading them would wait."""
    monkeypatch.setattr(values, "traced", lambda _: False)
    monkeypatch.setattr(values, "TRACING", ())


@pytest.fixture
def fake_gpu(monkeypatch):
    """Inside, ``device="cuda"`` makes fake tensors, and operators run as on plain ones."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    let_values_be_read(monkeypatch)
    run_bodies(monkeypatch, NO_GRADIENT)
    with FakeTensorMode(), WithoutDeviceGuard():
        yield


def run_bodies(monkeypatch, mode):
    """Let operators run as on plain tensors, with gradients made by ``mode``; returns their calls."""
    calls = []

    def call(operator, function, inputs, options, *_, **__):
        plan = Plan(function, mode, (mode != NO_GRADIENT,) * len(operator.students))
        operator.check(inputs, options)
        outputs, kept = operator.forward(inputs, options, plan)
        calls.append((operator, inputs, options, plan, outputs, kept))
        return outputs

    monkeypatch.setattr(LossOperator, "__call__", call)
    return calls


def fake_calls(monkeypatch, forward, mode):
    """What a public function's forward and backward launch: lists of the kernels' names."""
    calls = run_bodies(monkeypatch, mode)

    def backward():
        operator, inputs, options, plan, (loss, *_), kept = calls[0]
        upstream = torch.empty(loss.shape, device="cuda")
        if mode == BACKWARD:
            operator.gradient(inputs, options, plan, kept, [upstream])
        elif mode == FORWARD:
            saving.scale_(kept[0], upstream, "triton")

    with ComputingOperations() as computing:
        launches = [aot.record(part, FACTS) for part in (forward, backward)]
    names = [[launch.kernel.__name__ for launch in made] for made in launches]
    return *names, computing.names


def dense_calls(monkeypatch, option, mode, **more):
    student, teacher, options = arguments_on("cuda", option)
    options |= more
    return fake_calls(monkeypatch, lambda: distillation_loss(student, teacher, **options), mode)


def topk_calls(monkeypatch, option, mode, **more):
    student, _, options = arguments_on("cuda", option)
    teacher = [torch.empty(*TOKENS, 5, device="cuda"), torch.empty(*TOKENS, 5, device="cuda").int()]
    options |= more
    loss = lambda: topk_distillation_loss(student, *teacher, **options)
    return fake_calls(monkeypatch, loss, mode)


def assert_launches(found, kernel, option, mode):
    """At most three launches forward and one backward, and no kernel of PyTorch's."""
    forward, backward, computing = found
    expected = ["weights_kernel"] if {"loss_mask", "labels"} & set(OPTIONS[option]) else []
    expected.append(kernel)
    if OPTIONS[option].get("reduction") != "none":
        expected.append("total_kernel")
    assert forward == expected
    assert backward == {NO_GRADIENT: [], FORWARD: ["scale_kernel"], BACKWARD: [kernel]}[mode]
    assert computing == []


# a gradient of "none" made in the forward is refused: the incoming gradients are not known
CASES = [
    (option, mode)
    for option, options in OPTIONS.items()
    for mode in MODES
    if not (mode == FORWARD and options.get("reduction") == "none")
]


@pytest.mark.parametrize(("option", "mode"), CASES)
def test_nothing_is_read_on_the_host(option, mode, fake_gpu, monkeypatch):
    for divergence in KINDS:
        found = dense_calls(monkeypatch, option, mode, divergence=divergence)
        assert_launches(found, "dense_kernel", option, mode)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_for_components(mode, fake_gpu, monkeypatch):
    for option in ("hard", "hard_masked", "hard_only", "hard_temperature"):
        *_, computing = dense_calls(monkeypatch, option, mode, return_components=True)
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
    forward, _, computing = dense_calls(monkeypatch, "float_mask", mode, divergence=divergence)
    assert len(forward) == 3
    assert computing == []


def test_nothing_is_read_for_metrics(fake_gpu):
    student, teacher, _ = arguments_on("cuda", "plain")
    with ComputingOperations() as computing:
        launches = aot.record(lambda: distill_ops.distillation_metrics(student, teacher), FACTS)
    assert [launch.kernel.__name__ for launch in launches] == ["metrics_kernel"]
    assert computing.names == []


TOPK_CASES = [
    (option, mode)
    for option, mode in CASES
    if "infinities" not in OPTIONS[option] and OPTIONS[option].get("hard_label_weight") != 1
]


@pytest.mark.parametrize(("option", "mode"), TOPK_CASES)
def test_nothing_is_read_for_the_top_k(option, mode, fake_gpu, monkeypatch):
    for divergence, tail, more in [
        ("forward_kl", "bucket", {}),
        ("reverse_kl", "ignore", {}),
        ("alpha_beta", "ignore", {}),
        ("jensen_shannon", "restrict", {}),
        ("reverse_kl", "drop", {"mass_terms": True, "log_prob_floor": -10.0}),
    ]:
        found = topk_calls(monkeypatch, option, mode, divergence=divergence, tail=tail, **more)
        assert_launches(found, "topk_kernel", option, mode)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_of_chosen_rows(mode, fake_gpu, monkeypatch):
    """And nothing is gathered: the kernels take the index."""
    for make, kernel in ((dense_calls, "dense_kernel"), (topk_calls, "topk_kernel")):
        rows = torch.empty(TOKENS, dtype=torch.int64, device="cuda")
        found = make(monkeypatch, "float_mask", mode, teacher_rows=rows)
        assert_launches(found, kernel, "float_mask", mode)


@pytest.mark.parametrize("budget", [None, 1500])
@pytest.mark.parametrize("teacher", ["rows", "logits", "logits of a view", "rows of logits"])
def test_nothing_is_read_by_linear_teachers(teacher, budget, fake_gpu, monkeypatch):
    """All of the teacher's rows kept, or one a token; or logits, of which none is copied."""
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="cuda")
    hidden, weight = new(*TOKENS, 8), new(N_COLS, 8)
    head, options = (None, None), {"memory_budget": budget, "loss_mask": new(*TOKENS)}
    if "rows" in teacher:
        options["teacher_rows"] = new(*TOKENS, dtype=torch.int64)
    if teacher == "rows":
        head = new(4, 8), weight
    elif teacher == "rows of logits":
        options["teacher_logits"] = new(2, 2, N_COLS)
    else:
        logits = new(TOKENS[0], TOKENS[1] + 1, N_COLS)[:, :-1]
        options["teacher_logits"] = logits if "view" in teacher else new(*TOKENS, N_COLS)
    run_bodies(monkeypatch, NO_GRADIENT)
    call = lambda: distill_ops.linear_distillation_loss(hidden, weight, *head, **options)
    with ComputingOperations() as computing:
        names = [launch.kernel.__name__ for launch in aot.record(call, FACTS)]
    assert names.count("dense_kernel") >= 1
    copies = {"aten::index_select", "aten::index.Tensor", "aten::clone", "aten::copy_"}
    kept = teacher != "rows" or budget is None
    assert not (kept and copies & set(computing.names)), computing.names


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
    monkeypatch.setattr(choices, "INTERPRETED", True)  # the Triton path without a GPU
    # which sees shared memory: without any, all tensors lie at address 0
    monkeypatch.setattr("distill_ops.api.dense.check_inplace", lambda *_: None)
    let_values_be_read(monkeypatch)
    # the bodies themselves: the dispatcher would take the fakes, for tensors without memory
    monkeypatch.setattr(transforms, "dispatches", lambda *_: False)
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
