"""Checks of language-model heads whose vocabulary ranks split, as plain parts or as DTensors."""

import torch

from ..groups import UNKNOWN, WHOLE, Split
from ..scalars import flag
from .split import is_distributed, is_replicated, of_dtensor, same_ranks, split_of


def split_heads(
    group, vocab_offset: int | None, vocab_size: int | None, **parts: torch.Tensor | None
) -> tuple:
    """The :class:`Split`, and this rank's parts of weights and biases (split on their first dimension) and of logits
    (on the last), by their names; the student's weight is the first. The gradients of DTensors come back
    with their placements. Without a group everything stays as it is.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    split = split_of(group, vocab_offset, vocab_size)
    if split.group is None:
        return WHOLE, *parts.values()
    found = {}
    for name, tensor in parts.items():
        if is_distributed(tensor):
            tensor, split = _part(name, tensor, split, first=not found)
        found[name] = tensor
    return split, *found.values()


def _part(name: str, tensor, split: Split, first: bool) -> tuple[torch.Tensor, Split]:
    """This rank's part of a DTensor, all of a teacher's that is replicated, and what it tells."""
    mesh, dim = tensor.device_mesh, -1 if name.endswith("logits") else 0
    if name.startswith("teacher") and is_replicated(tensor):
        return tensor.to_local(), split
    if mesh.ndim > 1 and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} is a DTensor on a mesh of {mesh.ndim} dimensions, over the others of which its gradient "
            f"would stay unreduced: read it inside the forward of the fully_shard module that holds it, or pass "
            f"{name}.redistribute(placements=[Replicate(), Shard(0)]).to_local(grad_placements=[Partial('avg'), "
            f"Shard(0)]), for a mesh of ('fsdp', 'tp') (docs/vocab-parallel.md)"
        )
    found, part = of_dtensor(name, tensor, split.vocab_size, dim)
    if not same_ranks(found.group, split.group):
        raise ValueError(
            f"{name} is a DTensor sharded over the ranks of {found.group!r}, but group= is {split.group!r}: "
            f"pass the group of the mesh dimension that splits its vocabulary"
        )
    if first:
        if split.offset not in (UNKNOWN, found.offset):
            raise ValueError(
                f"vocab_offset={split.offset}, but {name}, a DTensor, begins at {found.offset}: leave "
                f"vocab_offset= out"
            )
        return part, split._replace(offset=found.offset, width=found.width)
    if split.width not in (UNKNOWN, found.width):
        raise ValueError(
            f"{name} has a vocabulary of {found.width}, but that of the student's weight, split alike, is "
            f"{split.width}: pass parts of one split, or the teacher's whole"
        )
    return part, split


def check_sequence_parallel(sequence_parallel: bool, group, **hidden: torch.Tensor | None) -> int:
    """How many ranks split the tokens of the hidden states, which are given by their names; the group is
    one that :func:`split_heads` took.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    if not flag("sequence_parallel", sequence_parallel):
        return 1
    if group is None:
        raise ValueError(
            "sequence_parallel=True needs group=, the ranks that split the vocabulary and the tokens"
        )
    for name, tensor in hidden.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() < 2:
            raise ValueError(
                f"{name} must be [tokens, ..., dim] with sequence_parallel=True, whose first dimension the "
                f"ranks split, got shape {tuple(tensor.shape)}"
            )
    return group.size()  # which a graph knows
