"""The operators inside PyTorch's mechanisms: opcheck, torch.compile, export, autocast, checkpoint."""

import pytest
import torch
import torch._dynamo.testing

import distill_ops
from distill_ops import SymmetricKL, distillation_loss
from tests.support.cases import FLOAT_MASK, LABELS, TOKENS
from tests.support.helpers import assert_compiled_equals_eager, make_logits, moved, run
from tests.support.operators import opcheck_of_the_gradient, opcheck_of_the_loss

OPTIONS = {
    "forward": {},
    "backward": {"gradient": "backward"},
    "none": {"reduction": "none"},
    "mask": {"loss_mask": FLOAT_MASK},
    "hard": {"labels": LABELS, "hard_label_weight": 0.5, "return_components": True},
    "hard_none": {
        "labels": LABELS, "hard_label_weight": 0.5, "return_components": True, "reduction": "none",
    },
    "normalizer": {"normalizer": torch.tensor(7.0)},
}  # fmt: skip


@pytest.mark.covering("option", "backend")
@pytest.mark.parametrize("option", OPTIONS)
def test_opcheck_of_the_loss(option, backend, device):
    student, teacher = make_logits((*TOKENS, 33), device=device)
    options = moved(OPTIONS[option], device)
    opcheck_of_the_loss(
        distillation_loss, student.requires_grad_(), teacher, backend=backend, **options
    )


def test_opcheck_of_the_gradient(backend, device):
    student, teacher = make_logits((*TOKENS, 33), device=device)
    student.requires_grad_()
    opcheck_of_the_gradient(
        distillation_loss, student, teacher, gradient="backward", backend=backend
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_equals_eager(option):
    student, teacher = make_logits((*TOKENS, 33))
    options = OPTIONS[option] | {"divergence": "reverse_kl"}
    assert_compiled_equals_eager(distillation_loss, student, teacher, **options)


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(distillation_loss, fullgraph=True, dynamic=True, backend=counter)
    for n_rows, n_cols in [(4, 33), (7, 50), (5, 41)]:
        student, teacher = make_logits((n_rows, n_cols))
        expected = distillation_loss(student, teacher, temperature=2.0)
        torch.testing.assert_close(compiled(student, teacher, temperature=2.0), expected)
    assert counter.frame_count == 1


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return distillation_loss(student, teacher, divergence="jensen_shannon")

    student, teacher = make_logits((4, 33))
    program = torch.export.export(Loss(), (student, teacher))
    torch.testing.assert_close(program.module()(student, teacher), Loss()(student, teacher))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint(reentrant):
    student, teacher = make_logits((4, 33))

    def loss_function(student, teacher):
        return torch.utils.checkpoint.checkpoint(
            lambda s: distillation_loss(s * 2.0, teacher), student, use_reentrant=reentrant
        )

    def plain(student, teacher):
        return distillation_loss(student * 2.0, teacher)

    checkpointed, expected = run(loss_function, student, teacher), run(plain, student, teacher)
    assert torch.equal(checkpointed.loss, expected.loss)
    assert torch.equal(checkpointed.gradient, expected.gradient)


IDS = torch.tensor([1, 5, 32, 0])
SAVING = {
    "dense, backward": lambda s, t: distillation_loss(s, t, gradient="backward"),
    "dense, none": lambda s, t: distillation_loss(s, t, reduction="none").sum(),
    "dense, in place": lambda s, t: distillation_loss(s, t, gradient="backward", inplace=True),
    "top-k": lambda s, t: distill_ops.topk_distillation_loss(
        s, t.log_softmax(-1)[:, :3], (IDS[:, None] + torch.tensor([0, 11, 22])) % 33,
        gradient="backward",
    ),
    "linear": lambda s, t: distill_ops.linear_distillation_loss(
        s, t.t() @ t, t, t.t() @ t, gradient="backward"
    ),
    "tokens": lambda s, t: distill_ops.token_log_probs(s, IDS).sum(),
    "tokens of hidden states": lambda s, t: distill_ops.linear_token_log_probs(
        s, t.t() @ t, IDS
    ).sum(),
    "statistics": lambda s, t: distill_ops.distillation_statistics(s, t, IDS)[0].sum(),
    "mixture": lambda s, t: distill_ops.mixture_token_log_probs(s, t, IDS, 0.3).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVING)
def test_saved_tensors_are_unpacked_once(name):
    """A checkpoint without reentrance allows no more, and hooks that copy would do so twice."""
    student, teacher = make_logits((4, 33))
    gradients, unpacked = [], []

    def unpack(saved):
        unpacked.append(saved[0])
        return saved[1]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: (object(), x), unpack):
        leaf = student.clone().requires_grad_()
        SAVING[name](leaf * 1.0, teacher).backward()
        gradients.append(leaf.grad)
    assert len(unpacked) == len(set(unpacked)) > 0
    leaf = student.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        lambda x: SAVING[name](x * 1.0, teacher), leaf, use_reentrant=False
    ).backward()
    gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_autocast_changes_nothing():
    student, teacher = make_logits((4, 33), dtype=torch.bfloat16)
    expected = run(distillation_loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(distillation_loss, student, teacher)
    assert ours.loss.dtype == torch.float32
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.gradient, expected.gradient)


def test_float16_gradients_survive_a_loss_scale(backend, device):
    """Made before GradScaler's scale, 97% of these would underflow to 0."""
    student, teacher = make_logits((64, 512), dtype=torch.float16, device=device)
    student.requires_grad_()
    options = {"normalizer": 8192.0 * 512, "backend": backend}
    (distillation_loss(student, teacher, **options) * 2.0**20).backward()
    wide = student.detach().double().requires_grad_()
    options = {"normalizer": 8192.0 * 512, "backend": "torch"}
    (distillation_loss(wide, teacher.double(), **options) * 2.0**20).backward()
    error = (student.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error < torch.finfo(torch.float16).eps


def test_accumulation_over_micro_batches_equals_one_batch(backend, device):
    student, teacher = make_logits((8, 40), device=device)
    labels = torch.tensor([1, -100, 2, 3, -100, -100, 4, 5], device=device)
    whole = student.clone().requires_grad_()
    distillation_loss(whole, teacher, labels=labels, backend=backend).backward()
    parts = student.clone().requires_grad_()
    n_items = (labels != -100).sum()
    for rows in torch.arange(8, device=device).split(2):
        distillation_loss(
            parts[rows], teacher[rows], labels=labels[rows], normalizer=n_items, backend=backend
        ).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)


def test_transforms_that_cannot_work_are_refused(backend, device):
    student, teacher = make_logits((4, 33), device=device)
    loss_function = lambda s: distillation_loss(s, teacher, backend=backend)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        with pytest.raises(NotImplementedError, match="distill_ops.reference"):
            transform(loss_function)(student)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, torch.ones_like(student))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            loss_function(dual)


def test_vmap_over_independent_problems():
    student, teacher = make_logits((3, 4, 33))
    mapped = torch.func.vmap(distillation_loss)(student, teacher)
    looped = [distillation_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    assert torch.equal(mapped, torch.stack(looped))


@pytest.mark.parametrize("batched", ["labels", "loss_mask", "weight"])
def test_vmap_over_some_of_the_arguments(batched):
    """Values that are checked beside a batch of others: on which no branch can depend."""
    student, teacher = make_logits((2, 4, 33))
    arguments = {
        "labels": torch.tensor([[1, -100, 3, 4], [5, 6, -100, 8]]),
        "loss_mask": torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]),
        "weight": torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]),
    }
    arguments = {name: x if name == batched else x[0] for name, x in arguments.items()}

    def loss_function(student, teacher, labels, loss_mask, weight):
        return distillation_loss(
            student, teacher, labels=labels, loss_mask=loss_mask, divergence=SymmetricKL(weight),
            hard_label_weight=0.2,
        )  # fmt: skip

    dims = (0, 0, *(0 if name == batched else None for name in arguments))
    mapped = torch.func.vmap(loss_function, dims)(student, teacher, *arguments.values())
    looped = [
        loss_function(
            student[i], teacher[i], *(x[i] if n == batched else x for n, x in arguments.items())
        )
        for i in range(2)
    ]
    assert torch.equal(mapped, torch.stack(looped))
