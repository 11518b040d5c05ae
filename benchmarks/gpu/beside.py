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

from .. import static_report
from ..chips import CHIPS, Chip, chip_of
from ..forms import FormRecord
from ..records import OURS, OURS_BACKWARD, OURS_INPLACE, OVERHEAD, Record, load, save
from ..screen import make_console, make_table, number
from ..static_forms import FormRow, limits_of
from ..static_kernels import BACKWARD, EVAL, ODD, TRAIN
from ..static_roofline import Prediction
from .graphs import GraphRecord
from .stages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
WAYS = (OURS, OURS_BACKWARD, OURS_INPLACE)
GRAPH = "graph"  # the mode of a replayed training step
# the kernels of the forms whose launches are all counted
FORM_KERNELS = {"tokens": "token, with entropy", "topk": "top-k (64), {loss}"}


@dataclass(frozen=True)
class Compared:
    """One measurement of ours; what is predicted, by chip, is empty where nothing was counted.

    ``predicted_form``: the form or the kernel of the counts."""

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
    report: static_report.Report, loss: str, dtype: str, form: str | None
) -> dict[str, Prediction]:
    wanted = (loss, dtype, form)
    return {p.chip: p for p in report.predictions if (p.divergence, p.dtype, p.form) == wanted}


def dense_rows(
    records: Sequence[Record | GraphRecord], report: static_report.Report
) -> Iterator[Compared]:
    """Of the dense losses, timed as launched and as graphs."""
    for r in records:
        if r.provider not in WAYS or not r.measured or r.case == OVERHEAD:
            continue
        form = static_form(r.provider, r.mode, r.vocab)
        found = predictions_for(report, r.loss, r.dtype, form)
        graph = isinstance(r, GraphRecord)
        copies = r.times_copy if graph else r.copy_fraction and 1 / r.copy_fraction
        elements = r.tokens * r.vocab
        yield Compared(
            r.case, GRAPH if graph else r.mode, r.label, r.graph_ms if graph else r.median_ms, copies,
            {chip: p.picoseconds * elements * 1e-9 for chip, p in found.items()},
            {chip: p.times_copy for chip, p in found.items()},
            form if found else None,
        )  # fmt: skip


def form_prediction(rows: Sequence[FormRow], chip: Chip) -> tuple[float, float]:
    """Of launches one after the other: picoseconds an element, and over those of a copy."""
    total = sum(max(limits_of(row, chip).values()) for row in rows)
    return total, total / sum(chip.memory_picoseconds(row.moved) for row in rows)


def form_rows(records: Sequence[FormRecord], counted: Sequence[FormRow]) -> Iterator[Compared]:
    """Of the other losses; those of whose launches all are counted have a prediction."""
    for r in records:
        if r.provider not in WAYS or not r.measured:
            continue
        kernel = FORM_KERNELS.get(r.form, "").format(loss=r.loss)
        predicted = {}
        for chip in CHIPS.values():
            its = [
                x
                for x in counted
                if (x.kernel, x.n_cols, x.target) == (kernel, r.vocab, chip.target)
            ]
            if its and its[0].sweeps is not None:  # AMD's are not counted
                predicted[chip.name] = form_prediction(its, chip)
        elements = r.tokens * r.vocab
        yield Compared(
            r.case, "train", r.label, r.median_ms, None,
            {chip: picoseconds * elements * 1e-9 for chip, (picoseconds, _) in predicted.items()},
            {chip: copies for chip, (_, copies) in predicted.items()},
            kernel if predicted else None,
        )  # fmt: skip


def compare(folder: Path) -> tuple[list[Compared], dict[str, object]]:
    """All measurements of a folder beside their predictions, and the facts of the run."""
    report = static_report.load(RESULTS / "static.json")
    counted, _ = load(RESULTS / "static-forms.json", FormRow)
    found, facts = [], {}
    for name, kind, rows, counts in (
        ("dense", Record, dense_rows, report),
        ("graphs", GraphRecord, dense_rows, report),
        ("forms", FormRecord, form_rows, counted),
    ):
        path = folder / f"{name}.json"
        if path.exists():
            records, its_facts = load(path, kind)
            facts = facts or its_facts
            found += rows(records, counts)
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
