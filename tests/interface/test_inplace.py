"""``inplace=True``: the gradient overwrites the student's logits, and what must keep it from harm."""

import sys

import pytest
import torch

from benchmarks.core.memory import peak_above_inputs
from distill_ops import JensenShannon, distillation_loss
from distill_ops.operators import transforms
from tests.support.cases import DIVERGENCES, FLOAT_MASK, LABELS, TOKENS
from tests.support.helpers import make_logits, moved
from tests.support.operators import call_of

OPTIONS = {
    "plain": {},
    "backward": {"gradient": "backward"},
    "none": {"reduction": "none"},
    "mask": {"loss_mask": FLOAT_MASK},
    "hard": {"labels": LABELS, "hard_label_weight": 0.4},
    "hard_backward": {
        "labels": LABELS, "hard_label_weight": 0.4, "gradient": "backward", "temperature": 2.0,
    },
    "hard_all": {"labels": LABELS.clamp(min=0), "hard_label_weight": 0.4},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "temperature": {"temperature": 0.5},
    "vocab_size": {"vocab_size": 29},
    "vocab_size_hard": {"vocab_size": 29, "labels": LABELS, "hard_label_weight": 0.4},
}  # fmt: skip


def logits_and_gradient(student, teacher, *, inplace, view=lambda x: x, **options):
    """Loss, gradient with respect to the logits as the model's last layer sees it, and whether it
    lies in their memory. The upstream gradient is not 1."""
    leaf = student.clone().requires_grad_()
    hidden = leaf * 1.0  # the model: what it saves is not the logits
    logits = view(hidden)
    addresses = []
    logits.register_hook(lambda g: addresses.append(g.data_ptr() == logits.data_ptr()))
    loss = distillation_loss(logits, view(teacher), inplace=inplace, **options)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    loss.backward(upstream.to(loss))
    return loss.detach(), leaf.grad, addresses[0]


def assert_inplace_equals_fresh(student, teacher, **options):
    fresh = logits_and_gradient(student, teacher, inplace=False, **options)
    ours = logits_and_gradient(student, teacher, inplace=True, **options)
    assert torch.equal(ours[0], fresh[0])
    assert torch.equal(ours[1], fresh[1])
    assert ours[2]
    assert not fresh[2]


@pytest.mark.covering("option", "divergence")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_same_bits_as_a_fresh_gradient(divergence, option, backend, device):
    options = moved(OPTIONS[option], device) | {"divergence": divergence, "backend": backend}
    student, teacher = make_logits((*TOKENS, 33), device=device)
    if option == "hard_only":
        teacher = None
        options["divergence"] = "forward_kl"
        logits = (student.clone().requires_grad_() * 1.0,)
        distillation_loss(*logits, None, inplace=True, **options).backward()
        expected = student.clone().requires_grad_()
        distillation_loss(expected, None, **options).backward()
        assert torch.equal(logits[0].detach(), expected.grad)
        return
    assert_inplace_equals_fresh(student, teacher, **options)


@pytest.mark.covering("n_cols", "dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_cols", [64, 77, 1500])
def test_half_precision(dtype, n_cols, backend, device):
    student, teacher = make_logits((4, n_cols), dtype=dtype, device=device)
    for divergence in ("forward_kl", "jensen_shannon"):
        assert_inplace_equals_fresh(student, teacher, divergence=divergence, backend=backend)


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "later columns": lambda x: x[..., 3:],
    "fewer columns": lambda x: x[..., :-5],
    "every second": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
}


@pytest.mark.covering("view", "gradient")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_views(view, gradient, backend, device):
    """Only the view's elements change."""
    view = VIEWS[view]
    student, teacher = make_logits((3, 4, 50), device=device)
    options = {"divergence": "reverse_kl", "gradient": gradient, "backend": backend}
    fresh = logits_and_gradient(student, teacher, inplace=False, view=view, **options)
    ours = logits_and_gradient(student, teacher, inplace=True, view=view, **options)
    # rows that begin elsewhere than those of a fresh gradient may be summed in another order
    torch.testing.assert_close(ours[0], fresh[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], fresh[1], rtol=1e-5, atol=1e-9)
    assert ours[2]
    whole = student.clone().requires_grad_() * 1.0
    outside = torch.ones(whole.numel(), dtype=torch.bool, device=device)
    outside[view(torch.arange(whole.numel(), device=device).view(whole.shape)).flatten()] = False
    distillation_loss(view(whole), view(teacher), inplace=True, **options).backward()
    assert torch.equal(whole.detach().flatten()[outside], student.flatten()[outside])


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_infinite_rows(divergence, backend, device):
    """Rows that are done a second time must not read what the first time wrote."""
    student, teacher = make_logits((6, 90), device=device)
    student[1, 5:20], teacher[2, 30:60] = float("-inf"), float("-inf")
    student[4, 7], teacher[4, 80] = float("nan"), float("inf")
    for temperature in (1.0, 0.5):
        options = {"divergence": divergence, "backend": backend, "temperature": temperature}
        fresh = logits_and_gradient(student, teacher, inplace=False, reduction="sum", **options)
        ours = logits_and_gradient(student, teacher, inplace=True, reduction="sum", **options)
        assert torch.equal(ours[1].isnan(), fresh[1].isnan())
        assert torch.equal(ours[1].nan_to_num(), fresh[1].nan_to_num())


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_autograd_notices_the_overwriting(gradient, backend, device, monkeypatch):
    for dispatched in (False, True):  # called directly, and as where something watches
        monkeypatch.setattr(transforms, "dispatches", lambda *_, dispatched=dispatched: dispatched)
        student, teacher = make_logits((3, 20), device=device)
        logits = student.requires_grad_() * 1.0
        other = (logits * logits).sum()  # needs the logits for its own gradient
        version = logits._version
        options = {"gradient": gradient, "backend": backend}
        loss = distillation_loss(logits, teacher, inplace=True, **options)
        if gradient == "forward":
            assert logits._version > version
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                (loss + other).backward()
        else:
            assert logits._version == version
            loss.backward(retain_graph=True)
            assert logits._version > version
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                other.backward()


def logits_and_loss(gradient, backend, device):
    student, teacher = make_logits((3, 20), device=device)
    logits = student.requires_grad_() * 1.0
    options = {"inplace": True, "gradient": gradient, "backend": backend}
    return logits, distillation_loss(logits, teacher, **options)


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_logits_changed_before_the_backward(gradient, backend, device):
    logits, loss = logits_and_loss(gradient, backend, device)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_one_backward_only(gradient, backend, device):
    _, loss = logits_and_loss(gradient, backend, device)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward used up"):
        loss.backward()


def test_nothing_is_written_without_a_gradient(backend, device):
    student, teacher = make_logits((3, 20), device=device)
    kept = student.clone()
    distillation_loss(student, teacher, inplace=True, backend=backend)
    leaf = student.requires_grad_()
    with torch.no_grad():
        distillation_loss(leaf, teacher, inplace=True, backend=backend)
    assert torch.equal(student, kept)


def test_refusals(backend, device):
    student, teacher = make_logits((3, 20), device=device)
    leaf = student.clone().requires_grad_()
    options = {"inplace": True, "backend": backend}
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        distillation_loss(leaf, teacher, **options)
    for view in (leaf.view(3, 1, 20), leaf[:, :]):
        with pytest.raises(ValueError, match="a leaf that requires grad .* or a view of one"):
            distillation_loss(view, teacher.view_as(view), **options)
    assert torch.equal(leaf, student)
    with pytest.raises(ValueError, match=r"expanded.*contiguous"):
        distillation_loss((leaf[:1] * 1.0).expand(3, 20), teacher, **options)
    logits = leaf * 1.0
    for shared in (logits.detach(), torch.cat([logits, teacher]).detach()):
        both = shared if len(shared) == 3 else None
        if both is not None:
            with pytest.raises(ValueError, match="share memory"):
                distillation_loss(logits, both, **options)
    stacked = torch.cat([leaf, teacher]) * 1.0  # one tensor, two halves: no conflict
    distillation_loss(stacked[:3], stacked[3:].detach(), **options).backward()
    assert leaf.grad.isfinite().all()


def test_refusals_when_compiled():
    student, teacher = make_logits((4, 33))
    leaf = student.clone().requires_grad_()
    torch.compiler.reset()
    for view in (lambda x: x, lambda x: x.view(2, 2, 33)):
        compiled = torch.compile(
            lambda x, t, view=view: distillation_loss(view(x), view(t), inplace=True),
            backend="aot_eager",
        )
        with pytest.raises(ValueError, match="a leaf that requires grad"):
            compiled(leaf, teacher)
    assert torch.equal(leaf, student)


@pytest.mark.interpreter
def test_strides_that_the_kernels_cannot_reach(kernel_device):
    student, teacher = make_logits((20, 3), device=kernel_device("triton"))
    logits = (student.requires_grad_() * 1.0).t()
    with pytest.raises(ValueError, match=r"contiguous columns.*\(1, 3\)"):
        distillation_loss(logits, teacher.t(), inplace=True, backend="triton")


def test_a_teacher_of_other_strides(backend, device):
    student, teacher = make_logits((2, 3, 20), device=device)
    across = teacher.transpose(0, 1).contiguous().transpose(0, 1)
    expected = logits_and_gradient(student, teacher, inplace=True, backend=backend)
    ours = logits_and_gradient(student, across, inplace=True, backend=backend)
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_compiled(gradient):
    student, teacher = make_logits((4, 33))

    def step(leaf):
        return distillation_loss(leaf * 1.5, teacher, inplace=True, gradient=gradient)

    torch.compiler.reset()
    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        (function(leaf) * 2.0).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint(reentrant):
    student, teacher = make_logits((4, 33))
    gradients = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(
            lambda x, inplace=inplace: distillation_loss(x * 1.5, teacher, inplace=inplace),
            leaf,
            use_reentrant=reentrant,
        ).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.covering("option", "backend")
@pytest.mark.parametrize("option", ["plain", "hard", "backward"])
def test_opcheck(option, backend, device):
    """On inputs without grad: an operator that mutates its input has no formula for autograd."""
    student, teacher = make_logits((*TOKENS, 33), device=device)
    logits = student.clone().requires_grad_() * 1.0
    options = moved(OPTIONS[option], device)
    call = call_of(distillation_loss, logits, teacher, inplace=True, backend=backend, **options)
    call = call._replace(inputs=call.inputs._replace(student=student))
    operator = call.operator
    torch.library.opcheck(operator.inplace_op, call.arguments())
    call = call._replace(plan=call.plan._replace(made="backward"))
    kept = [student.new_empty(0) if x is None else x for x in call.results()[1]]
    upstream = torch.tensor(0.5, device=device)
    torch.library.opcheck(operator.inplace_gradient_op, (*call.arguments(), *kept, upstream))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_no_memory_of_the_logits_size(gradient):
    """64 MiB of logits: nothing but the chunks' buffers, where a fresh gradient takes 64 more."""
    student, teacher = make_logits((128, 131072))

    def peak(inplace):
        logits = student.clone().requires_grad_() * 1.0
        run = lambda: torch.autograd.grad(
            distillation_loss(
                logits, teacher, divergence=JensenShannon(), inplace=inplace, gradient=gradient
            ),
            logits,
        )
        return peak_above_inputs(run, torch.device("cpu"))

    peak(True)
    mib = 1 << 20
    assert peak(True) < 32 * mib
    assert 64 * mib < peak(False) < 96 * mib
