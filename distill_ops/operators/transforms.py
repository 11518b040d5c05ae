"""What may stand around an operator: modes, tracing, vmap of new and of old, and the transforms that
differentiate, which are refused."""

import torch
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch.autograd import forward_ad

from ..checks.values import PLAIN


def watched(tensors) -> bool:
    """Whether a call on these tensors must go through the dispatcher."""
    return torch.compiler.is_compiling() or dispatches(tensors)


def dispatches(tensors) -> bool:
    """Whether a transform, a mode, a tensor's class or one without values needs the dispatcher."""
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.is_meta):
            return True
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or bool(torch._C._len_torch_dispatch_stack())


def is_batched(upstream: torch.Tensor) -> bool:
    """Whether autograd maps a backward over a batch of upstreams (``is_grads_batched``, a vectorized
    jacobian): of old, not as a transform of torch.func."""
    return not torch.compiler.is_compiling() and is_legacy_batchedtensor(upstream)


def hides_gradient(student: torch.Tensor | None) -> bool:
    """Whether a transform of torch.func has wrapped a tensor that requires grad, which does not show."""
    if student is None or student.requires_grad or not torch.is_grad_enabled():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(student):
        student = torch._C._functorch.get_unwrapped(student)
        if student.requires_grad:
            return True
    return False


def each_of_batch(make, upstreams):
    """``make(upstreams)``, gradients or None; of a batch of upstreams, one after the other."""
    batched = [u is not None and is_batched(u) for u in upstreams]
    if not any(batched):
        return make(upstreams)
    level = torch._C._vmapmode_increment_nesting() - 1  # the one that is active
    torch._C._vmapmode_decrement_nesting()
    whole = [
        torch._remove_batch_dim(u, level, 1, 0) if batch else u
        for u, batch in zip(upstreams, batched, strict=True)
    ]
    size = len(whole[batched.index(True)])
    found = [
        make([u[i] if batch else u for u, batch in zip(whole, batched, strict=True)])
        for i in range(size)
    ]
    return [
        None if x[0] is None else torch._add_batch_dim(torch.stack(x), 0, level)
        for x in zip(*found, strict=True)
    ]


def map_in_turn(operator):
    """``operator`` under vmap: independent problems, one after the other."""

    def part(value, dim, i):
        if isinstance(value, list) and isinstance(dim, list):
            return [part(*item, i) for item in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    def mapped(info, in_dims, *arguments):
        if info.batch_size == 0:
            raise ValueError(f"torch.func.vmap of {operator} needs a batch that is not empty")
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
