"""``python -m benchmarks.gpu.beside FOLDER``: what was measured, beside the static predictions.

Reads ``dense.json``, ``graphs.json`` and ``forms.json`` of the folder, as far as they are there, and
the committed counts; prints a table and writes ``predictions.json``. Needs no GPU.

Times are multiples of a copy of the least bytes: the measured ones of the copy timed in the same
rounds, the predicted ones of a copy at the chip's nominal bandwidth.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..core.machine import RESULTS
from ..core.records import load, save
from ..core.screen import make_console, make_table, number
from ..losses.forms import FormRecord
from ..losses.records import OURS_BACKWARD, OVERHEAD, WAYS, Record
from ..static import results
from ..static.chips import CHIPS, chip_of
from ..static.launches import BACKWARD, BUCKET, ENTROPY, EVAL, LARGE, ODD, SLOTS, TRAIN
from ..static.results import Report
from ..static.roofline import Prediction
from .graphs import GraphRecord

GRAPH = "graph"  # the mode of a replayed training step
# the kernels of the forms whose launches are all counted, and the counts' form
FORM_KERNELS = {"tokens": ("token", ENTROPY), "topk": ("topk", BUCKET)}


@dataclass(frozen=True)
class Compared:
    """One measurement of ours; what is predicted, by chip, is empty where nothing was counted.

    ``predicted_form``: the form of the counts."""

    case: str
    mode: str
    label: str
    measured_ms: float
    measured_times_copy: float | None
    predicted_ms: dict[str, float]
    predicted_times_copy: dict[str, float]
    predicted_form: str | None


def static_form(provider: str, mode: str, vocab: int) -> str | None:
    """The form of the static counts that a measurement is of. They are of one vocabulary each, an
    even one of 128256 columns and an odd one of 50257, and stand for others like it."""
    if vocab % 8:  # rows begin anywhere, which is counted with the gradient in the forward alone
        return None if provider == OURS_BACKWARD or mode == "eval" else ODD
    if mode == "eval":
        return EVAL
    return BACKWARD if provider == OURS_BACKWARD else TRAIN


def predictions_for(
    report: Report, kernel: str, loss: str | None, dtype: str, form: str | None
) -> dict[str, Prediction]:
    """By chip."""
    wanted = (kernel, loss, dtype, form)
    found = [p for p in report.predictions if (p.kernel, p.divergence, p.dtype, p.form) == wanted]
    return {p.chip: p for p in found}


def compared(
    record: Record | GraphRecord | FormRecord,
    found: dict[str, Prediction],
    form: str | None,
    measured: tuple[str, float, float | None],
) -> Compared:
    """A record beside its predictions; ``measured``: mode, milliseconds, and times a copy."""
    mode, milliseconds, copies = measured
    elements = record.tokens * record.vocab
    return Compared(
        record.case, mode, record.label, milliseconds, copies,
        {chip: p.picoseconds * elements * 1e-9 for chip, p in found.items()},
        {chip: p.times_copy for chip, p in found.items()},
        form if found else None,
    )  # fmt: skip


def dense_rows(records: Sequence[Record | GraphRecord], report: Report) -> Iterator[Compared]:
    """Of the dense losses, timed as launched and as graphs."""
    for r in records:
        if r.provider not in WAYS or not r.measured or r.case == OVERHEAD:
            continue
        form = static_form(r.provider, r.mode, r.vocab)
        if isinstance(r, GraphRecord):
            measured = GRAPH, r.graph_ms, r.times_copy
        else:
            measured = r.mode, r.median_ms, r.copy_fraction and 1 / r.copy_fraction
        found = predictions_for(report, "dense", r.loss, r.dtype, form)
        yield compared(r, found, form, measured)


def form_rows(records: Sequence[FormRecord], report: Report) -> Iterator[Compared]:
    """Of the other losses; those of whose launches all are counted have a prediction."""
    for r in records:
        if r.provider not in WAYS or not r.measured:
            continue
        kernel, form = FORM_KERNELS.get(r.form, (None, None))
        loss = None if r.form == "tokens" else r.loss
        counted = r.vocab == LARGE and r.k in (None, SLOTS)
        found = predictions_for(report, kernel, loss, r.dtype, form) if counted else {}
        yield compared(r, found, form, ("train", r.median_ms, None))


def compare(folder: Path) -> tuple[list[Compared], dict[str, object]]:
    """All measurements of a folder beside their predictions, and the facts of the run."""
    report = results.load(RESULTS / "static.json")
    found, facts = [], {}
    for name, kind, rows in (
        ("dense", Record, dense_rows),
        ("graphs", GraphRecord, dense_rows),
        ("forms", FormRecord, form_rows),
    ):
        path = folder / f"{name}.json"
        if path.exists():
            records, its_facts = load(path, kind)
            facts = facts or its_facts
            found += rows(records, report)
    return found, facts


def table_of(found: Sequence[Compared], chips: Sequence[str]) -> Table:
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
            for c in found
        ],
        "predicted: milliseconds, and the time over that of a copy of the least bytes",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where the folder has no measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.beside", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    found, facts = compare(folder)
    if not found:
        print(f"{folder} has no measurement of ours", file=sys.stderr)
        return 1
    chip = chip_of(str(facts.get("gpu")))
    make_console().print(table_of(found, [chip.name] if chip else list(CHIPS)))
    if chip is None:
        print(f"no predictions are made for {facts.get('gpu') or facts.get('cpu')}: all are shown")
    path = folder / "predictions.json"
    save(path, found, facts)
    print(f"predictions: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
