"""Checks of a vocabulary that ranks split: the group and the offset, as given or as a DTensor tells."""

import sys

import torch

from .. import groups
from ..groups import UNKNOWN, WHOLE, Split
from ..scalars import integer, shown


def is_distributed(tensor) -> bool:
    """Whether it is a DTensor, without the import of torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def group_name(group) -> str:
    """The name of a process group or of a mesh of one dimension.

    Raises:
        TypeError: it is neither, or this process is no member.
        ValueError: a mesh of several dimensions.
    """
    kind = getattr(torch.distributed, "ProcessGroup", ())  # of a build without them there is none
    if isinstance(group, kind):
        return group.group_name
    if not (hasattr(group, "get_group") and hasattr(group, "mesh_dim_names")):
        raise TypeError(
            f"group must be a torch.distributed process group, of which this process is a member, or a "
            f"DeviceMesh of one dimension, got {shown(group)}"
        )
    if group.ndim != 1:
        raise ValueError(
            f"group must be a process group or a mesh of one dimension, got a mesh of {group.ndim}: "
            f"pass mesh['tp'], the dimension that splits the vocabulary"
        )
    return group.get_group().group_name


def split_of(group, vocab_offset: int | None, vocab_size: int | None) -> Split:
    """The split that ``group=`` and ``vocab_offset=`` tell of plain tensors.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    if group is None:
        if vocab_offset is not None:
            raise ValueError(
                f"vocab_offset={vocab_offset} needs group=, the ranks that split the vocabulary"
            )
        return WHOLE
    offset = UNKNOWN
    if vocab_offset is not None:
        offset = integer("vocab_offset", vocab_offset, 0)
    return Split(group_name(group), offset, UNKNOWN if vocab_size is None else vocab_size)


def is_replicated(tensor) -> bool:
    """Whether a DTensor is whole on every rank."""
    return all(p.is_replicate() for p in tensor.placements)


def same_ranks(one: str, other: str) -> bool:
    """Whether two groups, by their names, are of the same processes in one order."""
    return one == other or groups.resolve(one).ranks == groups.resolve(other).ranks


def _check_ranks(name: str, found: str, given: str) -> None:
    if not same_ranks(found, given):
        raise ValueError(
            f"{name} is a DTensor sharded over the ranks of {found!r}, but group= is {given!r}: leave group= "
            f"out, or pass that of the mesh dimension that splits the vocabulary"
        )


def split_dimension(name: str, tensor, dim: int) -> int:
    """The mesh dimension over which a DTensor is sharded along its dimension ``dim``.

    Raises:
        ValueError: there is none, or another placement than Replicate beside it.
    """
    placements = tensor.placements
    along = [i for i, p in enumerate(placements) if p.is_shard(dim)]
    others = [p for i, p in enumerate(placements) if i not in along and not p.is_replicate()]
    if len(along) != 1 or others:
        advice = (
            f"redistribute it, or pass {name}.to_local() without group=, if whole rows are here"
        )
        if len(along) == 1 and all(p.is_shard() for p in others):  # each rank's own tokens
            advice = (
                f"pass {name}.to_local() with group= of that dimension, and these tokens' labels"
            )
        raise ValueError(
            f"{name} is a DTensor of placements {tuple(placements)}, but must be sharded on its vocabulary, "
            f"Shard({dim}), over one mesh dimension and replicated over the others: {advice} "
            f"(docs/vocab-parallel.md)"
        )
    return along[0]


def of_dtensor(
    name: str, tensor, vocab_size: int | None, dim: int = -1
) -> tuple[Split, torch.Tensor]:
    """The split of a DTensor along a dimension, and this rank's part, whose gradient comes back with its
    placements."""
    dim %= tensor.dim()
    at = split_dimension(name, tensor, dim)
    mesh, width = tensor.device_mesh, tensor.shape[dim]
    part = tensor.to_local()
    chunk = -(-width // mesh.size(at))
    offset = min(mesh.get_local_rank(at) * chunk, width)
    if part.shape[dim] != min(chunk, width - offset):
        raise ValueError(
            f"{name} is a DTensor made of parts of other sizes than torch.chunk's, {part.shape[dim]} of {width} "
            f"on this rank, which its placements do not tell the others: pass {name}.to_local() with group="
        )
    return Split(
        mesh.get_group(at).group_name, offset, UNKNOWN if vocab_size is None else vocab_size, width
    ), part


def split_logits(
    group, vocab_offset: int | None, vocab_size: int | None, student, teacher,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
) -> tuple[Split, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The split of two models' logits, and this rank's part of each; a teacher that is whole stays so.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    if not is_distributed(student):
        split = split_of(group, vocab_offset, vocab_size)
        if split.group is not None and is_distributed(teacher):
            if not is_replicated(teacher):
                found, _ = of_dtensor(names[1], teacher, vocab_size)
                _check_ranks(names[1], found.group, split.group)
            teacher = teacher.to_local()
        return split, student, teacher
    found, part = of_dtensor(names[0], student, vocab_size)
    if group is not None:
        _check_ranks(names[0], found.group, group_name(group))
    if vocab_offset not in (None, found.offset):
        raise ValueError(
            f"vocab_offset={vocab_offset}, but {names[0]}, a DTensor, begins at {found.offset}: leave "
            f"vocab_offset= out"
        )
    if is_distributed(teacher) and is_replicated(teacher):
        teacher = teacher.to_local()
    elif is_distributed(teacher):
        of_teacher, teacher = of_dtensor(names[1], teacher, vocab_size)
        if (of_teacher.group, of_teacher.width) != (found.group, found.width):
            raise ValueError(
                f"{names[0]} and {names[1]} must be split alike, got {found.width} columns over "
                f"{found.group!r} and {of_teacher.width} over {of_teacher.group!r}: pass vocab_size= and "
                f"parts of one split, or the teacher's whole vocabulary"
            )
    return found, part, teacher
