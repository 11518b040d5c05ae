"""Pairs of language-model heads, and the linear loss held against the float64 oracle."""

from typing import NamedTuple

import torch

from distill_ops import linear_distillation_loss, reference
from distill_ops.heads import engine, products, projection
from distill_ops.heads.blocks import Blocks
from distill_ops.reference.linear import head_logits
from tests.support.cases import TOKENS
from tests.support.helpers import assert_close, condition, moved, to_float64

N_COLS = 33  # test_dense's options go with it


class Pair(NamedTuple):
    """The tensors of student and teacher, in the order of the function's arguments."""

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor | None
    teacher_weight: torch.Tensor | None
    student_bias: torch.Tensor | None = None
    teacher_bias: torch.Tensor | None = None

    def map(self, function):
        return Pair(*(x if x is None else function(x) for x in self))

    def trained(self, names):
        """Fresh leaves, of which those called ``names`` require grad."""
        leaves = self.map(lambda x: x.detach().clone())
        for name in names:
            getattr(leaves, name).requires_grad_()
        return leaves

    @property
    def student(self):
        names = ("student_hidden", "student_weight", "student_bias")
        return tuple(name for name in names if getattr(self, name) is not None)


def make_pair(
    leading=TOKENS, n_cols=N_COLS, dims=(16, 24), *, dtype=torch.float32, weight_dtype=None,
    bias=False, teacher_cols=None, seed=0, device="cpu",
):  # fmt: skip
    """Heads whose logits have a variance of about 4."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    heads = []
    for dim, n in zip(dims, (n_cols, teacher_cols or n_cols), strict=True):
        heads += [
            draw(*leading, dim),
            draw(n, dim, dtype=weight_dtype or dtype, scale=2 / dim**0.5),
        ]
    if bias:
        heads += [draw(n, dtype=weight_dtype or dtype) for n in (n_cols, teacher_cols or n_cols)]
    return Pair(*heads)


CAPPED = {
    "student_logit_scale": 0.7, "student_softcap": 3.0, "teacher_logit_scale": 1.5, "teacher_softcap": 5.0,
}  # fmt: skip
OF_ENGINE = ("memory_budget", "kept_tokens", "logits_dtype", "gradient", "backend")


class Outcome(NamedTuple):
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def run(function, pair, names=None, *, upstream_seed=1, **options) -> Outcome:
    """Loss and the gradients called ``names`` (all of the student's), with a random upstream."""
    leaves = pair.trained(pair.student if names is None else names)
    loss = function(
        *leaves[:4], student_bias=leaves.student_bias, teacher_bias=leaves.teacher_bias, **options
    )
    upstream = torch.ones(loss.shape)
    if upstream_seed is not None:
        generator = torch.Generator().manual_seed(upstream_seed)
        upstream = torch.rand(loss.shape, generator=generator) + 0.5
    (loss * upstream.to(loss.device, loss.dtype)).sum().backward()
    gradients = {n: getattr(leaves, n).grad for n in leaves.student}
    return Outcome(loss.detach(), {n: g for n, g in gradients.items() if g is not None})


def run_reference(pair, names=None, *, double, **options) -> Outcome:
    options = {name: value for name, value in options.items() if name not in OF_ENGINE}
    if double:
        pair = pair.map(to_float64)
        options = {name: to_float64(value) for name, value in options.items()}
    return run(reference.linear_distillation_loss, pair, names, **options)


def loss_condition(pair, options) -> float:
    """The condition of the loss as a function of the logits."""
    if pair.teacher_hidden is None:
        return 1.0
    logits = []
    for side in ("student", "teacher"):
        tensors = [getattr(pair, f"{side}_{name}") for name in ("hidden", "weight", "bias")]
        unread = torch.zeros(tensors[0].shape[:-1], dtype=torch.bool, device=tensors[0].device)
        scale, cap = options.get(f"{side}_logit_scale", 1.0), options.get(f"{side}_softcap")
        n_cols = options.get("vocab_size") or len(tensors[1])
        logits.append(head_logits(*tensors, scale, cap, unread, n_cols, torch.float64))
    return condition(*logits, options)


def check(pair, names=None, **options) -> Outcome:
    """Hold the linear loss against the oracle: loss, and gradients by name; returns them."""
    options = moved(options, pair.student_hidden.device)
    ours = run(linear_distillation_loss, pair, names, **options)
    eager = run_reference(pair, names, double=False, **options)
    truth = run_reference(pair, names, double=True, **options)
    assert_close("loss", ours.loss, eager.loss, truth.loss, loss_condition(pair, options))
    assert ours.gradients.keys() == truth.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == getattr(pair, name).dtype
        assert_close(name, gradient, eager.gradients[name], truth.gradients[name])
    return ours


def leaves(tensors, double):
    made = [x if x is None or not double else to_float64(x) for x in tensors]
    return [None if x is None else x.detach().clone().requires_grad_() for x in made]


def weighted_sum(outputs):
    generator, total = torch.Generator().manual_seed(9), 0.0
    for x in outputs:
        factor = torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5
        total = total + (x * factor.to(x)).sum()
    return total


def hold(ours, theirs, tensors):
    """Both functions of (hidden, weight, bias): results, and gradients of all of them."""
    found = []
    for function, double in ((ours, False), (theirs, False), (theirs, True)):
        students = leaves(tensors, double)
        outputs = function(*students)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weighted_sum(outputs).backward()
        grads = [x.grad for x in students if x is not None]
        found.append([*(x.detach() for x in outputs), *grads])
    for i, (mine, eager, truth) in enumerate(zip(*found, strict=True)):
        assert mine.shape == truth.shape
        if truth.numel() == 0:
            continue
        if tensors[0].dtype == torch.float32:
            # products round too, in another order: eager's error, or 2e-6 of the largest entry
            error, its_error = (mine - truth).abs().max(), (eager - truth).abs().max()
            assert error <= 2 * its_error + 2e-6 * truth.abs().max(), f"result {i}: {error}"
        else:
            condition = 1.0
            if len(outputs) > 1 and i == truth.dim() == 0:  # a sum of the others, which may cancel
                size = sum(x.abs().sum() for x in found[2][1 : len(outputs)])
                condition = max(1.0, (size / truth.abs()).item())
            assert_close(f"result {i}", mine, eager, truth, condition)
    return found[0]


def multiply_as_on_gpu(out, a, b, alpha=1.0, add=False):
    """Half-precision operands, summed in float32, with a result in either."""
    product = a.float() @ b.float() if a.dtype in products.HALF else a @ b
    product = product * alpha
    out.copy_(out + product if add else product)


def use_gpu_products(monkeypatch):
    """Let the engine choose blocks and dtypes as on a GPU."""
    for module in (products, projection, engine):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(projection, "multiply", multiply_as_on_gpu)


def count_products(monkeypatch) -> list:
    """The shapes of the products' results, as they are made."""
    calls = []
    original = projection.multiply
    monkeypatch.setattr(
        projection, "multiply", lambda *a, **k: (calls.append(a[0].shape), original(*a, **k))
    )
    return calls


def blocks_of(monkeypatch, tokens, rows):
    """Let the engine take blocks of so many tokens, so many rows under work."""
    monkeypatch.setattr(engine, "split", lambda *_, **__: Blocks(tokens, rows))
