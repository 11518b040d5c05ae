"""Logits of a vocabulary that ranks split, gathered whole: what the oracle does of a split."""

import torch

from ..groups import Split, resolve

Head = tuple[torch.Tensor | None, torch.Tensor | None]  # weight and bias


def gathered(part: torch.Tensor, split: Split) -> torch.Tensor:
    """``[..., V]`` of every rank's ``[..., width]`` in rank order, differentiable in this rank's own."""
    group = resolve(split.group)
    widths = group.all_gather(torch.tensor([part.shape[-1]], device=part.device)).view(-1).tolist()
    padded = part.new_zeros((*part.shape[:-1], max(widths)))
    padded[..., : part.shape[-1]] = part.detach()
    parts = [x[..., :n] for x, n in zip(group.all_gather(padded), widths, strict=True)]
    parts[group.rank] = part
    return torch.cat(parts, -1)


def head_gathered(part: torch.Tensor | None, split: Split) -> torch.Tensor | None:
    """``[V, d]`` or ``[V]`` of every rank's rows of a head's weight or bias, as :func:`gathered`."""
    return None if part is None else gathered(part.t(), split).t()


def heads_gathered(split: Split, student: Head, teacher: Head) -> tuple[Head, Head]:
    """Both heads' whole weight and bias; a teacher's that is whole already is not gathered."""
    weight, bias = teacher
    if weight is not None and _is_split(split, student[0].shape[0], weight.shape[0], weight):
        teacher = head_gathered(weight, split), head_gathered(bias, split)
    return tuple(head_gathered(x, split) for x in student), teacher


def tokens_gathered(hidden: torch.Tensor | None, split: Split) -> torch.Tensor | None:
    """``[n, ..., d]`` of every rank's ``[n / ranks, ..., d]``, differentiable in this rank's own."""
    if hidden is None:
        return None
    group = resolve(split.group)
    counts = group.all_gather(torch.tensor([len(hidden)], device=hidden.device)).view(-1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"sequence_parallel=True needs as many hidden states on each rank, got {counts} rows"
        )
    parts = list(group.all_gather(hidden.detach()))
    parts[group.rank] = hidden
    return torch.cat(parts)


def both_gathered(split: Split, student: torch.Tensor, teacher: torch.Tensor | None):
    """Both models' whole logits; a teacher that is whole already is not gathered."""
    whole = gathered(student, split)
    if teacher is not None and _is_split(split, student.shape[-1], teacher.shape[-1], student):
        teacher = gathered(teacher, split)
    return whole, teacher


def _is_split(split: Split, width: int, teacher_width: int, like: torch.Tensor) -> bool:
    """Whether every rank has as much of the teacher's as of the student's."""
    widths = torch.tensor([width, teacher_width], device=like.device)
    return bool((resolve(split.group).all_gather(widths).diff() == 0).all())
