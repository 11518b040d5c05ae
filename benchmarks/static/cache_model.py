"""How many bytes an element the dense kernel moves through device memory: a prediction.

A program walks a row forward, backward and, in a third sweep, forward again. What it reads again is
served by the last cache (L2; the Infinity Cache on MI300X) if it has survived the traffic of all the
other programs. The model is a cache with the launcher's own number of programs in it: rows are cut
into pieces, the programs take turns, a piece at a time, and the cache drops the piece unused for the
longest time. Where the chip has eviction priorities, pieces read with ``evict_first`` and written
ones are dropped before those read with ``evict_last``.

Nothing holds programs in step or apart, so both are modelled: all at the same place of their rows,
and spread evenly over a row's walks.

Left out: the cache's sets and slices, its own bandwidth, and what else is in it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from distill_ops.kernels.launch import L2_SHARE

from distill_ops.analysis import aot
from distill_ops.analysis.forms import Form
from distill_ops.divergences.base import as_divergence

from ..losses.records import Record
from .chips import Chip

PIECES = 64  # of a row
MODELLED = 64  # programs at most; more of them share these ones' places in their rows
PESSIMISTIC_SHARE = 0.5  # of the cache: a half that serves the other half's multiprocessors


@dataclass(frozen=True)
class Traffic:
    """Bytes an element of one tensor ``[tokens, vocab]``.

    ``minimal``: each input read once, the gradient written once, by each launch. ``predicted``: the
    cache's share that the launch choices count on, and the worse of programs in step and spread.
    ``low``: the whole cache and the better of the two. ``high``: half the cache, no
    priorities, the worse. ``requested``: what the kernel loads and stores, from wherever it comes.
    """

    minimal: float
    predicted: float
    low: float
    high: float
    requested: float

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> tuple[float, ...]:
        return self.minimal, self.predicted, self.low, self.high, self.requested


class Cache:
    """Least recently used, in two classes of which the second is dropped first."""

    def __init__(self, n_bytes: float):
        self.room = n_bytes
        self.kept: OrderedDict = OrderedDict()
        self.passing: OrderedDict = OrderedDict()

    def touch(self, key: object, n_bytes: float, keep: bool) -> bool:
        """Whether ``key`` was there; it is afterwards, in the class that ``keep`` says."""
        size = self.kept.pop(key, None) or self.passing.pop(key, None)
        (self.kept if keep else self.passing)[key] = n_bytes
        self.room += (size or 0) - n_bytes
        while self.room < 0:
            _, dropped = (self.passing or self.kept).popitem(last=False)
            self.room += dropped
        return size is not None


@cache
def missed(
    n_programs: int,
    read_bytes: float,
    written_bytes: float,
    n_walks: int,
    cache_bytes: float,
    *,
    spread: bool,
    priorities: bool,
) -> float:
    """How many of a row's ``n_walks`` walks device memory serves, between 1 and ``n_walks``.

    Args:
        n_programs: programs in flight, each on a row of its own.
        read_bytes, written_bytes: of a row in one walk; the last walk writes.
        spread: program i is ``i / n_programs`` of a row's walks ahead; else all are in step.
        priorities: pieces of the last walk and written ones are dropped first.
    """
    modelled = min(n_programs, MODELLED) if spread else 1  # programs in step fare alike
    contents = Cache(cache_bytes * modelled / n_programs)
    steps = n_walks * PIECES
    ahead = [i * steps // modelled for i in range(modelled)]
    n_missed = 0
    for time in range(3 * steps):  # the first row fills the cache, the others count
        for program, start in enumerate(ahead):
            row, step = divmod(time + start, steps)
            walk, piece = divmod(step, PIECES)
            if walk % 2:
                piece = PIECES - 1 - piece
            last = walk == n_walks - 1
            keep = not (priorities and last)
            found = contents.touch((program, row, piece), read_bytes / PIECES, keep)
            if time >= steps:
                n_missed += not found
            if last and written_bytes:
                written = (program, row, piece, "written")
                contents.touch(written, written_bytes / PIECES, not priorities)
    return n_missed / (2 * modelled * PIECES)


def n_walks(launch: aot.Launch) -> int:
    """Sweeps over a row on the fast path of a launch of the dense kernel."""
    flags = launch.arguments
    reduces = flags["DIVERGENCE"] and flags["MOMENT"] == 0
    return flags["WRITE_LOSS"] * (1 + reduces) + flags["WRITE_GRADIENT"]


def launch_traffic(launch: aot.Launch, chip: Chip) -> Traffic:
    """The traffic of one recorded launch of the dense kernel."""
    arguments = launch.arguments
    read = arguments["student_ptr"].element_size()
    if arguments["DIVERGENCE"]:
        read += arguments["teacher_ptr"].element_size()
    written = arguments["gradient_ptr"].element_size() if arguments["WRITE_GRADIENT"] else 0
    walks = n_walks(launch)

    def moved(share: float, priorities: bool) -> tuple[float, float]:
        """With the programs in step, and spread."""
        n_cols = arguments["n_cols"]
        size = share * chip.facts.l2_bytes
        rows = launch.grid[0], read * n_cols, written * n_cols
        both = (
            missed(*rows, walks, size, spread=spread, priorities=priorities)
            for spread in (False, True)
        )
        return tuple(read * times + written for times in both)

    return Traffic(
        minimal=read + written,
        predicted=max(moved(L2_SHARE, chip.obeys_hints)),
        low=min(moved(1.0, chip.obeys_hints)),
        high=max(moved(PESSIMISTIC_SHARE, False)),
        requested=walks * read + written,
    )


def traffic(launches: Sequence[aot.Launch], chip: Chip) -> Traffic:
    """The traffic of a form's launches, one after the other."""
    first, *others = (launch_traffic(launch, chip) for launch in launches)
    return sum(others, first)


def target_of(chip: Chip) -> aot.Target:
    return aot.TARGETS[chip.target]


def form_of(record: Record) -> Form:
    """What our provider launches for a benchmark record; float16 makes its gradient backward."""
    dtype = getattr(torch, record.dtype)
    made = "backward" if dtype == torch.float16 else "forward"
    gradient = made if record.mode == "train" else "none"
    return Form(record.vocab, dtype, dtype, gradient=gradient, n_rows=record.tokens)


def traffic_of_record(record: Record, chip: Chip) -> Traffic:
    """The prediction that stands beside a measurement of ours."""
    launches = form_of(record).launches(as_divergence(record.loss), target_of(chip))
    return traffic(launches, chip)
