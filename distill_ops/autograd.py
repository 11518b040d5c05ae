"""Autograd of the dense loss, and what else watches a call: tracing, transforms, vmap."""

import functools

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from . import ops
from .ops import BACKWARD, FORWARD, N_SHARED, N_TENSORS, NO_GRADIENT, Options
from .paths import device_of

NAME = "distillation_loss"


def _save_inputs(ctx, inputs, *others) -> None:
    """Save the operator's tensors for the backward."""
    *tensors, parameters = inputs
    ctx.n_single = len(tensors)
    tensors += parameters
    # the tensors made under inference mode cannot be saved, and cannot change either
    traced = torch.compiler.is_compiling()
    ctx.unsaved = [
        t if not traced and t is not None and t.is_inference() else None for t in tensors
    ]
    saved = [t if u is None else None for t, u in zip(tensors, ctx.unsaved, strict=True)]
    ctx.save_for_backward(*saved, *others)


def _saved_inputs(ctx) -> tuple[tuple, torch.Tensor]:
    """The operator's tensors again, and what was saved beside them."""
    *tensors, other = ctx.saved_tensors
    tensors = [s if u is None else u for s, u in zip(tensors, ctx.unsaved, strict=True)]
    return (*tensors[: ctx.n_single], tensors[ctx.n_single :]), other


def _setup_context(ctx, inputs, output) -> None:
    keep_for_backward(ctx, inputs, output, N_TENSORS)


def keep_for_backward(ctx, inputs, output, n_tensors: int) -> None:
    """Save what the backward needs of a loss operator's arguments, the first ``n_tensors`` being
    tensors and the last of these a list, and of its output."""
    _, components, kept = output
    *options, mode, _ = inputs[n_tensors:]
    ctx.mark_non_differentiable(components, kept)
    ctx.set_materialize_grads(False)
    ctx.mode, ctx.options = mode, options
    ctx.n_parameters = len(inputs[n_tensors - 1])
    ctx.spent = False
    if ctx.mode == FORWARD:
        ctx.save_for_backward(kept)
    elif ctx.mode == BACKWARD:
        _save_inputs(ctx, inputs[:n_tensors], kept)
    else:
        raise RuntimeError("a loss with gradient='none' got a student that requires grad")


def _scale_(gradient: torch.Tensor, upstream: torch.Tensor, backend: str) -> None:
    """``gradient *= upstream``, which on a GPU is read there."""
    if gradient.device.type == "cpu":
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
    elif backend == "triton" and gradient.is_contiguous():
        from .kernels import reduction

        with device_of(gradient):
            reduction.scale_(gradient, upstream)
    else:
        gradient.mul_(upstream)


def _check_backward(ctx, name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its backward was called with "
            f"create_graph=True (torch.func.grad does that too). Use "
            f"distill_ops.reference.{name} where one is needed."
        )
    if ctx.spent:
        raise RuntimeError(
            f"{name} was called with a gradient made in the forward (or inplace=True), "
            "which the first backward used up: pass gradient='backward' without inplace to call "
            "backward again (retain_graph=True)"
        )


def student_gradient(ctx, upstream, gradient_op, name: str):
    """What the backward of a loss returns for the student's logits."""
    if upstream is None:
        return None
    _check_backward(ctx, name)
    if ctx.mode == BACKWARD:
        inputs, statistics = _saved_inputs(ctx)
        return gradient_op(*inputs, *ctx.options, statistics, upstream)
    (gradient,) = ctx.saved_tensors
    if type(upstream) is not torch.Tensor:  # being traced: leave the saved tensor alone
        return gradient * upstream
    ctx.spent = True
    _scale_(gradient, upstream, _backend(ctx))
    return gradient


def _backend(ctx) -> str:
    choices, *_ = ctx.options
    return choices[Options._fields.index("backend")]


def no_gradients(ctx, n_tensors: int) -> list[None]:
    """For the arguments after the student: PyTorch wants an entry for each tensor of the list, too."""
    others = [None] * (n_tensors + len(ctx.options) + 1)
    others[n_tensors - 2] = [None] * ctx.n_parameters
    return others


def _backward(ctx, upstream, *_):
    gradient = student_gradient(ctx, upstream, ops.dense_gradient_op, NAME)
    return gradient, *no_gradients(ctx, N_TENSORS)


torch.library.register_autograd(
    "distill_ops::dense_loss", _backward, setup_context=_setup_context, lib=ops.library
)


def one_by_one(loss_op, info, in_dims, *arguments):
    """vmap of a loss: independent problems, one after the other."""

    def part(value, dim, i):
        if isinstance(value, list) and isinstance(dim, list):
            return [part(*item, i) for item in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    outputs = [
        loss_op(*(part(*item, i) for item in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0)


torch.library.register_vmap(
    "distill_ops::dense_loss", functools.partial(one_by_one, ops.dense_loss_op), lib=ops.library
)


class _DenseLoss(torch.autograd.Function):
    """The same forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx, *arguments):
        output = ops.dense_loss(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, upstream, *_):
        gradient = student_gradient(ctx, upstream, ops.dense_gradient_op, NAME)
        return gradient, *(None,) * (N_SHARED + 1)


class _DenseLossInplace(torch.autograd.Function):
    """The gradient overwrites the student's logits: in the forward, or in the backward."""

    @staticmethod
    def forward(ctx, *arguments):
        *shared, ctx.mode, components = arguments
        ctx.options = shared[N_TENSORS:]
        ctx.spent = False
        ctx.set_materialize_grads(False)
        if ctx.mode == FORWARD:
            loss, components = ops.dense_loss_inplace_op(*shared, components)
            ctx.save_for_backward(shared[0])
        else:
            loss, components, statistics = ops.dense_loss_op(*shared, BACKWARD, components)
            _save_inputs(ctx, shared[:N_TENSORS], statistics)
        ctx.mark_non_differentiable(components)
        return loss, components

    @staticmethod
    def backward(ctx, upstream, *_):
        others = (None,) * (N_SHARED + 1)
        if upstream is None:
            return None, *others
        _check_backward(ctx, NAME)
        traced = torch.compiler.is_compiling() or type(upstream) is not torch.Tensor
        if ctx.mode == BACKWARD:
            inputs, statistics = _saved_inputs(ctx)
            if traced:  # the compiler plans the memory
                arguments = (*inputs, *ctx.options, statistics, upstream)
                return ops.dense_gradient_op(*arguments), *others
            ctx.spent = True
            ops.dense_gradient_inplace_op(*inputs, *ctx.options, statistics, upstream)
            return inputs[0].detach(), *others
        (student,) = ctx.saved_tensors
        if traced:
            return student * upstream, *others
        ctx.spent = True
        gradient = student.detach()
        _scale_(gradient, upstream, _backend(ctx))
        ops.increment_version(student)
        return gradient, *others


def _refuse_transforms(student: torch.Tensor, name: str) -> bool:
    """Whether a functorch transform is active; those that differentiate are refused."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(student).tangent is not None:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (forward_ad, torch.func.jvp, "
            f"torch.func.jacfwd): use loss.backward(), or distill_ops.reference.{name}"
        )
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return False
    if interpreter.key() in (TransformType.Grad, TransformType.Jvp):
        raise NotImplementedError(
            f"{name} cannot be differentiated by torch.func transforms: use "
            f"loss.backward(), or distill_ops.reference.{name}"
        )
    return True


def watched(name: str, student: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether something watches the dispatcher: tracing, a transform or a mode, a tensor's class.

    Raises:
        NotImplementedError: a transform that differentiates.
    """
    if torch.compiler.is_compiling():
        return True
    transformed = _refuse_transforms(student, name)
    plain = all(t is None or type(t) is torch.Tensor for t in (student, *others))
    return transformed or not plain or bool(torch._C._len_torch_dispatch_stack())


def dense_loss(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator, called directly where nothing watches the dispatcher: on plain tensors, when
    nothing traces, the way through it would be 90 of 235 microseconds on a tiny tensor."""
    if watched(NAME, *arguments[:2]):
        return ops.dense_loss_op(*arguments)
    if arguments[N_SHARED] == NO_GRADIENT:
        return ops.dense_loss(*arguments)
    return _DenseLoss.apply(*arguments)


def dense_loss_inplace(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss whose gradient overwrites the student's logits, which require grad."""
    if not torch.compiler.is_compiling() and _refuse_transforms(arguments[0], NAME):
        raise NotImplementedError("inplace=True cannot be used under torch.func transforms")
    return _DenseLossInplace.apply(*arguments)
