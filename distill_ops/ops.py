"""Registration with PyTorch: opaque operators, their shapes for tracing, and autograd.

``dense_loss`` computes the loss and, where a gradient will be wanted, either the gradient itself
(made in the forward) or what ``dense_gradient`` needs to make it in the backward. Inside, Triton
kernels or the CPU path.

The options travel in three lists, because PyTorch's own cost of a call grows with the square of
the number of arguments (86 of 330 microseconds with 18 of them).
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from . import host
from .chunks import Terms
from .divergences import DIVERGENCES, Divergence
from .kernels.launch import STATISTICS

NO_GRADIENT, FORWARD, BACKWARD = "none", "forward", "backward"


class Options(NamedTuple):
    """The options of the dense operators; ``pack`` and ``unpack`` are each other's inverse."""

    divergence: str
    reduction: str
    infinities: str
    backend: str  # "triton" or "torch"
    temperature: float
    divergence_scale: float  # 1, or temperature squared
    hard_label_weight: float
    denominator: float  # of "mean", where a number was given; else NaN
    parameters: tuple[float, ...]  # of the divergence; NaN: given as a tensor
    n_cols: int
    ignore_index: int

    def pack(self) -> tuple[list[str], list[float], list[int]]:
        return list(self[:4]), [*self[4:8], *self.parameters], list(self[9:])

    @classmethod
    def unpack(cls, choices: list[str], numbers: list[float], sizes: list[int]) -> "Options":
        return cls(*choices, *numbers[:4], tuple(numbers[4:]), *sizes)

    def kind(self) -> type[Divergence] | None:
        """The divergence's class, which has its facts; None where the hard label has all the weight."""
        return None if self.hard_label_weight == 1 else DIVERGENCES[self.divergence]


class Inputs(NamedTuple):
    """The tensors of the dense operators."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor | None  # [..., V]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]: those of the divergence that are tensors

    @property
    def n_rows(self) -> int:
        return self.student.numel() // self.student.shape[-1]

    def dtype(self) -> torch.dtype:
        """Of sums and of the loss: float32, or float64 where an input is float64."""
        if self.student.dtype == torch.float64:
            return torch.float64
        wide = self.teacher is not None and self.teacher.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    def resolve(self, options: "Options") -> tuple[float | torch.Tensor, ...]:
        """The divergence's parameters in order: numbers, and tensors ``[]`` or ``[N]``."""
        tensors = (t.reshape(-1) if t.dim() else t for t in self.parameters)
        return tuple(next(tensors) if math.isnan(x) else x for x in options.parameters)


_ARGUMENTS = (
    "Tensor student, Tensor? teacher, Tensor? loss_mask, Tensor? labels, Tensor? normalizer, "
    "Tensor[] parameters, str[] choices, float[] numbers, SymInt[] sizes"
)

_library = torch.library.Library("distill_ops", "DEF")
_library.define(
    f"dense_loss({_ARGUMENTS}, str gradient, bool components)"
    " -> (Tensor loss, Tensor components, Tensor kept)"
)
_library.define(f"dense_gradient({_ARGUMENTS}, Tensor statistics, Tensor upstream) -> Tensor")


# --- CPU path ------------------------------------------------------------------------------------


def _host_scales(inputs: Inputs, options: Options):
    """Labels and weights ``[N]`` (None: all 1), and the reduction's denominator."""
    dtype, labels, weights = inputs.dtype(), inputs.labels, None
    if inputs.loss_mask is not None:
        weights = inputs.loss_mask.reshape(-1).to(dtype)
    if labels is not None:
        labels = labels.reshape(-1)
        kept = labels != options.ignore_index
        weights = kept.to(dtype) if weights is None else weights.masked_fill(~kept, 0.0)
    if options.reduction != "mean":
        return labels, weights, 1.0
    if inputs.n_rows == 0 or (weights is not None and not weights.any()):
        return labels, weights, 1.0  # no token kept: loss 0
    if inputs.normalizer is not None:
        return labels, weights, inputs.normalizer.to(dtype)
    if not math.isnan(options.denominator):
        return labels, weights, options.denominator
    return labels, weights, inputs.n_rows if weights is None else weights.sum()


def _host_run(inputs: Inputs, options: Options, scales, upstream, gradient):
    labels, weights, over = scales
    scale = 1.0 / over if isinstance(over, torch.Tensor) or over != 0 else math.inf
    if upstream is not None:
        upstream = upstream.to(inputs.dtype())
        scale = scale * (upstream.reshape(-1, 1) if upstream.dim() else upstream.item())
    if weights is not None:
        scale = weights[:, None] * scale
    w = options.hard_label_weight
    parameters = []
    for value in inputs.resolve(options):
        if isinstance(value, torch.Tensor):
            value = value.to(inputs.dtype())
            value = value[:, None] if value.dim() else value
        parameters.append(value)
    terms = Terms(
        options.kind(),
        w > 0,
        options.temperature,
        options.infinities == "propagate",
        inputs.dtype(),
    )
    return host.dense(
        terms, inputs.student, inputs.teacher, labels, weights,
        scale * ((1 - w) * options.divergence_scale / options.temperature), scale * w,
        parameters, options.n_cols, gradient,
    )  # fmt: skip


def _host_loss(inputs: Inputs, options: Options, gradient, with_components: bool):
    scales = _host_scales(inputs, options)
    _, weights, over = scales
    divergence_loss, hard_loss = _host_run(inputs, options, scales, None, gradient)

    def reduced(losses):
        if weights is not None:
            losses = torch.where(weights == 0, 0.0, losses * weights)
        if options.reduction == "none":
            return losses.reshape(inputs.student.shape[:-1])
        return losses.sum() / over

    if divergence_loss is not None and options.divergence_scale != 1:
        divergence_loss = divergence_loss * options.divergence_scale
    if hard_loss is None:
        return reduced(divergence_loss), None
    if divergence_loss is None:
        loss, divergence_loss = hard_loss, torch.zeros_like(hard_loss)
    else:
        w = options.hard_label_weight
        loss = (1 - w) * divergence_loss + w * hard_loss
    components = None
    if with_components:
        components = torch.stack([reduced(divergence_loss), reduced(hard_loss)])
    return reduced(loss), components


# --- Triton path ---------------------------------------------------------------------------------


def _device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _formula(inputs: Inputs, options: Options):
    from .kernels.dense import Formula

    divergence = options.kind()
    return Formula(
        value_and_slope=None if divergence is None else divergence.value_and_slope,
        parameters=() if divergence is None else inputs.resolve(options),
        paired=divergence is not None and divergence.paired,
        moment="none" if divergence is None else divergence.moment,
        drop=divergence is not None and divergence.infinite_at_student_zero,
        restrict=divergence is not None and divergence.infinite_at_teacher_zero,
        propagate=options.infinities == "propagate",
        temperature=options.temperature,
        divergence_scale=options.divergence_scale,
        hard_label_weight=options.hard_label_weight,
    )


def _flat(per_token: torch.Tensor | None) -> torch.Tensor | None:
    return None if per_token is None else per_token.reshape(-1).contiguous()


def _triton_loss(inputs: Inputs, options: Options, gradient, statistics, with_components: bool):
    from .kernels import dense as kernel
    from .kernels import reduction

    labels, weights = _flat(inputs.labels), None
    n_rows, new = inputs.n_rows, inputs.student.new_empty
    over = float(max(n_rows, 1)) if options.reduction == "mean" else 1.0
    if labels is not None or inputs.loss_mask is not None:
        mask = _flat(inputs.loss_mask)
        weights, total = reduction.token_weights(mask, labels, options.ignore_index)
        over = total if options.reduction == "mean" else over
    if inputs.normalizer is not None:
        over = inputs.normalizer
    elif not math.isnan(options.denominator):
        over = options.denominator
    if n_rows == 0:
        over = 1.0  # loss 0, as where no token is kept
    losses = new(n_rows, dtype=torch.float32)
    components = new((2 if options.hard_label_weight > 0 else 0, n_rows), dtype=torch.float32)
    kernel.run(
        _formula(inputs, options), inputs.student, inputs.teacher, labels, options.n_cols,
        gradient=gradient, statistics=statistics, losses=losses, components=components,
        weights=weights, denominator=over,
    )  # fmt: skip
    if not with_components:
        components = components[:0]
    if options.reduction == "none":
        shape = inputs.student.shape[:-1]
        return losses.view(shape), components.view(2, *shape) if with_components else None
    return reduction.total(losses, components, weights, over)


# --- Operators -----------------------------------------------------------------------------------

N_TENSORS = len(Inputs._fields)
N_SHARED = N_TENSORS + 3


def _empty_gradient(student: torch.Tensor) -> torch.Tensor:
    # On Linux most of a fresh CPU buffer's cost is its page faults. Asking for huge pages
    # (MADV_HUGEPAGE) was tried: 20 ms less of 80 at the median, but 200 ms more in every third call
    # of a virtual machine that returns freed memory to its host.
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _parse(arguments) -> tuple[Inputs, Options]:
    return Inputs(*arguments[:N_TENSORS]), Options.unpack(*arguments[N_TENSORS:N_SHARED])


def _dense_loss(*arguments):
    """The loss; its components where asked for; and what is kept for the backward, the gradient
    (made in the forward) or the statistics of the Triton path."""
    inputs, options = _parse(arguments)
    mode, with_components = arguments[N_SHARED:]
    with_components = with_components and options.hard_label_weight > 0
    new = inputs.student.new_empty
    gradient = _empty_gradient(inputs.student) if mode == FORWARD else None
    statistics = None
    if options.backend == "triton":
        if mode == BACKWARD:
            statistics = new((inputs.n_rows, STATISTICS), dtype=torch.float32)
        with _device_of(inputs.student):
            loss, components = _triton_loss(inputs, options, gradient, statistics, with_components)
    else:
        loss, components = _host_loss(inputs, options, gradient, with_components)
    if not with_components:
        components = new(0, dtype=loss.dtype)
    kept = statistics if gradient is None else gradient
    return loss, components, new(0) if kept is None else kept


def _dense_loss_fake(*arguments):
    inputs, options = _parse(arguments)
    mode, with_components = arguments[N_SHARED:]
    new, dtype = inputs.student.new_empty, inputs.dtype()
    shape = inputs.student.shape[:-1] if options.reduction == "none" else ()
    parts = (2, *shape) if with_components and options.hard_label_weight > 0 else 0
    if mode == BACKWARD and options.backend == "triton":
        kept = new((inputs.n_rows, STATISTICS), dtype=torch.float32)
    else:
        kept = new(inputs.student.shape if mode == FORWARD else 0)
    return new(shape, dtype=dtype), new(parts, dtype=dtype), kept


def _dense_gradient(*arguments):
    inputs, options = _parse(arguments)
    statistics, upstream = arguments[N_SHARED:]
    gradient = _empty_gradient(inputs.student)
    if options.backend == "triton":
        from .kernels import dense as kernel

        with _device_of(inputs.student):
            kernel.run(
                _formula(inputs, options), inputs.student, inputs.teacher, _flat(inputs.labels),
                options.n_cols, gradient=gradient, statistics=statistics,
                upstream=upstream.reshape(-1) if upstream.dim() else upstream,
            )  # fmt: skip
    else:
        _host_run(inputs, options, _host_scales(inputs, options), upstream, gradient)
    return gradient


def _dense_gradient_fake(student, *_):
    return student.new_empty(student.shape)


for _name, _function, _fake in [
    ("dense_loss", _dense_loss, _dense_loss_fake),
    ("dense_gradient", _dense_gradient, _dense_gradient_fake),
]:
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=_library)

dense_loss_op = torch.ops.distill_ops.dense_loss.default
dense_gradient_op = torch.ops.distill_ops.dense_gradient.default


# --- Autograd ------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    _, components, kept = output
    ctx.mark_non_differentiable(components, kept)
    ctx.set_materialize_grads(False)
    ctx.mode = inputs[N_SHARED]
    ctx.options = inputs[N_TENSORS:N_SHARED]
    ctx.n_parameters = len(inputs[N_TENSORS - 1])
    ctx.spent = False
    if ctx.mode == FORWARD:
        ctx.save_for_backward(kept)
    elif ctx.mode == BACKWARD:
        *tensors, parameters = inputs[:N_TENSORS]
        tensors += parameters
        # the tensors made under inference mode cannot be saved, and cannot change either
        ctx.unsaved = [t if t is not None and t.is_inference() else None for t in tensors]
        saved = [t if u is None else None for t, u in zip(tensors, ctx.unsaved, strict=True)]
        ctx.save_for_backward(*saved, kept)
    else:
        raise RuntimeError("dense_loss with gradient='none' got a student that requires grad")


def _scale_(gradient: torch.Tensor, upstream: torch.Tensor, backend: str) -> None:
    """``gradient *= upstream``, which on a GPU is read there."""
    if gradient.device.type == "cpu":
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
    elif backend == "triton":
        from .kernels import reduction

        with _device_of(gradient):
            reduction.scale_(gradient, upstream)
    else:
        gradient.mul_(upstream)


def _student_gradient(ctx, upstream):
    if upstream is None:
        return None
    if torch.is_grad_enabled():
        raise RuntimeError(
            "distillation_loss has no second derivative: its backward was called with "
            "create_graph=True (torch.func.grad does that too). Use "
            "distill_ops.reference.distillation_loss where one is needed."
        )
    if ctx.mode == BACKWARD:
        *tensors, statistics = ctx.saved_tensors
        tensors = [s if u is None else u for s, u in zip(tensors, ctx.unsaved, strict=True)]
        inputs = (*tensors[: N_TENSORS - 1], tensors[N_TENSORS - 1 :])
        return dense_gradient_op(*inputs, *ctx.options, statistics, upstream)
    if ctx.spent:
        raise RuntimeError(
            "distillation_loss was called with a gradient made in the forward, which the first "
            "backward used up: pass gradient='backward' to call backward again (retain_graph=True)"
        )
    (gradient,) = ctx.saved_tensors
    if type(upstream) is not torch.Tensor:  # being traced: leave the saved tensor alone
        return gradient * upstream
    ctx.spent = True
    _scale_(gradient, upstream, Options.unpack(*ctx.options).backend)
    return gradient


def _backward(ctx, upstream, *_):
    others = [None] * (N_SHARED + 1)  # PyTorch wants an entry for each tensor of the list, too
    others[N_TENSORS - 2] = [None] * ctx.n_parameters
    return _student_gradient(ctx, upstream), *others


torch.library.register_autograd(
    "distill_ops::dense_loss", _backward, setup_context=_setup_context, lib=_library
)


def _vmap_loss(info, in_dims, *arguments):
    """Independent problems, one after the other."""

    def part(value, dim, i):
        if isinstance(value, list) and isinstance(dim, list):
            return [part(*item, i) for item in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    outputs = [
        dense_loss_op(*(part(*item, i) for item in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0)


torch.library.register_vmap("distill_ops::dense_loss", _vmap_loss, lib=_library)


class _DenseLoss(torch.autograd.Function):
    """The same forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _dense_loss(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, upstream, *_):
        return _student_gradient(ctx, upstream), *(None,) * (N_SHARED + 1)


def _refuse_transforms(student: torch.Tensor) -> bool:
    """Whether a functorch transform is active; those that differentiate are refused."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(student).tangent is not None:
        raise NotImplementedError(
            "distillation_loss has no forward-mode derivative (forward_ad, torch.func.jvp, "
            "torch.func.jacfwd): use loss.backward(), or distill_ops.reference.distillation_loss"
        )
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return False
    if interpreter.key() in (TransformType.Grad, TransformType.Jvp):
        raise NotImplementedError(
            "distillation_loss cannot be differentiated by torch.func transforms: use "
            "loss.backward(), or distill_ops.reference.distillation_loss"
        )
    return True


def dense_loss(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator, called directly where nothing watches the dispatcher: on plain tensors, when
    nothing traces, the way through it would be 90 of 235 microseconds on a tiny tensor."""
    if torch.compiler.is_compiling():
        return dense_loss_op(*arguments)
    student, teacher, *_ = arguments
    transformed = _refuse_transforms(student)
    plain = type(student) is torch.Tensor and (teacher is None or type(teacher) is torch.Tensor)
    if transformed or not plain or torch._C._len_torch_dispatch_stack():
        return dense_loss_op(*arguments)
    if arguments[N_SHARED] == NO_GRADIENT:
        return _dense_loss(*arguments)
    return _DenseLoss.apply(*arguments)
