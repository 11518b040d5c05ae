"""What a backward keeps: an operator's tensors, or the gradients that its forward made."""

import torch

from ..problem import STREAMED
from .transforms import is_batched, watched


def flattened(inputs) -> list[torch.Tensor | None]:
    """The tensors of an operator's inputs, those of lists among them."""
    tensors = []
    for x in inputs:
        tensors.extend(x) if isinstance(x, list) else tensors.append(x)
    return tensors


def lengths(inputs) -> list[int | None]:
    """Of the lists among the inputs; None for a tensor."""
    return [len(x) if isinstance(x, list) else None for x in inputs]


def lasting(function: str, inputs):
    """The inputs as a backward may find them again. A tensor made under inference mode has no version
    that would tell of a change: one entry a token or slot is copied.

    Raises:
        ValueError: logits, hidden states or weights of that kind, which are too large for it.
    """
    if not any(t is not None and t.is_inference() for t in flattened(inputs)):
        return inputs
    kept = {}
    for field, value in inputs._asdict().items():
        if isinstance(value, list):
            value = [x.clone() if x.is_inference() else x for x in value]
        elif value is not None and value.is_inference():
            if field in STREAMED:
                raise ValueError(
                    f"{STREAMED[field]} was made under torch.inference_mode(), where a change before "
                    f"the backward of {function}, which reads them again, goes unnoticed: make it "
                    f"under torch.no_grad(), or pass gradient='forward' where the function takes it"
                )
            value = value.clone()
        kept[field] = value
    return type(inputs)(**kept)


def save(ctx, inputs, kept) -> None:
    """Save an operator's tensors, and what its forward kept of them."""
    ctx.lengths = lengths(inputs)
    ctx.save_for_backward(*flattened(inputs), *kept)


def saved(ctx, kind: type) -> tuple:
    """The operator's tensors again, as ``kind``, and what was kept."""
    tensors = iter(ctx.saved_tensors)  # once: each access unpacks them, a checkpoint's only once
    inputs = [
        next(tensors) if length is None else [next(tensors) for _ in range(length)]
        for length in ctx.lengths
    ]
    return kind(*inputs), list(tensors)


def check_backward(ctx, function: str, reference: str, otherwise: str) -> None:
    """Refuse a backward that is to be differentiated (operators without a formula of their own would
    leave a wrong one unnoticed), or whose gradient was used up; ``otherwise`` says what serves then."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function} has no second derivative: its backward was called with "
            f"create_graph=True (torch.func.grad does that too). Use {reference} where one is needed."
        )
    if ctx.spent:
        raise RuntimeError(
            f"{function} was called with a gradient made in the forward (or inplace=True), "
            f"which the first backward used up: {otherwise} to call backward again (retain_graph=True)"
        )


def scaled(ctx, upstream: torch.Tensor, wanted, backend: str) -> list[torch.Tensor | None]:
    """The gradients that the forward made and kept, times the incoming one."""
    gradients = list(ctx.saved_tensors)[: len(wanted)]
    if watched((upstream,)) or is_batched(upstream):  # leave the saved tensors alone
        return [x * upstream if want else None for x, want in zip(gradients, wanted, strict=True)]
    ctx.spent = True
    for gradient, want in zip(gradients, wanted, strict=True):
        if want:
            scale_(gradient, upstream, backend)
    return gradients


def scale_(gradient: torch.Tensor, upstream: torch.Tensor, backend: str) -> None:
    """``gradient *= upstream``, which on a GPU is read there."""
    if gradient.device.type == "cpu":
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
    elif backend == "triton" and gradient.is_contiguous():
        from .. import gpu

        gpu.scale_(gradient, upstream)
    else:
        gradient.mul_(upstream)


def increment_version(tensor: torch.Tensor) -> None:
    """Tell autograd that the tensor has changed: Triton and ``out=`` views do not."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
