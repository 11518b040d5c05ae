"""``python -m benchmarks.gpu.beside FOLDER``: what was measured, beside the static predictions.

Reads ``dense.json``, ``graphs.json`` and ``forms.json`` of the folder, as far as they are there, and
the committed counts; prints a table and writes ``predictions.json``. Needs no GPU.

Times are multiples of a copy of the least bytes: the measured ones of the copy timed in the same
rounds, the predicted ones of a copy at the chip's nominal bandwidth.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..core.machine import RESULTS
from ..core.records import Measured, load, save
from ..core.screen import make_console, make_table, number
from ..losses.forms import FormRecord
from ..losses.records import OURS_BACKWARD, OVERHEAD, WAYS, Record
from ..static import results as static
from ..static.chips import CHIPS, chip_of
from ..static.launches import BACKWARD, BF16, BUCKET, ENTROPY, EVAL, ODD, TRAIN, Entry
from .graphs import GraphRecord

COUNTS = RESULTS / "static.json"
KINDS = {"dense": Record, "graphs": GraphRecord, "forms": FormRecord}  # by file
GRAPH = "graph"  # the mode of a replayed training step
# kernel and form of the forms whose launches over the logits are all counted
OF_FORMS = {"tokens": ("token", ENTROPY), "topk": ("topk", BUCKET)}


@dataclass(frozen=True)
class Compared:
    """One measurement of ours; what is predicted, by chip, is empty where nothing was counted."""

    case: str
    mode: str
    label: str
    measured_ms: float
    measured_times_copy: float | None
    predicted_ms: dict[str, float]
    predicted_times_copy: dict[str, float]
    predicted_form: str | None  # kernel and form of the counts


def measurement(record: Measured) -> tuple[str, float, float | None]:
    """The mode, milliseconds, and these over those of a copy, which the forms have none of."""
    if isinstance(record, GraphRecord):
        return GRAPH, record.graph_ms, record.times_copy
    if isinstance(record, Record):
        return record.mode, record.median_ms, record.copy_fraction and 1 / record.copy_fraction
    return "train", record.median_ms, None


def counted_as(record: Measured) -> Entry | None:
    """The line of the static counts that a measurement is of.

    They are of one vocabulary each, an even one of 128256 columns and an odd one of 50257 whose rows
    begin anywhere, and stand for others like it."""
    odd = record.vocab % 8 != 0
    if isinstance(record, FormRecord):
        if record.form not in OF_FORMS or record.tail != "bucket":
            return None
        kernel, form = OF_FORMS[record.form]
        divergence = record.loss if kernel == "topk" else None
        return Entry(kernel, f"{form}, {ODD}" if odd else form, record.dtype, divergence)
    backward = record.provider == OURS_BACKWARD
    forward_alone = isinstance(record, Record) and record.mode == "eval"
    if odd:  # counted with the gradient in the forward
        form = None if backward or forward_alone else ODD
    else:
        form = EVAL if forward_alone else BACKWARD if backward else TRAIN
    return form and Entry("dense", form, record.dtype, record.loss)


def compare_one(record: Measured, report: static.Report) -> Compared:
    """A measurement beside its predictions, which are made for bf16."""
    mode, milliseconds, times_copy = measurement(record)
    entry = counted_as(record)
    found = {}
    if entry and entry.dtype == BF16:
        of_chips = {
            c: report.predicted(entry.divergence, c, entry.kernel, entry.form) for c in CHIPS
        }
        found = {chip: p for chip, p in of_chips.items() if p}
    elements = record.tokens * record.vocab
    return Compared(
        record.case, mode, record.label, milliseconds, times_copy,
        {chip: p.picoseconds * elements * 1e-9 for chip, p in found.items()},
        {chip: p.times_copy for chip, p in found.items()},
        f"{entry.kernel}, {entry.form}" if found else None,
    )  # fmt: skip


def compare(folder: Path) -> tuple[list[Compared], dict[str, object]]:
    """Ours in the files of a folder beside the predictions, and the facts of the run."""
    report = static.load(COUNTS)
    found, facts = [], {}
    for name, kind in KINDS.items():
        path = folder / f"{name}.json"
        if path.exists():
            records, its_facts = load(path, kind)
            facts = facts or its_facts
            ours = [r for r in records if r.provider in WAYS and r.measured and r.case != OVERHEAD]
            found += [compare_one(record, report) for record in ours]
    return found, facts


def table_of(compared: Sequence[Compared], chips: Sequence[str]) -> Table:
    header = ["case", "mode", "", "ms", "of a copy", *(f"{chip}, predicted" for chip in chips)]

    def cell(c: Compared, chip: str) -> str:
        if chip not in c.predicted_ms:
            return "–"
        return f"{number(c.predicted_ms[chip])} ms, {number(c.predicted_times_copy[chip])}"

    return make_table(
        "Measured, and predicted without a GPU",
        header,
        [
            [
                c.case, c.mode, c.label, number(c.measured_ms), number(c.measured_times_copy),
                *(cell(c, chip) for chip in chips),
            ]
            for c in compared
        ],
        "predicted: milliseconds, and the time over that of a copy of the least bytes",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where the folder has no measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.beside", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    compared, facts = compare(folder)
    if not compared:
        print(f"{folder} has no measurement of ours", file=sys.stderr)
        return 1
    chip = chip_of(str(facts.get("gpu")))
    make_console().print(table_of(compared, [chip.name] if chip else list(CHIPS)))
    if chip is None:
        print(f"no predictions are made for {facts.get('gpu') or facts.get('cpu')}: all are shown")
    path = folder / "predictions.json"
    save(path, compared, facts)
    print(f"predictions: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
