"""The ranks that split a vocabulary: which columns each has, and the collectives among them.

A group travels through operators as its name. Everything is gathered in the order of the ranks, and what
is made of it is computed by each of them alike: all have the same bits.
"""

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

UNKNOWN = -1


class Split(NamedTuple):
    """How a vocabulary is split, as the options of an operator have it. All of it the same on every rank,
    but the offset."""

    group: str | None = None  # its name; None: this rank has the whole vocabulary
    offset: int = UNKNOWN  # columns before this rank's; UNKNOWN: the widths are exchanged
    vocab_size: int = UNKNOWN  # columns that count, of all ranks'; UNKNOWN: every one
    width: int = UNKNOWN  # columns of all ranks, where a DTensor tells

    def n_cols(self, width: int, offset: int) -> int:
        """Of this rank's columns, those that count."""
        if self.vocab_size == UNKNOWN:
            return width
        return min(max(self.vocab_size - offset, 0), width)

    def check_total(self, total: int) -> None:
        """A ValueError, on every rank, where more columns are to count than all ranks have."""
        if UNKNOWN != total < self.vocab_size:
            raise ValueError(
                f"vocab_size must be at most the columns of all ranks, {total}, got {self.vocab_size}"
            )

    def is_whole(self, teacher_width: int, total: int) -> bool:
        """Whether a teacher of another width than this rank's part has all columns that count."""
        if self.vocab_size != UNKNOWN:
            return teacher_width >= self.vocab_size
        return teacher_width == total  # which must be known

    @property
    def bound(self) -> int | None:
        """Labels and ids lie below it; None where this rank alone cannot tell."""
        known = [n for n in (self.vocab_size, self.width) if n != UNKNOWN]
        return min(known) if known else None


WHOLE = Split()


@dataclass(eq=False)
class Counter:
    """Collectives that this process took part in, and the bytes that it sent."""

    collectives: int = 0
    bytes: int = 0


_counters: list[Counter] = []


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count the collectives of the losses within."""
    counter = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class Group:
    """A process group, known by its name."""

    def __init__(self, name: str):
        from torch.distributed import distributed_c10d

        self.name, self._group = name, distributed_c10d._resolve_process_group(name)
        self.rank, self.size = self._group.rank(), self._group.size()

    @property
    def ranks(self) -> list[int]:
        """Of all processes, in order."""
        return torch.distributed.get_process_group_ranks(self._group)

    def _call(self, collective, sent: torch.Tensor, *arguments) -> None:
        for counter in _counters:
            counter.collectives += 1
            counter.bytes += sent.numel() * sent.element_size()
        try:
            collective(*arguments, group=self._group)
        except (torch.OutOfMemoryError, NotImplementedError):
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} waited in vain for the others of group {self.name!r}, "
                f"which split the vocabulary: one of them failed, has left, or called with other shapes "
                f"(distill_ops.set_debug(True) compares the arguments of the ranks): {error}"
            ) from error

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """``[size, ...]``: everyone's part, in the order of the ranks."""
        part = part.contiguous()
        whole = part.new_empty((self.size, *part.shape))
        flat = whole.view(self.size * part.numel())
        self._call(_named("all_gather_single", "all_gather_into_tensor"), part, flat, part.view(-1))
        return whole

    def all_reduce_(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, over ``part``."""
        self._call(torch.distributed.all_reduce, part, part)
        return part

    def reduce_scatter(self, parts: torch.Tensor) -> torch.Tensor:
        """This rank's of ``[size, ...]`` parts, summed over the ranks."""
        found = torch.empty_like(parts[0])
        flat = parts.contiguous().view(-1)
        collective = _named("reduce_scatter_single", "reduce_scatter_tensor")
        self._call(collective, parts, found.view(-1), flat)
        return found


def _named(name: str, before: str):
    """A collective of torch.distributed by its name, and by that of older versions."""
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, before)


def resolve(name: str) -> Group:
    """The group of that name."""
    return Group(name)


class Place(NamedTuple):
    """Where a rank's columns are in the vocabulary."""

    group: Group
    offset: int | torch.Tensor  # [] where it was exchanged and nothing on the host needs it
    n_cols: int  # those that count, from the first on
    teacher_start: (
        int | None
    )  # where this part begins in a teacher that is whole; None: it is split

    def of_teacher(self, teacher: torch.Tensor, width: int) -> torch.Tensor:
        """This part of a teacher's logits (or of a head: of its first dimension)."""
        if self.teacher_start is None:
            return teacher
        return teacher[..., self.teacher_start : self.teacher_start + width]

    def kept(self, like: torch.Tensor) -> torch.Tensor:
        """The offset as a tensor ``[]``, for :func:`place_again`."""
        if isinstance(self.offset, torch.Tensor):
            return self.offset
        return torch.full((), self.offset, dtype=torch.int64, device=like.device)


def place_of(
    split: Split, width: int, device: torch.device, teacher_width: int | None = None
) -> Place:
    """Where this rank's columns are: as given, or from the widths of all, one collective.

    The host waits for a GPU only where it must know: for ``vocab_size``, or to slice a teacher that is
    whole.

    Raises:
        ValueError: a teacher that is neither split alike nor whole, or a ``vocab_size`` beyond all columns,
            where these are known.
    """
    group, offset, total = resolve(split.group), split.offset, split.width
    other = teacher_width is not None and teacher_width != width
    if offset == UNKNOWN:
        widths = group.all_gather(torch.full((1,), width, dtype=torch.int64, device=device))
        if not (device.type == "cpu" or other or split.vocab_size != UNKNOWN):
            return Place(group, widths[: group.rank].sum(), width, None)
        widths = widths.view(-1).tolist()
        offset, total = sum(widths[: group.rank]), sum(widths)
    split.check_total(total)
    if other and not split.is_whole(teacher_width, total):
        whole = f" of {total}"
        if total == UNKNOWN:
            whole = ", without vocab_offset= or with vocab_size=, which say how much that is"
        raise ValueError(
            f"the teacher has {teacher_width} columns and the student, on this rank, {width}: split both "
            f"alike, or give the teacher's whole vocabulary{whole}"
        )
    return Place(group, offset, split.n_cols(width, offset), offset if other else None)


def place_again(
    split: Split, kept: torch.Tensor, width: int, teacher_width: int | None = None
) -> Place:
    """:func:`place_of` once more, from the offset that was found, without a collective."""
    group, offset = resolve(split.group), split.offset
    other = teacher_width is not None and teacher_width != width
    if offset == UNKNOWN:
        if not (kept.is_cpu or other or split.vocab_size != UNKNOWN):
            return Place(group, kept, width, None)
        offset = int(kept)
    return Place(group, offset, split.n_cols(width, offset), offset if other else None)


N_FACTS = 64  # that ranks compare: as many of every call


def check_agreement(
    split: Split, facts: dict[str, object], device: torch.device, width: int
) -> None:
    """In debug mode: every rank calls with the same, and begins where the columns of those before it end,
    which one collective compares.

    Args:
        width: of this rank's part.

    Raises:
        ValueError: on all ranks, naming what differs and what this rank has.
    """
    group = resolve(split.group)
    codes = [zlib.crc32(repr(value).encode()) for value in ([*facts], *facts.values())]
    codes += [0] * (N_FACTS - len(codes))
    numbers = torch.tensor([width, split.offset, *codes], dtype=torch.int64, device=device)
    gathered = group.all_gather(numbers).tolist()
    if any(other[2] != codes[0] for other in gathered):
        raise ValueError(f"the ranks of group {split.group!r} called different functions")
    names = [
        name
        for i, name in enumerate(facts, 3)
        if any(other[i] != codes[i - 2] for other in gathered)
    ]
    if names:
        here = ", ".join(f"{name}={facts[name]}" for name in names)
        raise ValueError(
            f"the ranks of group {split.group!r} differ in {', '.join(names)}, got on rank {group.rank}: "
            f"{here}"
        )
    widths, offsets, *_ = zip(*gathered, strict=True)
    before = [sum(widths[:i]) for i in range(group.size)]
    if any(x not in (UNKNOWN, right) for x, right in zip(offsets, before, strict=True)):
        raise ValueError(
            f"vocab_offset must be the columns before a rank's own, {before} of ranks that have "
            f"{list(widths)}, got {list(offsets)}"
        )
