"""What the examples' results are kept with, and the table and plot of ``distill_text.py``.

    python examples/report.py examples/results/distill_text.json

draws the plot again, beside the JSON file.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

EAGER, OURS = "eager", "distill_ops"
COLOURS = {EAGER: "#9db7d5", OURS: "#d1495b"}
PACKAGES = ("torch", "transformers", "tokenizers", "distill_ops")
GREY, LIMIT = "#555555", "#2a7f62"
TIMES = {
    "step": "whole step",
    "loss": "loss, forward + backward",
    "rest": "rest of the step",
}
console = Console(highlight=False, soft_wrap=True)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def surroundings(packages: Sequence[str] = PACKAGES) -> dict:
    """When, where and with what a result was made."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def in_page(page: str, block: str, begin: str, end: str) -> str:
    """The page with that between its two markers; ValueError where one is not there, once."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{block}\n{end}{after}"


def relative_differences(eager: list[float], ours: list[float]) -> list[float]:
    """One a step; infinite where a loss is not a number."""
    pairs = zip(eager, ours, strict=True)
    differences = [abs(b - a) / abs(a) for a, b in pairs]
    return [math.inf if math.isnan(difference) else difference for difference in differences]


def show(record: dict) -> None:
    """Print times, memory and losses side by side."""
    students = [record["students"][name] for name in (EAGER, OURS)]
    steps = record["config"]["steps"]
    table = Table(
        title=f"the students: {steps} steps, median times, losses in nats a token",
        title_justify="left",
    )
    table.add_column("")
    for heading in (EAGER, OURS, "ratio"):
        table.add_column(heading, justify="right")

    def compare(label: str, values: list[float | None]) -> None:
        if None in values:
            table.add_row(label, *["not measured"] * 2)
        else:
            table.add_row(label, *(f"{v:.1f}" for v in values), f"{values[0] / values[1]:.2f}")

    for part, label in TIMES.items():
        compare(f"{label} (ms)", [student["median_ms"][part] for student in students])
    compare("peak memory of the loss (MiB)", [student["loss_peak_mib"] for student in students])
    for when, i in (("first", 0), ("last", -1)):
        values = [f"{student['losses'][i]:.6f}" for student in students]
        table.add_row(f"training loss, {when} step", *values)
    for when in ("before", "after"):
        values = [f"{student['held_out_nats'][when]:.6f}" for student in students]
        table.add_row(f"held-out loss {when} training", *values)
    console.print(table)

    teacher, agreement = record["teacher_held_out_nats"], record["agreement"]
    seconds = ", ".join(
        f"{name.replace('_', ' ')} {value:.0f} s" for name, value in record["seconds"].items()
    )
    console.print(
        f"teacher's held-out loss: {teacher['before']:.3f} before, {teacher['after']:.3f} after "
        "(nats a token)\n"
        f"largest relative difference of the two curves: "
        f"{agreement['largest_relative_difference']:.1e} at step {agreement['at_step']} "
        f"({agreement['tolerance']:.0e} allowed)\n"
        f"wall time: {seconds}"
    )


def save_figure(figure: Figure, record: dict, path: Path) -> None:
    """Write the figure under a line that says on what its record was made."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    config, machine, versions = record["config"], record["machine"], record["versions"]
    figure.suptitle(
        f"{config['batch_size']} x {config['length']} tokens a step, vocabulary "
        f"{config['vocab_size']}, float32, {machine['torch_threads']} threads of {machine['cpu']}, "
        f"torch {versions['torch']}, {record['date'][:10]}",
        fontsize=10, color=GREY, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def draw(record: dict, path: Path) -> None:
    """Loss curves and their difference on the left, times and memory on the right."""
    names = [EAGER, OURS]
    students = [record["students"][name] for name in names]
    colours = [COLOURS[name] for name in names]
    tolerance = record["agreement"]["tolerance"]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[2.4, 1, 1], height_ratios=[2.4, 1], wspace=0.06)

    curves = figure.add_subplot(grid[0, 0])
    curves.plot(students[0]["losses"], color=colours[0], lw=4.5, label=EAGER)
    curves.plot(students[1]["losses"], color=colours[1], lw=1.1, ls=(0, (4, 2)), label=OURS)
    curves.set_ylabel("training loss (nats per token)")
    curves.set_title("Training loss of the two students", loc="left", fontsize=11)
    curves.legend(frameon=False)
    curves.tick_params(labelbottom=False)

    below = figure.add_subplot(grid[1, 0], sharex=curves)
    differences = relative_differences(*(student["losses"] for student in students))
    # equal losses have no place on a logarithmic axis: they are drawn at its foot
    floor = 1e-8
    below.plot([max(difference, floor) for difference in differences], ".", color=GREY, ms=4)
    below.axhline(tolerance, color=LIMIT, lw=1)
    below.text(0, tolerance * 0.6, "allowed", color=LIMIT, fontsize=9, va="top")
    below.set(yscale="log", ylim=(floor / 2, tolerance * 5), xlabel="step")
    below.set_ylabel("relative difference\n(0 drawn at $10^{-8}$)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))

    time_axes = figure.add_subplot(grid[:, 1])
    loss, rest = ([student["median_ms"][part] for student in students] for part in ("loss", "rest"))
    bars = time_axes.bar(names, rest, width=0.6, color="#dddddd")
    time_axes.bar_label(bars, [f"rest\n{value:.0f} ms" for value in rest], label_type="center")
    bars = time_axes.bar(names, loss, width=0.6, bottom=rest, color=colours)
    time_axes.bar_label(bars, [f"loss {value:.0f} ms" for value in loss], padding=3)
    time_axes.set_ylabel("training step, median (ms)")
    time_axes.set_title(f"Time of the loss: {loss[0] / loss[1]:.1f} to 1", loc="left", fontsize=11)

    memory_axes = figure.add_subplot(grid[:, 2])
    memory = [student["loss_peak_mib"] for student in students]
    memory_axes.set_ylabel("peak of the loss, above what is held before it (MiB)")
    if None in memory:
        memory_axes.set_title("Memory: measured on Linux only", loc="left", fontsize=11)
    else:
        bars = memory_axes.bar(names, memory, width=0.6, color=colours)
        memory_axes.bar_label(bars, [f"{value:.0f} MiB" for value in memory], padding=3)
        memory_axes.axhline(record["logits_mib"], color=GREY, lw=1, ls=":")
        memory_axes.annotate(
            "dotted:\nthe gradient alone", (1, memory[1]), xytext=(0, 24),
            textcoords="offset points", ha="center", color=GREY, fontsize=9,
        )  # fmt: skip
        ratio = memory[0] / memory[1]
        memory_axes.set_title(f"Memory of the loss: {ratio:.1f} to 1", loc="left", fontsize=11)

    for axes in (time_axes, memory_axes):
        axes.margins(y=0.08)
    save_figure(figure, record, path)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
