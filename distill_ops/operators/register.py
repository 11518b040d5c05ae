"""Autograd of the dense loss, and what else watches a call: tracing, transforms, vmap."""

import torch

from . import ops
from .differentiation import (
    backend_of,
    check_backward,
    keep_for_backward,
    map_in_turn,
    no_gradients,
    refuse_transforms,
    save_inputs,
    saved_inputs,
    scale_,
    student_gradient,
    watched,
)
from .ops import BACKWARD, FORWARD, N_SHARED, N_TENSORS, NO_GRADIENT

NAME = "distillation_loss"


def _setup_context(ctx, inputs, output) -> None:
    keep_for_backward(ctx, inputs, output, N_TENSORS)


def _backward(ctx, upstream, *_):
    gradient = student_gradient(ctx, upstream, ops.dense_gradient_op, NAME)
    return gradient, *no_gradients(ctx, N_TENSORS)


torch.library.register_autograd(
    "distill_ops::dense_loss", _backward, setup_context=_setup_context, lib=ops.library
)


torch.library.register_vmap(
    "distill_ops::dense_loss", map_in_turn(ops.dense_loss_op), lib=ops.library
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
            save_inputs(ctx, shared[:N_TENSORS], statistics)
        ctx.mark_non_differentiable(components)
        return loss, components

    @staticmethod
    def backward(ctx, upstream, *_):
        others = (None,) * (N_SHARED + 1)
        if upstream is None:
            return None, *others
        check_backward(ctx, NAME)
        traced = torch.compiler.is_compiling() or type(upstream) is not torch.Tensor
        if ctx.mode == BACKWARD:
            inputs, (statistics,) = saved_inputs(ctx)
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
        scale_(gradient, upstream, backend_of(ctx))
        ops.increment_version(student)
        return gradient, *others


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
    if not torch.compiler.is_compiling() and refuse_transforms(arguments[0], function=NAME):
        raise NotImplementedError("inplace=True cannot be used under torch.func transforms")
    return _DenseLossInplace.apply(*arguments)
