"""Table, text and plot of ``system2.py``.

    python examples/system2_report.py examples/results/system2.json --page docs/examples.md

draws the plot again, beside the JSON file, and writes the numbers between the page's marks.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from mode_report import write_into
from report import GREY, console
from rich.box import SIMPLE_HEAD
from rich.table import Table

Run = dict  # one seed of one task
GAIN, FAR = (
    0.30,
    0.5,
)  # points that a filter has to bring; a share of System 2 that a control stays below
BARS: dict[str, tuple[str, Callable[[Run], float]]] = {  # by what is drawn and told
    "System 1": ("#b8b8b8", lambda run: run["system1"]["best"]),
    "unfiltered": ("#e39b3b", lambda run: run["students"]["unfiltered"]["accuracy"]),
    "filtered": ("#d1495b", lambda run: run["students"]["filtered"]["accuracy"]),
    "true answers": ("#9db7d5", lambda run: run["students"]["true"]["accuracy"]),
    "System 2": ("#2e6f9e", lambda run: run["system2"]["accuracy"]),
}
LABELS = {
    "System 1": "System 1: few labelled direct answers",
    "unfiltered": "distilled without a filter",
    "filtered": "distilled, filtered",
    "true answers": "trained on the true answers instead",
    "System 2": "System 2: one sample with its scratchpad",
}


def mean(values: list[float | None]) -> float:
    """Of those that are there; 0 of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def of(task: dict, bar: str) -> list[float]:
    """Accuracies, one a seed."""
    return [BARS[bar][1](run) for run in task["seeds"]]


def share(values: list[float | None]) -> str:
    """Their mean, and where there are several the least and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    ends = f" ({min(known):.1%} to {max(known):.1%})" if len(known) > 1 else ""
    return f"{mean(known):.1%}{ends}"


def facts(task: dict) -> dict[str, str]:
    """What is told of a task, by heading."""
    runs = task["seeds"]
    precisions = {
        name: [run["students"][name]["precision"] for run in runs]
        for name in ("filtered", "unfiltered")
    }
    tokens = mean([run["system2"]["tokens"] for run in runs])
    sizes = task["sizes"]
    return {
        "weights of the model": f"{runs[0]['parameters']:,}",
        "labelled direct answers": f"{sizes['labelled']:,}",
        "questions without labels": f"{sizes['unlabelled']:,}",
        **{f"{name}, accuracy": share(of(task, name)) for name in BARS},
        **{
            f"{name}, stopped by validation": share([run["students"][name]["best"] for run in runs])
            for name in ("unfiltered", "filtered")
        },
        "yield of the filter": share([run["curation"]["yield"] for run in runs]),
        "precision of the kept": share(precisions["filtered"]),
        "precision of all": share(precisions["unfiltered"]),
        "tokens an answer, direct": f"{mean([run['system1']['tokens'] for run in runs]):.0f}",
        "tokens an answer, System 2": f"{tokens:.0f}",
        "tokens a curated question": f"{tokens * runs[0]['curation']['samples']:.0f}",
    }


def verdict(name: str, task: dict) -> str:
    """What the numbers say of a task, and whether it is what the paper reports."""
    before, raw, filtered, true, system2 = (mean(of(task, bar)) for bar in BARS)
    told = (
        f"{name}: direct accuracy goes from {before:.1%} to {filtered:.1%} with the filter and to "
        f"{raw:.1%} without"
    )
    if task["control"]:
        if filtered < FAR * system2:
            told += f"; it stays below half of System 2's {system2:.1%}, as the paper reports of arithmetic"
            return f"{told}, and the true answers bring it to {true:.1%}"
        return f"{told}, of System 2's {system2:.1%}: the control does not fail here, as it does in the paper"
    rise, worth = 100 * (filtered - before), 100 * (filtered - raw)
    told += f": a rise of {rise:.0f} points"
    told += "" if rise >= 100 * GAIN else f", less than the {100 * GAIN:.0f} that were aimed at"
    higher = sum(a > b for a, b in zip(of(task, "filtered"), of(task, "unfiltered"), strict=True))
    seeds = f"higher with the filter in {higher} of {len(task['seeds'])} seeds"
    if worth >= 1:
        return f"{told}, of which the filter is worth {worth:.0f} ({seeds})"
    return f"{told}; the filter is worth nothing here ({worth:+.1f} points, {seeds}), unlike in the paper"


def show(record: dict) -> None:
    """Print a column a task, then what they say."""
    tasks = record["tasks"]
    n_seeds = len(next(iter(tasks.values()))["seeds"])
    table = Table(
        title=f"System 2 distillation: mean of {n_seeds} seeds",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for name in tasks:
        table.add_column(name, justify="right")
    columns = [facts(task) for task in tasks.values()]
    for heading in columns[0]:
        table.add_row(heading, *(column[heading].split(" (")[0] for column in columns))
    console.print(table)
    for name, task in tasks.items():
        console.print(f"{verdict(name, task)}.")
    console.print(f"wall time: {record['seconds']:.0f} s")


def markdown(record: dict) -> str:
    """The numbers as a page has them."""
    tasks, machine = record["tasks"], record["machine"]
    n_seeds = len(next(iter(tasks.values()))["seeds"])
    columns = [facts(task) for task in tasks.values()]
    lines = ["| | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for heading in columns[0]:
        lines.append(f"| {heading} | " + " | ".join(column[heading] for column in columns) + " |")
    spread = "means, and the least and largest, of" if n_seeds > 1 else "of"
    lines += [
        "",
        f"({spread} {n_seeds} seed{'s' * (n_seeds > 1)}; {record['seconds'] / n_seeds / 60:.1f} minutes a "
        f"seed, {machine['torch_threads']} threads of {machine['cpu']}, torch "
        f"{record['versions']['torch']}, `{record['command']}`)",
        "",
    ]
    lines += [f"- {verdict(name, task)}." for name, task in tasks.items()]
    return "\n".join(lines)


def draw(record: dict, path: Path) -> None:
    """Bars of accuracies by task, a dot a seed; below each what the filter kept and what answers cost."""
    tasks, machine = record["tasks"], record["machine"]
    n_seeds = len(next(iter(tasks.values()))["seeds"])
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(BARS)
    for i, (bar, (colour, _)) in enumerate(BARS.items()):
        values = [of(task, bar) for task in tasks.values()]
        places = [j + (i - (len(BARS) - 1) / 2) * width for j in range(len(tasks))]
        drawn = axes.bar(
            places, [mean(v) for v in values], width * 0.92, color=colour, label=LABELS[bar]
        )
        tops = [max(v) for v in values]
        for place, top, rectangle in zip(places, tops, drawn, strict=True):
            axes.annotate(
                f"{rectangle.get_height():.0%}", (place, top), xytext=(0, 4),
                textcoords="offset points", ha="center", fontsize=9,
            )  # fmt: skip
        if n_seeds > 1:
            for place, each in zip(places, values, strict=True):
                axes.plot([place] * n_seeds, each, "o", color="black", ms=2.5, alpha=0.6)
    notes = []
    for name, task in tasks.items():
        told = facts(task)
        notes.append(
            f"{name}{' (negative control)' if task['control'] else ''}\n"
            f"kept {told['yield of the filter'].split(' (')[0]}, of which right "
            f"{told['precision of the kept'].split(' (')[0]}; of all "
            f"{told['precision of all'].split(' (')[0]}\n"
            f"{told['tokens an answer, direct']} tokens an answer, System 2 "
            f"{told['tokens an answer, System 2']}"
        )
    axes.set_xticks(range(len(tasks)), notes)
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 1.08), ylabel="right answers, held-out questions")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9.5)
    figure.supxlabel(
        f"{n_seeds} seed{'s' * (n_seeds > 1)}{', a dot each' * (n_seeds > 1)}; "
        f"{machine['torch_threads']} threads of {machine['cpu']}, torch {record['versions']['torch']}, "
        f"{record['date'][:10]}",
        fontsize=9, color=GREY, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=150)


PICTURE = "![accuracy of System 1, of the distilled models and of System 2](../examples/results/system2.png)\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="system2.json")
    parser.add_argument("--page", type=Path, help="page to write the numbers into")
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    draw(record, options.record.with_suffix(".png"))
    if options.page:
        write_into(options.page, PICTURE + markdown(record), "system2")


if __name__ == "__main__":
    main()
