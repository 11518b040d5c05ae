"""The linear operators inside PyTorch's mechanisms, and without a wait for the GPU."""

import pytest
import torch
import torch._dynamo.testing

from distill_ops import SymmetricKL, linear_distillation_loss
from distill_ops.api import choices
from distill_ops.operators import transforms
from tests.interface.test_no_sync import FACTS, ComputingOperations
from tests.support.cases import BOOL_MASK, FLOAT_MASK, LABELS, TOKENS
from tests.support.linear_cases import CAPPED, make_pair, run
from tests.support.operators import call_of, opcheck_of_the_gradient, opcheck_of_the_loss

pytest.importorskip("triton")

from distill_ops.analysis import aot

NAME = "linear_distillation_loss"
OPTIONS = {
    "forward": {},
    "backward": {"gradient": "backward"},
    "none": {"reduction": "none"},
    "mask": {"loss_mask": FLOAT_MASK, "kept_tokens": 5},
    "hard": {"labels": LABELS, "hard_label_weight": 0.5, "return_components": True},
    "hard_none": {
        "labels": LABELS, "hard_label_weight": 0.5, "return_components": True, "reduction": "none",
    },
    "normalizer": {"normalizer": torch.tensor(7.0)},
    "parameter": {"divergence": SymmetricKL(torch.full(TOKENS, 0.3))},
    "capped": CAPPED | {"memory_budget": 2000},
}  # fmt: skip


def moved(option, device):
    options = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[option].items()
    }
    if "divergence" in options:
        options["divergence"] = options["divergence"].map_tensors(lambda x: x.to(device))
    return options


def loss_of(leaves, **options):
    return linear_distillation_loss(
        *leaves[:4], student_bias=leaves.student_bias, teacher_bias=leaves.teacher_bias, **options
    )


@pytest.mark.covering("option", "backend")
@pytest.mark.parametrize("option", OPTIONS)
def test_opcheck_of_the_loss(option, backend, device):
    leaves = make_pair(bias=True, device=device).trained(("student_hidden", "student_weight"))
    opcheck_of_the_loss(loss_of, leaves, backend=backend, **moved(option, device))


def test_opcheck_of_the_gradient(backend, device):
    leaves = make_pair(bias=True, device=device).trained(("student_hidden", "student_bias"))
    opcheck_of_the_gradient(loss_of, leaves, gradient="backward", backend=backend)


def test_packed_options_come_back():
    leaves = make_pair().trained(("student_weight",))
    options = {"student_softcap": 3.0, "kept_tokens": 4, "logits_dtype": torch.bfloat16}
    call = call_of(loss_of, leaves, loss_mask=BOOL_MASK, **options)
    operator, _, linear, plan = call
    assert linear.student.softcap == 3.0
    assert linear.teacher.softcap is None
    assert linear.blocks == (torch.bfloat16, None, None, 4, 1)
    assert plan == (NAME, "forward", (False, True, False))
    assert operator.unpacked(call.arguments())[1:3] == (linear, plan)


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_equals_eager(option):
    """One graph, no break."""
    torch.compiler.reset()

    def function(hidden, *others, **options):
        result = linear_distillation_loss(hidden * 2.0, *others, **options)
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pair, options = make_pair(bias=True), {"divergence": "reverse_kl"} | OPTIONS[option]
    eager, graph = (run(f, pair, **options) for f in (function, compiled))
    torch.testing.assert_close(graph.loss, eager.loss, rtol=1e-6, atol=0)
    assert graph.gradients.keys() == eager.gradients.keys() == set(pair.student)
    for name, gradient in graph.gradients.items():
        torch.testing.assert_close(gradient, eager.gradients[name], rtol=1e-5, atol=1e-7)


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        linear_distillation_loss, fullgraph=True, dynamic=True, backend=counter
    )
    for n_rows in (4, 7, 5):
        pair = make_pair((n_rows,))
        expected = linear_distillation_loss(*pair[:4], temperature=2.0)
        torch.testing.assert_close(compiled(*pair[:4], temperature=2.0), expected)
    assert counter.frame_count == 1


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return linear_distillation_loss(*tensors, divergence="jensen_shannon")

    pair = make_pair()[:4]
    program = torch.export.export(Loss(), pair)
    torch.testing.assert_close(program.module()(*pair), Loss()(*pair))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint(reentrant):
    pair = make_pair()

    def checkpointed(hidden, *others, **options):
        return torch.utils.checkpoint.checkpoint(
            lambda x: linear_distillation_loss(x * 2.0, *others, **options), hidden,
            use_reentrant=reentrant,
        )  # fmt: skip

    plain = lambda hidden, *others, **options: linear_distillation_loss(
        hidden * 2.0, *others, **options
    )
    ours, expected = run(checkpointed, pair), run(plain, pair)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
    for name, gradient in ours.gradients.items():
        assert torch.equal(gradient, expected.gradients[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_on_a_cpu(dtype):
    pair = make_pair(dtype=dtype, bias=True)
    expected = run(linear_distillation_loss, pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(linear_distillation_loss, pair)
    assert ours.loss.dtype == torch.float32
    assert torch.equal(ours.loss, expected.loss)
    for name, gradient in ours.gradients.items():
        assert torch.equal(gradient, expected.gradients[name])


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_second_derivative_is_an_error(mode, backend, device):
    leaves = make_pair(device=device).trained(("student_weight",))
    loss = loss_of(leaves, gradient=mode, backend=backend)
    with pytest.raises(RuntimeError, match=f"{NAME} has no second derivative"):
        torch.autograd.grad(loss, leaves.student_weight, create_graph=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_a_teacher_s_head_in_training_is_a_constant(gradient, compiled, backend, device):
    pair = make_pair(bias=True, device=device)
    of_teacher = ("teacher_weight", "teacher_bias")
    options = {"gradient": gradient, "backend": backend}
    expected = run(linear_distillation_loss, pair, **options)
    function = linear_distillation_loss
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    heads = []

    def keeping(*tensors, teacher_bias, **others):
        heads.extend((tensors[3], teacher_bias))
        return function(*tensors, teacher_bias=teacher_bias, **others)

    ours = run(keeping, pair, (*pair.student, *of_teacher), **options)
    assert torch.equal(ours.loss, expected.loss)
    assert all(torch.equal(ours.gradients[name], expected.gradients[name]) for name in pair.student)
    assert [(head.requires_grad, head.grad) for head in heads] == [(True, None)] * 2
    frozen = pair.trained(of_teacher)
    assert not keeping(*frozen[:4], teacher_bias=frozen.teacher_bias, **options).requires_grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_teacher_s_hidden_states_may_require_grad_where_gradients_are_off(compiled):
    leaves = make_pair().trained(("teacher_hidden", "student_weight"))
    function = linear_distillation_loss
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    else:  # under fullgraph the error is the compiler's, around ours
        with pytest.raises(ValueError, match="teacher_hidden requires grad"):
            function(*leaves[:4])
    with torch.no_grad():
        assert function(*leaves[:4]) == linear_distillation_loss(*leaves[:4])


# --- no wait for the GPU -------------------------------------------------------------------------

WITHOUT_VALUES = {
    "plain": ({}, ["dense_kernel", "total_kernel"]),
    "masked": (
        {"loss_mask": BOOL_MASK, "labels": LABELS},
        ["weights_kernel", "dense_kernel", "total_kernel"],
    ),
    "kept": (
        {"labels": LABELS, "kept_tokens": 4, "hard_label_weight": 0.5, "return_components": True},
        ["weights_kernel", "dense_kernel", "total_kernel"],
    ),
    "capped": (
        CAPPED, ["finish_kernel", "finish_kernel", "dense_kernel", "softcap_gradient_kernel", "total_kernel"],
    ),
    "none": ({"reduction": "none", "loss_mask": FLOAT_MASK, "kept_tokens": 4}, ["weights_kernel", "dense_kernel"]),
    "parameter": ({"divergence": SymmetricKL(torch.full(TOKENS, 0.3))}, ["dense_kernel", "total_kernel"]),
}  # fmt: skip


def addmm_can_be_fake() -> bool:
    half = torch.empty(2, 2, dtype=torch.half, device="meta")
    try:
        torch.addmm(half.float(), half, half, torch.float, out=half.float())
    except TypeError:  # PyTorch 2.11 mistakes the dtype for beta
        return False
    return True


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("option", WITHOUT_VALUES)
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_is_read_on_the_host(bias, option, gradient, monkeypatch):
    """From the public function to the gradients, on tensors without values; bfloat16, so that the
    products are a GPU's."""
    options, expected = WITHOUT_VALUES[option]
    if option == "capped" and not addmm_can_be_fake():
        pytest.skip("this PyTorch cannot call addmm.dtype_out on tensors without values")
    if options.get("reduction") == "none":
        gradient = "backward"
    monkeypatch.setattr(choices, "INTERPRETED", True)  # the Triton path without a GPU
    monkeypatch.setattr(
        transforms, "dispatches", lambda *_: False
    )  # the operator's body, not its fake
    to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x
    options = {name: to_meta(value) for name, value in options.items()}
    if "divergence" in options:
        options["divergence"] = options["divergence"].map_tensors(to_meta)
    pair = make_pair(bias=bias, dtype=torch.bfloat16).map(to_meta)
    leaves = pair.trained(pair.student)

    def call():
        result = loss_of(leaves, gradient=gradient, backend="triton", **options)
        loss = result[0] if isinstance(result, tuple) else result
        (loss * 0.5).sum().backward()

    with ComputingOperations() as computing:
        launches = [launch.kernel.__name__ for launch in aot.record(call, FACTS)]
    if bias and option != "capped":
        expected = [
            name for x in expected for name in (["finish_kernel"] * 2 * (x == "dense_kernel") + [x])
        ]
    made = [x for x in expected if x != "total_kernel"]
    if gradient == "backward":
        before = [x for x in expected if x != "softcap_gradient_kernel"]
        assert launches == before + made
    else:
        assert launches == expected + ["scale_kernel"] * len(pair.student)
    products = [x for x in computing.names if x.startswith(("aten::mm", "aten::addmm"))]
    assert len(products) == (6 if gradient == "backward" else 4)
    for name in ("student_hidden", "student_weight"):
        tensor = getattr(leaves, name)
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.dtype == torch.bfloat16
