"""The ranks that split a head's vocabulary: whose blocks are as long as each other's, who may split the
tokens of the hidden states too, and who sum the gradient of these.

Every rank has the same tokens in a block, as many as fit at the columns of the widest, and takes part in
the same collectives: those of a loss's rows once a block, and one of the hidden states' gradient in the end.
"""

from typing import NamedTuple

import torch

from .. import groups
from ..groups import UNKNOWN, Place, Split


class Ranks(NamedTuple):
    """What a rank knows of them."""

    place: Place  # of its columns; the host knows the offset
    width: int  # of its part of a head
    widest: int  # columns that count, of the rank that has most of them
    token_ranks: int  # that split the hidden states' tokens; 1: each has all

    def of_head(self, part: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's rows of the weight ``[V, d]`` or bias ``[V]`` of a teacher's head."""
        start = self.place.teacher_start
        if part is None or start is None:
            return part
        return part[start : start + self.width]

    def of_logits(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's columns of a teacher's logits ``[..., V]``."""
        return None if logits is None else self.place.of_teacher(logits, self.width)

    def all_tokens(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """``[n, ..., d]`` of every rank's ``[n / token_ranks, ..., d]``, in rank order."""
        if hidden is None or self.token_ranks == 1:
            return hidden
        return self.place.group.all_gather(hidden).flatten(0, 1)

    def summed(self, of_hidden: torch.Tensor) -> torch.Tensor:
        """The gradient of hidden states ``[n, d]``, of which each rank has that of its columns: the sum,
        of all tokens, or of those that this rank has."""
        group = self.place.group
        if self.token_ranks == 1:
            return group.all_reduce_(of_hidden)
        return group.reduce_scatter(of_hidden.view(group.size, -1, of_hidden.shape[-1]))

    def kept(self) -> torch.Tensor:
        """These numbers, on the CPU, for :func:`joined_again`."""
        start = UNKNOWN if self.place.teacher_start is None else self.place.teacher_start
        return torch.tensor([self.place.offset, self.width, self.widest, start])


N_KEPT = 4


def joined(
    split: Split,
    width: int,
    n_tokens: int,
    device: torch.device,
    teacher_width: int | None = None,
    token_ranks: int = 1,
) -> Ranks:
    """The ranks, each of which calls this. One collective, for which the host waits, but where DTensors tell
    the widths and every rank has all tokens.

    Args:
        width: rows of this rank's part of the student's head.
        n_tokens: of the hidden states on this rank.
        teacher_width: rows of the teacher's head (columns of its logits), None without a teacher's.

    Raises:
        ValueError: on all ranks: a teacher that is neither split alike nor whole, an offset that is not the
            number of columns before this rank's, or other numbers of tokens than the others'.
    """
    group = groups.resolve(split.group)
    if split.offset != UNKNOWN and split.width != UNKNOWN and token_ranks == 1:
        even = -(-split.width // group.size)
        widths = [min(even, max(split.width - i * even, 0)) for i in range(group.size)]
        of_teacher, tokens = None, [n_tokens] * group.size
        offsets = [UNKNOWN] * group.size
    else:
        here = [width, UNKNOWN if teacher_width is None else teacher_width, n_tokens, split.offset]
        numbers = group.all_gather(torch.tensor(here, dtype=torch.int64, device=device))
        widths, of_teacher, tokens, offsets = numbers.t().tolist()
    before = [sum(widths[:i]) for i in range(group.size)]
    wrong = [i for i in range(group.size) if offsets[i] not in (UNKNOWN, before[i])]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"vocab_offset must be the columns before a rank's own, {before[i]} on rank {i} of {group.size} "
            f"(the ranks have {widths} rows of student_weight), got {offsets[i]}"
        )
    if len(set(tokens)) > 1:
        advice = (
            "equally many each, with sequence_parallel=True" if token_ranks > 1 else "all of them"
        )
        raise ValueError(
            f"the ranks must have the hidden states of {advice}, got {tokens} tokens: pad them, with a "
            f"loss_mask of 0"
        )
    split.check_total(sum(widths))
    counted = [split.n_cols(*x) for x in zip(widths, before, strict=True)]
    start = _teacher_start(split, group.rank, widths, teacher_width, of_teacher, before)
    place = Place(group, before[group.rank], counted[group.rank], start)
    return Ranks(place, width, max(counted), token_ranks)


def _teacher_start(split: Split, rank, widths, teacher_width, of_teacher, before) -> int | None:
    """Where this rank's part begins in a whole teacher, None where it is split (or there is none)."""
    if teacher_width is None:
        return None
    total = sum(widths)
    if of_teacher is None:  # nobody asked the others
        of_teacher = widths if teacher_width == widths[rank] else [teacher_width] * len(widths)
    if of_teacher == widths:
        return None
    if len(set(of_teacher)) == 1 and split.is_whole(teacher_width, total):
        return before[rank]
    raise ValueError(
        f"the teacher's vocabulary must be split as the student's, {widths} columns on the ranks, or whole on "
        f"each, {total}, got {of_teacher}"
    )


def joined_again(split: Split, kept: torch.Tensor, token_ranks: int = 1) -> Ranks:
    """:func:`joined` once more, from what it found, without a collective."""
    offset, width, widest, start = kept.tolist()
    place = Place(
        groups.resolve(split.group),
        offset,
        split.n_cols(width, offset),
        None if start < 0 else start,
    )
    return Ranks(place, width, widest, token_ranks)
