"""Transforms of torch.func around an operator: vmap, and the refusal of those that differentiate."""

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


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
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return mapped


def refuse_transforms(students: list[torch.Tensor | None], function: str, reference: str) -> bool:
    """Whether a functorch transform is active.

    Raises:
        NotImplementedError: one that differentiates one of the students."""
    if not students:
        return torch._C._functorch.peek_interpreter_stack() is not None
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in students
    ):
        raise NotImplementedError(
            f"{function} has no forward-mode derivative (forward_ad, torch.func.jvp, "
            f"torch.func.jacfwd): use loss.backward(), or {reference}"
        )
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return False
    if interpreter.key() in (TransformType.Grad, TransformType.Jvp):
        raise NotImplementedError(
            f"{function} cannot be differentiated by torch.func transforms: use "
            f"loss.backward(), or {reference}"
        )
    return True
