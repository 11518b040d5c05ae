"""Logits of a vocabulary that ranks split, gathered whole: what the oracle does of a split."""

import torch

from ..groups import Split, resolve


def gathered(part: torch.Tensor, split: Split) -> torch.Tensor:
    """``[..., V]`` of every rank's ``[..., width]`` in rank order, differentiable in this rank's own."""
    group = resolve(split.group)
    widths = group.all_gather(torch.tensor([part.shape[-1]], device=part.device)).view(-1).tolist()
    padded = part.new_zeros((*part.shape[:-1], max(widths)))
    padded[..., : part.shape[-1]] = part.detach()
    parts = [x[..., :n] for x, n in zip(group.all_gather(padded), widths, strict=True)]
    parts[group.rank] = part
    return torch.cat(parts, -1)


def both_gathered(split: Split, student: torch.Tensor, teacher: torch.Tensor | None):
    """Both models' whole logits; a teacher that is whole already is not gathered."""
    whole = gathered(student, split)
    if teacher is not None:
        resolved = resolve(split.group)
        widths = torch.tensor([student.shape[-1], teacher.shape[-1]], device=student.device)
        if (resolved.all_gather(widths).diff() == 0).all():
            teacher = gathered(teacher, split)
    return whole, teacher
