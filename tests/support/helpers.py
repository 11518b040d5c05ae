"""Inputs and the numeric rule that every test shares."""

import math
from typing import NamedTuple

import torch

from distill_ops import reference, topk_distillation_loss
from distill_ops.divergences.base import as_divergence
from distill_ops.problem import working_dtype


def make_logits(shape, *, seed=0, dtype=torch.float32, scale=2.0, offset=0.0, device="cpu"):
    """Student and teacher logits, related but not equal: half of each is noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    common, student, teacher = torch.randn(3, *shape, generator=generator) * scale
    pair = (common + student, common + teacher)
    return tuple((x / math.sqrt(2) + offset).to(dtype).to(device) for x in pair)


def make_ids(shape, n_cols, *, seed=3, device="cpu", ignored=True):
    """Token ids, one of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, n_cols, shape, generator=generator)
    if ignored and ids.numel() > 2:
        ids.view(-1)[1] = -100
    return ids.to(device)


def moved(options, device):
    """Options with their tensors on a device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


class Result(NamedTuple):
    """A loss and the gradient it gave, for one upstream gradient."""

    loss: torch.Tensor
    gradient: torch.Tensor


def run(loss_function, student, teacher, *, upstream_seed=1, **options) -> Result:
    """Loss and gradient, the loss being an inner node of the graph with a random upstream (1 for
    no seed)."""
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    # the leaf keeps the strides of a view, which clone would not
    if student.stride() != leaf.stride():
        leaf = torch.empty_strided(student.size(), student.stride(), dtype=student.dtype)
        leaf = leaf.to(student.device).copy_(student).requires_grad_()
    loss = loss_function(leaf, teacher, **options)
    upstream = torch.ones(loss.shape)
    if upstream_seed is not None:
        upstream = (
            torch.rand(loss.shape, generator=torch.Generator().manual_seed(upstream_seed)) + 0.5
        )
    (loss * upstream.to(loss.device, loss.dtype)).sum().backward()
    return Result(loss.detach(), leaf.grad)


def to_float64(value):
    wide = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double() if wide else value


def run_reference(
    student, teacher, *, double, oracle=reference.distillation_loss, **options
) -> Result:
    """The oracle on the same inputs: in float64 (the truth), or as eager PyTorch computes it."""
    options.pop("gradient", None)
    if double:
        student, teacher = to_float64(student), to_float64(teacher)
        options = {name: to_float64(value) for name, value in options.items()}
    return run(oracle, student, teacher, **options)


def _finite_error(name, ours, eager, truth):
    """Shapes, NaN and infinities must agree; returns the errors of the finite entries."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    ours, eager, truth = ours.double().cpu(), eager.double().cpu(), truth.double().cpu()
    for kind, test in [("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)]:
        wrong = test(ours) != test(truth)
        assert not wrong.any(), (
            f"{name}: {kind} differs at {wrong.nonzero()[0].tolist()}: ours {ours[wrong][0].item()}, "
            f"truth {truth[wrong][0].item()}"
        )
    finite = truth.isfinite()
    return ours[finite], eager[finite], truth[finite]


def condition(student, teacher, options) -> float:
    """What rounding the logarithms by one unit costs the loss, in units: a token's
    ``sum(abs(value) + abs(slope)) / abs(sum(value))``, slope being the value's derivative."""
    if teacher is None or options.get("hard_label_weight", 0.0) == 1 or student.numel() == 0:
        return 1.0
    divergence = as_divergence(options.get("divergence", "soft_cross_entropy"))
    columns, temperature = slice(options.get("vocab_size")), options.get("temperature", 1.0)
    logs = [
        torch.log_softmax(x.detach().double()[..., columns] / temperature, -1)
        for x in (student, teacher)
    ]
    value, slope = divergence.on_columns(*logs, divergence.column_parameters(torch.float64))
    ratios = (value.abs() + slope.abs()).sum(-1) / value.sum(-1).abs()
    return max([1.0, *ratios[ratios.isfinite()].tolist()])


def assert_close(name, ours, eager, truth, condition=1.0):
    """At most twice eager PyTorch's error plus a few units in the last place of the largest value.

    Held for the worst entry and for the root mean square. Truth is float64 on the same rounded
    inputs; nothing here has an absolute floor. Eager may be lucky in one case, hence the units: 8
    in float32, times ``condition``; 1 in half precision, where it is most of a percent.
    """
    eps = torch.finfo(ours.dtype).eps
    units = 8 * condition if eps < 1e-6 else 1
    ours, eager, truth = _finite_error(name, ours, eager, truth)
    if truth.numel() == 0:
        return
    error, eager_error = (ours - truth).abs(), (eager - truth).abs()
    worst = int(error.argmax())
    allowed = 2 * eager_error.max() + units * eps * truth.abs().max()
    assert error[worst] <= allowed, (
        f"{name}: worst entry {worst}: ours {ours[worst].item():.9g}, eager {eager[worst].item():.9g}, "
        f"truth {truth[worst].item():.9g}; error {error[worst].item():.3g} of {allowed.item():.3g} allowed"
    )
    rms, eager_rms, size = (x.square().mean().sqrt() for x in (error, eager_error, truth))
    allowed = 2 * eager_rms + units * eps * size
    assert rms <= allowed, f"{name}: root mean square error {rms:.3g} of {allowed:.3g} allowed"


def assert_close_to_reference(ours: Result, eager: Result, truth: Result, condition=1.0):
    assert_close("loss", ours.loss, eager.loss, truth.loss, condition)
    assert ours.gradient is not None, "no gradient"
    assert_close("gradient", ours.gradient, eager.gradient, truth.gradient)


def check(loss_function, student, teacher, **options):
    """Hold a loss function against the oracle on these inputs; returns its result."""
    ours = run(loss_function, student, teacher, **options)
    options.pop("backend", None)
    assert ours.gradient.dtype == student.dtype
    eager = run_reference(student, teacher, double=False, **options)
    truth = run_reference(student, teacher, double=True, **options)
    assert_close_to_reference(ours, eager, truth, condition(student, teacher, options))
    return ours


def topk_of(teacher, k, temperature=1.0):
    """Log-probabilities and ids of logits' k most likely tokens, in an order that is not theirs."""
    top = torch.log_softmax(teacher.double() / temperature, -1).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(teacher.device)
    return top.values[..., order].to(working_dtype(teacher)), top.indices[..., order]


def topk_condition(student, log_p, ids, options) -> float:
    """As :func:`condition`, of the K and the rest as outcomes."""
    n_cols, temperature = options.get("vocab_size"), options.get("temperature", 1.0)
    log_q = torch.log_softmax(student.detach().double()[..., :n_cols] / temperature, -1)
    used = ids >= 0
    columns = ids.long().clamp(0, log_q.shape[-1] - 1)  # a masked token's may be anything
    q = log_q.gather(-1, columns).masked_fill(~used, -math.inf)
    p = log_p.double().masked_fill(~used, -math.inf)
    pairs = []
    for logs in (q, p):
        rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=2**-24).log()
        pairs.append(torch.cat([logs, rest], -1).clamp(min=-1e4))
    divergence = as_divergence(options.get("divergence", "soft_cross_entropy"))
    value, slope = divergence.on_columns(*pairs, divergence.column_parameters(torch.float64))
    ratios = (value.abs() + slope.abs()).sum(-1) / value.sum(-1).abs()
    return max([1.0, *ratios[ratios.isfinite()].tolist()])


def check_topk(student, log_p, ids, **options):
    """Hold the top-k loss against its oracle on these inputs; returns its result."""
    options["teacher_ids"] = ids
    ours = run(topk_distillation_loss, student, log_p, **options)
    options.pop("backend", None)
    assert ours.gradient.dtype == student.dtype
    oracle = reference.topk_distillation_loss
    eager, truth = (
        run_reference(student, log_p, double=double, oracle=oracle, **options)
        for double in (False, True)
    )
    assert_close_to_reference(ours, eager, truth, topk_condition(student, log_p, ids, options))
    return ours


def assert_compiled_equals_eager(loss_function, student, teacher, **options):
    """One graph, no break, of a loss of logits that a model made."""
    torch.compiler.reset()

    def step(student, teacher, **options):
        result = loss_function(student * 2.0, teacher, **options)
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, graph = (run(f, student, teacher, **options) for f in (step, compiled))
    torch.testing.assert_close(graph.loss, eager.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(graph.gradient, eager.gradient, rtol=1e-6, atol=1e-8)
