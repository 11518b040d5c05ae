"""What the differentiable operators share: tensors kept for the backward, gradients made in the
forward, vmap, and what is refused."""

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from .ops import BACKWARD, FORWARD
from .paths import Options, device_of


def save_inputs(ctx, inputs, *others) -> None:
    """Save an operator's tensors, of which the last are a list, for the backward."""
    *tensors, parameters = inputs
    ctx.n_inputs = len(inputs)
    tensors = [*tensors, *parameters]  # torch.compile of 2.11 keeps a tuple here
    # the tensors made under inference mode cannot be saved, and cannot change either
    traced = torch.compiler.is_compiling()
    ctx.unsaved = [
        t if not traced and t is not None and t.is_inference() else None for t in tensors
    ]
    saved = [t if u is None else None for t, u in zip(tensors, ctx.unsaved, strict=True)]
    ctx.save_for_backward(*saved, *others)


def saved_inputs(ctx) -> tuple[tuple, list[torch.Tensor]]:
    """The operator's tensors again, and what was saved beside them."""
    n_saved, n_alone = len(ctx.unsaved), ctx.n_inputs - 1
    kept = ctx.saved_tensors  # once: each access unpacks them, which a checkpoint allows but once
    saved, others = kept[:n_saved], list(kept[n_saved:])
    tensors = [s if u is None else u for s, u in zip(saved, ctx.unsaved, strict=True)]
    return (*tensors[:n_alone], tensors[n_alone:]), others


def scale_(gradient: torch.Tensor, upstream: torch.Tensor, backend: str) -> None:
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


def check_backward(ctx, function: str = "distillation_loss") -> None:
    """For a backward: operators without a formula of their own would leave a wrong one unnoticed.

    Raises:
        RuntimeError: it is itself to be differentiated, or its gradient was used up.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function} has no second derivative: its backward was called with "
            f"create_graph=True (torch.func.grad does that too). Use "
            f"distill_ops.reference.{function} where one is needed."
        )
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{function} was called with a gradient made in the forward (or inplace=True), "
            "which the first backward used up: pass gradient='backward' without inplace to call "
            "backward again (retain_graph=True)"
        )


def map_in_turn(operator):
    """``operator`` under vmap: independent problems, one after the other."""

    def part(value, dim, i):
        if isinstance(value, list) and isinstance(dim, list):
            return [part(*item, i) for item in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    def mapped(info, in_dims, *arguments):
        outputs = [
            operator(*(part(*item, i) for item in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return mapped


def refuse_transforms(*students: torch.Tensor | None, function: str = "distillation_loss") -> bool:
    """Whether a functorch transform is active; those that differentiate are refused."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in students
    ):
        raise NotImplementedError(
            f"{function} has no forward-mode derivative (forward_ad, torch.func.jvp, "
            f"torch.func.jacfwd): use loss.backward(), or distill_ops.reference.{function}"
        )
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return False
    if interpreter.key() in (TransformType.Grad, TransformType.Jvp):
        raise NotImplementedError(
            f"{function} cannot be differentiated by torch.func transforms: use "
            f"loss.backward(), or distill_ops.reference.{function}"
        )
    return True


def keep_for_backward(ctx, inputs, output, n_tensors: int) -> None:
    """Save what the backward needs of a loss operator's arguments, the first ``n_tensors`` being
    tensors and the last of these a list, and of its output."""
    _, components, *kept = output
    *options, mode, _ = inputs[n_tensors:]
    ctx.mark_non_differentiable(components, *kept)
    ctx.set_materialize_grads(False)
    ctx.mode, ctx.options = mode, options
    ctx.n_parameters = len(inputs[n_tensors - 1])
    ctx.spent = False
    if ctx.mode == FORWARD:
        ctx.save_for_backward(*kept)
    elif ctx.mode == BACKWARD:
        save_inputs(ctx, inputs[:n_tensors], *kept)
    else:
        raise RuntimeError("a loss with gradient='none' got a student that requires grad")


def scaled_gradients(ctx, upstream: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    """The gradients that the forward made and kept, times the incoming one."""
    gradients = ctx.saved_tensors
    if type(upstream) is not torch.Tensor:  # being traced: leave the saved tensors alone
        return tuple(gradient * upstream for gradient in gradients)
    ctx.spent = True
    for gradient in gradients:
        scale_(gradient, upstream, backend)
    return gradients


def student_gradient(ctx, upstream, gradient_op, name: str):
    """What the backward of a loss returns for the student's logits."""
    if upstream is None:
        return None
    check_backward(ctx, name)
    if ctx.mode == BACKWARD:
        inputs, (statistics,) = saved_inputs(ctx)
        return gradient_op(*inputs, *ctx.options, statistics, upstream)
    (gradient,) = scaled_gradients(ctx, upstream, backend_of(ctx))
    return gradient


def backend_of(ctx) -> str:
    choices, *_ = ctx.options
    return choices[Options._fields.index("backend")]


def no_gradients(ctx, n_tensors: int) -> list[None]:
    """For the arguments after the student: PyTorch wants an entry for each tensor of the list, too."""
    others = [None] * (n_tensors + len(ctx.options) + 1)
    others[n_tensors - 2] = [None] * ctx.n_parameters
    return others


def watched(name: str, student: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether something watches the dispatcher: tracing, a transform or a mode, a tensor's class.

    Raises:
        NotImplementedError: a transform that differentiates.
    """
    if torch.compiler.is_compiling():
        return True
    transformed = refuse_transforms(student, function=name)
    plain = all(t is None or type(t) is torch.Tensor for t in (student, *others))
    return transformed or not plain or bool(torch._C._len_torch_dispatch_stack())
