"""``python -m benchmarks.static``: every kernel's cost, counted in code compiled for GPUs that are not
here, and the times that follow. Counts are exact; times are predictions.

A full run writes the JSON, the picture and the two pages of ``docs/``; a partial one only what it is
told. The JSON names the kernels' code by a digest: ``--check`` says whether it is today's.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from distill_ops.analysis import aot
from distill_ops.analysis.forms import Form

from ..core.machine import RESULTS, ROOT, describe
from ..core.screen import make_console, make_table, number, progress_bar
from . import page, plot, tables
from .cache_model import launch_traffic, target_of, traffic
from .chips import CHIPS
from .digest import kernels_digest, toolchain
from .kernels import Row, entry_rows
from .launches import BF16, ODD, TRAIN, Entry, built_in, entries
from .limits import LIMITS, QUANTITIES, faults
from .peers import PeerRow, peer_rows
from .results import CacheRow, Report, load, save
from .roofline import Prediction, moved_once, predict

VOCABULARIES = (32000, 128256, 151936, 262144)
OUTPUTS = {
    "json": RESULTS / "static.json",
    "plot": ROOT / "docs" / page.PLOT,
    "page": ROOT / "docs/static-roofline.md",
    "tables": ROOT / "docs/static-tables.md",
}
FACTS = ("python", "torch", "triton", "distill_ops", "commit", "date")
QUICK = [("dense", TRAIN, BF16), ("dense", ODD, BF16)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="the dense kernel, bf16, two forms on sm_90: a minute")
    add("--targets", nargs="+", choices=aot.TARGETS, help="default: all")
    add("--divergences", nargs="+", choices=built_in(), help="default: all")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (one a core)")
    add("--from-json", type=Path, metavar="PATH", help="report an earlier run, compile nothing")
    add("--check", action="store_true", help="is the JSON of today's kernels? compiles nothing")
    for name, what in (
        ("json", "counts go"), ("plot", "picture goes"), ("page", "page goes"),
        ("tables", "page of all tables goes"),
    ):  # fmt: skip
        add(f"--{name}", type=Path, metavar="PATH", help=f"where the {what}")
    return parser.parse_args(arguments)


def selected(target: str, divergences: Sequence[str], quick: bool) -> list[Entry]:
    """The lines of the matrix to compile for a target."""
    wanted = (None, *divergences)
    found = [entry for entry in entries(target) if entry.divergence in wanted]
    return [e for e in found if (e.kernel, e.form, e.dtype) in QUICK] if quick else found


def count_entry(entry: Entry, target: str) -> tuple[list[Row], list[Prediction]]:
    """What a process does: compile one line of the matrix, and predict it for the target's chips."""
    launches, rows = entry_rows(entry, aot.TARGETS[target])
    predictions = []
    for chip in CHIPS.values():
        if chip.target != target or any(row.instructions is None for row in rows):
            continue
        if entry.kernel == "dense":
            moved = [launch_traffic(launch, chip) for launch in launches]
        else:
            moved = [moved_once(row) for row in rows]
        predictions.append(predict(rows, moved, chip))
    return rows, predictions


def count_all(
    work: Sequence[tuple[Entry, str]], jobs: int, step: Callable[[str], None]
) -> tuple[list[Row], list[Prediction]]:
    """Every line of the matrix for its target, in ``jobs`` processes."""
    rows, predictions = [], []
    with ExitStack() as stack:
        results = (count_entry(*item) for item in work)
        if jobs > 1:
            spawned = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
            pool = stack.enter_context(spawned)
            results = pool.map(count_entry, *zip(*work, strict=True))
        for entry, target in work:
            step(f"{entry.kernel} {entry.divergence or ''}, {target}")
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


def count_peers(earlier: Report | None) -> list[PeerRow]:
    """Other packages' kernels; of those that are not installed, what an earlier run counted."""
    known = {} if earlier is None else {p.key: p for p in earlier.peers if p.skipped is None}
    rows = [known.get(p.key, p) if p.version is None else p for p in peer_rows()]
    return [replace(row, date=row.date or earlier.facts["date"][:10]) if row in known.values() else row for row in rows]  # fmt: skip


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
    digest = kernels_digest()  # of what is compiled, should the sources change meanwhile
    work = [(e, t) for t in targets for e in selected(t, divergences, options.quick)]
    console = make_console()
    began = time.monotonic()
    with progress_bar(console, len(work) + 2) as step:
        done = iter(range(len(work)))

        def count_step(text: str) -> None:
            step(text)
            if (n := next(done)) % 50 == 0 and not console.is_terminal:
                console.print(f"{n} of {len(work)}, {(time.monotonic() - began) / 60:.1f} minutes")

        rows, predictions = count_all(work, options.jobs, count_step)
        step("cache model")
        cache = model_cache(divergences, targets)
        step("other packages")
        earlier = load(OUTPUTS["json"]) if OUTPUTS["json"].exists() else None
        peers = [] if options.quick else count_peers(earlier)
    described = describe(torch.device("cpu"), [])
    facts = {name: described[name] for name in FACTS}
    facts |= {"command": command(options), "kernels": digest, "toolchain": toolchain()}
    minutes = (time.monotonic() - began) / 60
    console.print(f"{len(rows)} launches compiled and counted in {minutes:.1f} minutes")
    return Report(facts, rows, predictions, cache, peers)


def _mark(row: Row, quantity: str) -> str:
    count = getattr(row, QUANTITIES[quantity])
    most = getattr(LIMITS[row.divergence], quantity)
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


def check(report: Report) -> int:
    """Whether the counts are those of today's kernels: the exit status."""
    same = report.facts.get("kernels") == kernels_digest()
    print("counts of today's kernels" if same else "kernels/ has changed: run make static")
    return int(not same)


def write(report: Report, paths: dict[str, Path]) -> None:
    """The files that are named, JSON first: the pages are made of what it holds, rounded as there."""
    writers = {
        "json": save,
        "plot": plot.draw,
        "page": lambda path, report: path.write_text(page.page(report), encoding="utf-8"),
        "tables": lambda path, report: path.write_text(tables.page(report), encoding="utf-8"),
    }
    for name, writer in writers.items():
        if path := paths.get(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer(path, report)
            report = load(path) if name == "json" else report
            print(f"{name}: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and report; the exit status is 1 where a kernel breaks its limits."""
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    if options.check:
        return check(load(options.from_json or OUTPUTS["json"]))
    report = load(options.from_json) if options.from_json else run(options)
    console = make_console()
    targets = report.targets()
    console.print(counts_table(report, "sm_90" if "sm_90" in targets else targets[0]))
    for peer in report.peers:
        if peer.skipped:
            console.print(f"skipped: {peer.package} {peer.kernel}, {peer.skipped}", markup=False)
    partial = options.quick or options.targets or options.divergences
    defaults = {} if partial or options.from_json else OUTPUTS
    write(report, {name: getattr(options, name) or defaults.get(name) for name in OUTPUTS})
    found = [fault for row in report.rows for fault in faults(row)]
    for fault in found:
        console.print(f"breaks its limit: {fault}", markup=False)
    return int(bool(found))
