"""What a backward keeps: an operator's tensors, or the gradients that its forward made."""

import torch


def flattened(inputs) -> list[torch.Tensor | None]:
    """The tensors of an operator's inputs, those of lists among them."""
    tensors = []
    for x in inputs:
        tensors.extend(x) if isinstance(x, list) else tensors.append(x)
    return tensors


def lengths(inputs) -> list[int | None]:
    """Of the lists among the inputs; None for a tensor."""
    return [len(x) if isinstance(x, list) else None for x in inputs]


def save(ctx, inputs, kept) -> None:
    """Save an operator's tensors, and what its forward kept of them."""
    ctx.lengths = lengths(inputs)
    tensors = flattened(inputs)
    # the tensors made under inference mode cannot be saved, and cannot change either
    traced = torch.compiler.is_compiling()
    ctx.unsaved = [
        t if not traced and t is not None and t.is_inference() else None for t in tensors
    ]
    alive = [t if u is None else None for t, u in zip(tensors, ctx.unsaved, strict=True)]
    ctx.save_for_backward(*alive, *kept)


def saved(ctx, kind: type) -> tuple:
    """The operator's tensors again, as ``kind``, and what was kept."""
    n = len(ctx.unsaved)
    found = ctx.saved_tensors  # once: each access unpacks them, which a checkpoint allows but once
    tensors = [s if u is None else u for s, u in zip(found[:n], ctx.unsaved, strict=True)]
    inputs, i = [], 0
    for length in ctx.lengths:
        inputs.append(tensors[i] if length is None else tensors[i : i + length])
        i += 1 if length is None else length
    return kind(*inputs), list(found[n:])


def check_backward(ctx, function: str, reference: str) -> None:
    """Refuse a backward that is to be differentiated (operators without a formula of their own would
    leave a wrong one unnoticed), or whose gradient was used up."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function} has no second derivative: its backward was called with "
            f"create_graph=True (torch.func.grad does that too). Use {reference} where one is needed."
        )
    if ctx.spent:
        raise RuntimeError(
            f"{function} was called with a gradient made in the forward (or inplace=True), "
            "which the first backward used up: pass gradient='backward' without inplace to call "
            "backward again (retain_graph=True)"
        )


def scaled(ctx, upstream: torch.Tensor, wanted, backend: str) -> list[torch.Tensor | None]:
    """The gradients that the forward made and kept, times the incoming one."""
    gradients = list(ctx.saved_tensors)
    if type(upstream) is not torch.Tensor:  # being traced: leave the saved tensors alone
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
