"""From counts to predictions: which limit binds on a chip, and the time against a copy."""

from collections.abc import Sequence
from dataclasses import dataclass

from distill_ops.divergences.base import as_divergence

from ..losses.records import Record
from .cache_model import Traffic, form_of, launch_traffic, target_of
from .chips import CHIPS, Chip
from .kernels import Row, dense_row
from .launches import Entry

MEMORY, ISSUE, SPECIAL, FLOATS = "memory", "issue", "exp + log", "float32"


@dataclass(frozen=True)
class Prediction:
    """Times are picoseconds an element, over a form's launches; the largest binds.

    ``times_copy``: the time over that of a copy of the same inputs and gradient at the chip's
    nominal bandwidth; ``low`` and ``high`` are those of the cache model's two ends.
    """

    kernel: str
    form: str
    dtype: str
    chip: str
    memory_bytes: Traffic
    times: dict[str, float]
    binds: str
    times_copy: float
    low: float
    high: float
    divergence: str | None = None

    @property
    def picoseconds(self) -> float:
        return self.times_copy * CHIPS[self.chip].memory_picoseconds(self.memory_bytes.minimal)


def limits(row: Row, chip: Chip, n_bytes: float) -> dict[str, float]:
    """Picoseconds an element that each limit alone asks of one launch."""
    padding = row.padding or 1.0
    special = row.special * padding
    issued = (row.row_instructions or row.instructions) / chip.lanes
    if chip.special_stalls:
        issued += special / chip.special - special / chip.lanes
    times = {
        MEMORY: chip.memory_picoseconds(n_bytes),
        ISSUE: chip.picoseconds(issued),
        SPECIAL: chip.picoseconds(special / chip.special),
    }
    if chip.floats and row.floats is not None:
        times[FLOATS] = chip.picoseconds(row.floats * padding / chip.floats)
    return times


def predict(rows: Sequence[Row], launched: Sequence[Traffic], chip: Chip) -> Prediction:
    """The prediction for one form from its launches' counts and traffic, in the same order."""
    copy = chip.memory_picoseconds(sum(traffic.minimal for traffic in launched))

    def times_copy(end: str) -> float:
        each = (
            max(limits(row, chip, getattr(moved, end)).values())
            for row, moved in zip(rows, launched, strict=True)
        )
        return sum(each) / copy

    alone = [limits(row, chip, moved.predicted) for row, moved in zip(rows, launched, strict=True)]
    times = {name: sum(launch[name] for launch in alone) for name in alone[0]}
    # what binds the longest of the launches
    longest = max(alone, key=lambda launch: max(launch.values()))
    first = rows[0]
    first_traffic, *others = launched
    return Prediction(
        first.kernel, first.form, first.dtype, chip.name,
        sum(others, first_traffic), times, max(longest, key=longest.get),
        times_copy("predicted"), times_copy("low"), times_copy("high"), first.divergence,
    )  # fmt: skip


def moved_once(row: Row) -> Traffic:
    """The traffic of a kernel without a cache model: its second sweep finds the row in the cache."""
    return Traffic(*[row.moved] * 5)


def predict_record(record: Record, chip: Chip) -> Prediction:
    """The prediction for a benchmark record of ours; compiles its launches for the chip."""
    target = target_of(chip)
    launches = form_of(record).launches(as_divergence(record.loss), target)
    entry = Entry("dense", record.mode, record.dtype, record.loss)
    made_in = [None] if len(launches) == 1 else ["forward", "backward"]
    each = zip(launches, made_in, strict=True)
    rows = [dense_row(entry, launch, target, which) for launch, which in each]
    return predict(rows, [launch_traffic(launch, chip) for launch in launches], chip)


def predicted_ms(record: Record, chip: Chip) -> float:
    """Milliseconds to print beside ``record.median_ms``."""
    return predict_record(record, chip).picoseconds * record.tokens * record.vocab * 1e-9
