"""Registration with PyTorch: opaque operators, their shapes for tracing, and autograd.

``dense_loss`` computes the loss and, where a gradient will be wanted, either the gradient itself
(made in the forward) or what ``dense_gradient`` needs to make it in the backward. ``scale_``
multiplies a finished gradient by the incoming one. Inside, Triton kernels or the CPU path.
"""

import math
from dataclasses import dataclass, fields

import torch

from . import host
from .chunks import Terms
from .divergences import DIVERGENCES, Divergence

NO_GRADIENT, FORWARD, BACKWARD = "none", "forward", "backward"

STATISTICS = 9  # float32 numbers a token that the Triton path keeps for a gradient made backward


@dataclass(frozen=True, slots=True)
class Dense:
    """The arguments that the dense operators share, in the order of their schema."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor | None  # [..., V]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    divergence: str
    parameters: list[float]
    temperature: float
    divergence_scale: float
    hard_label_weight: float
    ignore_index: int
    reduction: str
    denominator: float | None
    propagate: bool
    n_cols: int
    triton: bool

    def instance(self) -> Divergence | None:
        """The divergence; None where the hard label has all the weight."""
        if self.hard_label_weight == 1:
            return None
        return DIVERGENCES[self.divergence](*self.parameters)

    @property
    def n_rows(self) -> int:
        return self.student.numel() // self.student.shape[-1]

    def dtype(self) -> torch.dtype:
        """Of sums and of the loss: float32, or float64 where an input is float64."""
        inputs = (self.student, self.teacher)
        wide = any(x is not None and x.dtype == torch.float64 for x in inputs)
        return torch.float64 if wide else torch.float32

    def result_shapes(self, components: bool) -> tuple[tuple, tuple]:
        """Shapes of the loss and of its components."""
        shape = self.student.shape[:-1] if self.reduction == "none" else ()
        parts = (2, *shape) if components and self.hard_label_weight > 0 else (0,)
        return shape, parts


N_SHARED = len(fields(Dense))
_SHARED = (
    "Tensor student, Tensor? teacher, Tensor? loss_mask, Tensor? labels, Tensor? normalizer, "
    "str divergence, float[] parameters, float temperature, float divergence_scale, "
    "float hard_label_weight, int ignore_index, str reduction, float? denominator, "
    "bool propagate, SymInt n_cols, bool triton"
)

_library = torch.library.Library("distill_ops", "DEF")
_library.define(
    f"dense_loss({_SHARED}, str gradient, bool components)"
    " -> (Tensor loss, Tensor components, Tensor gradient, Tensor statistics)"
)
_library.define(f"dense_gradient({_SHARED}, Tensor statistics, Tensor upstream) -> Tensor")
_library.define("scale_(Tensor(a!) gradient, Tensor upstream) -> ()")


# --- CPU path ------------------------------------------------------------------------------------


def _host_scales(dense: Dense):
    """Labels and weights ``[N]`` (None: all 1), and the reduction's denominator."""
    dtype, labels, weights = dense.dtype(), dense.labels, None
    if dense.loss_mask is not None:
        weights = dense.loss_mask.reshape(-1).to(dtype)
    if labels is not None:
        labels = labels.reshape(-1)
        kept = labels != dense.ignore_index
        weights = kept.to(dtype) if weights is None else weights.masked_fill(~kept, 0.0)
    if dense.reduction != "mean":
        return labels, weights, 1.0
    if dense.n_rows == 0 or (weights is not None and not weights.any()):
        return labels, weights, 1.0  # no token kept: loss 0
    if dense.denominator is not None:
        over = dense.denominator
    elif dense.normalizer is not None:
        over = dense.normalizer.to(dtype)
    else:
        over = dense.n_rows if weights is None else weights.sum()
    return labels, weights, over


def _host_run(dense: Dense, labels, weights, over, upstream, gradient):
    scale = 1.0 / over if isinstance(over, torch.Tensor) or over != 0 else math.inf
    if upstream is not None:
        upstream = upstream.to(dense.dtype())
        scale = scale * (upstream.reshape(-1, 1) if upstream.dim() else upstream.item())
    if weights is not None:
        scale = weights[:, None] * scale
    w = dense.hard_label_weight
    terms = Terms(dense.instance(), w > 0, dense.temperature, dense.propagate, dense.dtype())
    return host.dense(
        terms, dense.student, dense.teacher, labels, weights,
        scale * ((1 - w) * dense.divergence_scale / dense.temperature), scale * w,
        dense.n_cols, gradient,
    )  # fmt: skip


def _host_loss(dense: Dense, gradient, with_components: bool):
    labels, weights, over = _host_scales(dense)
    divergence_loss, hard_loss = _host_run(dense, labels, weights, over, None, gradient)
    shape = dense.student.shape[:-1]

    def reduced(losses):
        if weights is not None:
            losses = torch.where(weights == 0, 0.0, losses * weights)
        if dense.reduction == "none":
            return losses.reshape(shape)
        return losses.sum() / over if dense.reduction == "mean" else losses.sum()

    if divergence_loss is not None and dense.divergence_scale != 1:
        divergence_loss = divergence_loss * dense.divergence_scale
    if hard_loss is None:
        return reduced(divergence_loss), None
    if divergence_loss is None:
        loss, divergence_loss = hard_loss, torch.zeros_like(hard_loss)
    else:
        w = dense.hard_label_weight
        loss = (1 - w) * divergence_loss + w * hard_loss
    components = None
    if with_components:
        components = torch.stack([reduced(divergence_loss), reduced(hard_loss)])
    return reduced(loss), components


# --- Triton path ---------------------------------------------------------------------------------


def _formula(dense: Dense):
    from .kernels.dense import Formula

    divergence = dense.instance()
    return Formula(
        value_and_slope=None if divergence is None else divergence.value_and_slope,
        parameters=() if divergence is None else divergence.parameters,
        moment="none" if divergence is None else divergence.moment,
        drop=divergence is not None and divergence.infinite_at_student_zero,
        restrict=divergence is not None and divergence.infinite_at_teacher_zero,
        propagate=dense.propagate,
        temperature=dense.temperature,
        divergence_scale=dense.divergence_scale,
        hard_label_weight=dense.hard_label_weight,
    )


def _flat(per_token: torch.Tensor | None) -> torch.Tensor | None:
    return None if per_token is None else per_token.reshape(-1).contiguous()


def _triton_loss(dense: Dense, gradient, statistics, with_components: bool):
    from .kernels import dense as kernel
    from .kernels import reduction

    labels, weights = _flat(dense.labels), None
    n_rows, new = dense.n_rows, dense.student.new_empty
    over = 1.0
    if dense.reduction == "mean":
        over = float(max(n_rows, 1))
    if labels is not None or dense.loss_mask is not None:
        weights, total = reduction.token_weights(_flat(dense.loss_mask), labels, dense.ignore_index)
        over = total if dense.reduction == "mean" else over
    if dense.denominator is not None:
        over = dense.denominator
    elif dense.normalizer is not None:
        over = dense.normalizer
    losses = new(n_rows, dtype=torch.float32)
    n_components = 2 if dense.hard_label_weight > 0 else 0
    components = new((n_components, n_rows), dtype=torch.float32)
    kernel.run(
        _formula(dense), dense.student, dense.teacher, labels, dense.n_cols, gradient=gradient,
        statistics=statistics, losses=losses, components=components, weights=weights,
        denominator=over,
    )  # fmt: skip
    shape = dense.student.shape[:-1]
    if not with_components:
        components = components[:0]
    if dense.reduction == "none":
        return losses.view(shape), components.view(-1, *shape) if with_components else None
    return reduction.total(losses, components, weights, over)


# --- Operators -----------------------------------------------------------------------------------


def _dense_loss(*arguments):
    dense = Dense(*arguments[:N_SHARED])
    mode, with_components = arguments[N_SHARED:]
    with_components = with_components and dense.hard_label_weight > 0
    new = dense.student.new_empty
    gradient = host.empty_gradient(dense.student) if mode == FORWARD else None
    statistics = None
    if mode == BACKWARD and dense.triton:
        statistics = new((dense.n_rows, STATISTICS), dtype=torch.float32)
    if dense.triton:
        loss, components = _triton_loss(dense, gradient, statistics, with_components)
    else:
        loss, components = _host_loss(dense, gradient, with_components)
    return (
        loss,
        components if with_components else new(0, dtype=dense.dtype()),
        new(0) if gradient is None else gradient,
        new(0, dtype=torch.float32) if statistics is None else statistics,
    )


def _dense_loss_fake(*arguments):
    dense = Dense(*arguments[:N_SHARED])
    mode, with_components = arguments[N_SHARED:]
    new, dtype = dense.student.new_empty, dense.dtype()
    shape, parts = dense.result_shapes(with_components)
    kept = mode == BACKWARD and dense.triton
    return (
        new(shape, dtype=dtype),
        new(parts, dtype=dtype),
        new(dense.student.shape if mode == FORWARD else 0),
        new((dense.n_rows, STATISTICS) if kept else 0, dtype=torch.float32),
    )


def _dense_gradient(*arguments):
    dense = Dense(*arguments[:N_SHARED])
    statistics, upstream = arguments[N_SHARED:]
    gradient = host.empty_gradient(dense.student)
    if dense.triton:
        from .kernels import dense as kernel

        upstream = upstream.reshape(-1) if upstream.dim() else upstream
        kernel.run(
            _formula(dense), dense.student, dense.teacher, _flat(dense.labels), dense.n_cols,
            gradient=gradient, statistics=statistics, upstream=upstream,
        )  # fmt: skip
    else:
        _host_run(dense, *_host_scales(dense), upstream, gradient)
    return gradient


def _dense_gradient_fake(*arguments):
    student = arguments[0]
    return student.new_empty(student.shape)


def _scale(gradient: torch.Tensor, upstream: torch.Tensor) -> None:
    if gradient.device.type == "cpu":
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
    else:
        from .kernels import reduction

        reduction.scale_(gradient, upstream)


for _name, _function in [
    ("dense_loss", _dense_loss),
    ("dense_gradient", _dense_gradient),
    ("scale_", _scale),
]:
    _library.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("distill_ops::dense_loss", _dense_loss_fake, lib=_library)
torch.library.register_fake("distill_ops::dense_gradient", _dense_gradient_fake, lib=_library)
torch.library.register_fake("distill_ops::scale_", lambda gradient, upstream: None, lib=_library)

dense_loss = torch.ops.distill_ops.dense_loss.default


# --- Autograd ------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, loss_mask, labels, normalizer, *options = inputs
    _, components, gradient, statistics = output
    ctx.mark_non_differentiable(components, gradient, statistics)
    ctx.set_materialize_grads(False)
    ctx.mode = inputs[N_SHARED]
    ctx.spent = False
    if ctx.mode == FORWARD:
        ctx.save_for_backward(gradient)
    elif ctx.mode == BACKWARD:
        ctx.options = options[: N_SHARED - 5]
        ctx.save_for_backward(student, teacher, loss_mask, labels, normalizer, statistics)
    else:
        raise RuntimeError("dense_loss with gradient='none' got a student that requires grad")


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * (N_SHARED + 2)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "distillation_loss has no second derivative: its backward was called with "
            "create_graph=True (torch.func.grad does that too). Use "
            "distill_ops.reference.distillation_loss where one is needed."
        )
    if ctx.mode == BACKWARD:
        tensors = ctx.saved_tensors
        gradient = torch.ops.distill_ops.dense_gradient(
            *tensors[:5], *ctx.options, tensors[5], upstream
        )
    else:
        (gradient,) = ctx.saved_tensors
        if type(upstream) is not torch.Tensor:  # being traced: leave the saved tensor alone
            gradient = gradient * upstream
        elif ctx.spent:
            raise RuntimeError(
                "distillation_loss was called with a gradient made in the forward, which the first "
                "backward used up: pass gradient='backward' to call backward again (retain_graph=True)"
            )
        else:
            ctx.spent = True
            torch.ops.distill_ops.scale_(gradient, upstream)
    return (gradient,) + (None,) * (N_SHARED + 1)


torch.library.register_autograd(
    "distill_ops::dense_loss", _backward, setup_context=_setup_context, lib=_library
)
