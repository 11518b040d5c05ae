"""``python -m benchmarks.static``: the kernels' cost, counted in code compiled for GPUs that are not
here, and the times that follow. Counts are exact; times are predictions.

A full run writes the JSON, the plot and the page of ``docs/``; a partial one only what it is told.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.table import Table

from distill_ops.analysis import aot
from distill_ops.analysis.forms import Form

from ..core.machine import ROOT, describe
from ..core.screen import make_console, make_table, number, progress_bar
from . import static_page, static_plot
from .cache_model import launch_traffic, target_of, traffic
from .chips import CHIPS
from .kernels import Row, built_in, form_rows, selected, token_rows
from .limits import LIMITS, QUANTITIES
from .peers import peer_rows
from .results import CacheRow, Report, load, save
from .roofline import Prediction, predict

VOCABULARIES = (32000, 128256, 151936, 262144)
OUTPUTS = {
    "json": ROOT / "benchmarks/results/static.json",
    "plot": ROOT / "docs" / static_page.PLOT,
    "page": ROOT / "docs/static-roofline.md",
}
FACTS = ("python", "torch", "triton", "distill_ops", "commit", "date")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="bf16 in two forms on sm_90 alone: a minute")
    add("--targets", nargs="+", choices=aot.TARGETS, help="default: all")
    add("--divergences", nargs="+", choices=built_in(), help="default: all")
    add("--jobs", type=int, default=1, metavar="N", help="processes that compile")
    add("--from-json", type=Path, metavar="PATH", help="report an earlier run, compile nothing")
    for name, what in (("json", "counts"), ("plot", "plot"), ("page", "page in Markdown")):
        add(f"--{name}", type=Path, metavar="PATH", help=f"where the {what} goes")
    return parser.parse_args(arguments)


def count_divergence(name: str, target: str, quick: bool) -> tuple[list[Row], list[Prediction]]:
    """Compile every form of one divergence for a target; predict it for the target's chips."""
    rows, predictions = [], []
    for form, dtype in selected(quick):
        launches, counted = form_rows(built_in()[name], form, dtype, aot.TARGETS[target])
        rows += counted
        for chip in CHIPS.values():
            if chip.target == target:
                moved = [launch_traffic(launch, chip) for launch in launches]
                predictions.append(predict(counted, moved, chip))
    return rows, predictions


def count_dense(
    divergences: Sequence[str],
    targets: Sequence[str],
    quick: bool,
    jobs: int,
    step: Callable[[str], None],
) -> tuple[list[Row], list[Prediction]]:
    """All of them, in ``jobs`` processes."""
    work = [(name, target, quick) for target in targets for name in divergences]
    rows, predictions = [], []
    with ExitStack() as stack:
        if jobs > 1:
            spawned = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
            pool = stack.enter_context(spawned)
            results = pool.map(count_divergence, *zip(*work, strict=True))
        else:
            results = (count_divergence(*item) for item in work)
        for name, target, _ in work:
            step(f"{name}, {target}")
            new_rows, new_predictions = next(results)
            rows += new_rows
            predictions += new_predictions
    return rows, predictions


def model_cache(divergences: Sequence[str], targets: Sequence[str]) -> list[CacheRow]:
    """The cache model over vocabularies, with the programs that the launcher starts."""
    found = []
    for name in divergences:
        for chip in (chip for chip in CHIPS.values() if chip.target in targets):
            for n_cols in VOCABULARIES:
                launches = Form(n_cols).launches(built_in()[name], target_of(chip))
                moved = traffic(launches, chip)
                found.append(CacheRow(name, chip.name, n_cols, launches[0].grid[0], moved))
    return found


def command(options: argparse.Namespace) -> str:
    """What makes the same counts; where the files go is not part of it."""
    words = ["python -m benchmarks.static"]
    words += ["--quick"] if options.quick else []
    for name in ("targets", "divergences"):
        words += [f"--{name}", *getattr(options, name)] if getattr(options, name) else []
    return " ".join(words)


def run(options: argparse.Namespace) -> Report:
    """Compile and count all that the options name."""
    divergences = options.divergences or list(built_in())
    targets = options.targets or (["sm_90"] if options.quick else list(aot.TARGETS))
    console = make_console()
    with progress_bar(console, len(divergences) * len(targets) + 3) as step:
        rows, predictions = count_dense(divergences, targets, options.quick, options.jobs, step)
        step("kernels over tokens")
        for target in targets:
            rows += token_rows(aot.TARGETS[target])
        step("cache model")
        cache = model_cache(divergences, targets)
        step("other packages")
        peers = [] if options.quick else peer_rows()
    described = describe(torch.device("cpu"), [])
    facts = {name: described[name] for name in FACTS}
    facts["command"] = command(options)
    return Report(facts, rows, predictions, cache, peers)


def _mark(row: Row, quantity: str) -> str:
    count = getattr(row, QUANTITIES[quantity])
    limit = LIMITS.get(row.divergence)
    if limit is None:
        return number(count)
    most = getattr(limit, quantity)
    text = f"{number(count)}/{most:g}"
    return text if count <= most else f"[red]{text}[/red]"


def counts_table(report: Report, target: str) -> Table:
    return make_table(
        f"Counted on {target}: bf16, gradient in the forward, an element, count/limit",
        ["divergence", "instructions", "exp+log", "guarded", "registers", "stack"],
        [
            [row.divergence, *(_mark(row, q) for q in QUANTITIES), str(row.registers), str(row.stack)]
            for row in report.trained(target)
        ],
    )  # fmt: skip


def times_table(report: Report) -> Table:
    chips = list(dict.fromkeys(p.chip for p in report.predictions))
    names = list(dict.fromkeys(p.divergence for p in report.predictions))

    def cell(found: Prediction | None) -> str:
        return "–" if found is None else f"{number(found.times_copy)} {found.binds}"

    return make_table(
        "Predicted times a copy of the same bytes, and what binds",
        ["divergence", *chips],
        [[name, *(cell(report.predicted(name, chip)) for chip in chips)] for name in names],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    report = load(options.from_json) if options.from_json else run(options)
    console = make_console()
    targets = list(dict.fromkeys(row.target for row in report.rows))
    console.print(counts_table(report, "sm_90" if "sm_90" in targets else targets[0]))
    console.print(times_table(report))
    for peer in report.peers:
        if peer.skipped:
            console.print(f"skipped: {peer.package} {peer.kernel}, {peer.skipped}", markup=False)
    partial = options.quick or options.targets or options.divergences or options.from_json
    for name, write in (
        ("json", save),
        ("plot", static_plot.draw),
        ("page", lambda path, report: path.write_text(static_page.page(report), encoding="utf-8")),
    ):
        path = getattr(options, name) or (None if partial else OUTPUTS[name])
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, report)
            if name == "json":  # rounded as it is there, so that the page is what the JSON gives
                report = load(path)
            console.print(f"{name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
