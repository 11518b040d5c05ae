"""What the differentiable operators share: tensors kept for the backward, and what is refused."""

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


def save_for_backward(ctx, *tensors: torch.Tensor | None) -> None:
    """``ctx.save_for_backward`` of tensors, those made under inference mode among them: they cannot
    be saved, and cannot change either."""
    traced = torch.compiler.is_compiling()
    ctx.unsaved = [
        t if not traced and t is not None and t.is_inference() else None for t in tensors
    ]
    saved = (t if u is None else None for t, u in zip(tensors, ctx.unsaved, strict=True))
    ctx.save_for_backward(*saved)


def saved_tensors(ctx) -> list[torch.Tensor | None]:
    """What :func:`save_for_backward` was given."""
    return [s if u is None else u for s, u in zip(ctx.saved_tensors, ctx.unsaved, strict=True)]


def refuse_second_derivative(name: str) -> None:
    """For a backward: operators without a formula of their own would leave a wrong one unnoticed.

    Raises:
        RuntimeError: the backward is itself to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its backward was called with create_graph=True "
            f"(torch.func.grad does that too). Use distill_ops.reference.{name} where one is needed."
        )


def refuse_transforms(name: str, student: torch.Tensor) -> bool:
    """Whether a functorch transform is active; those that differentiate are refused.

    Raises:
        NotImplementedError: forward-mode AD, or torch.func.grad and the like, of ``name``.
    """
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
