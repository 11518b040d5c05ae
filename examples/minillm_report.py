"""Table, plot and findings of ``minillm.py``.

    python examples/minillm_report.py examples/results/minillm.json --page docs/examples.md

draws the plot again, beside the JSON file, and writes table and findings into the page.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from minillm_arms import FULL, MINILLM, SAMPLED, SEQUENCE, SFT, SOFT
from report import GREY, console, in_page, save_figure
from rich.table import Table

COLOURS = {
    MINILLM: "#d1495b",
    SAMPLED: "#e3a13c",
    FULL: "#2a7f62",
    SOFT: "#3d6fa8",
    SEQUENCE: "#8a6bb1",
    SFT: "#8a8a8a",
}
MEASURES = {
    "reverse_kl": "reverse KL on own samples",
    "forward_kl": "forward KL on held-out text",
    "perplexity": "perplexity on held-out text",
    "entropy": "entropy on own samples",
}
ON_POLICY = (MINILLM, SAMPLED, FULL)
TARGET = 0.2  # how far below further SFT's reverse KL an on-policy way should end
BEFORE, TEACHER = "student before", "teacher"


def summary_of(seeds: list[dict]) -> dict:
    """Means over the seeds, and their standard deviations where there is more than one."""

    def over_seeds(measured: list[dict]) -> dict:
        return {
            name: {
                "mean": mean(point[name] for point in measured),
                "spread": stdev(point[name] for point in measured) if len(measured) > 1 else None,
            }
            for name in (*MEASURES, "steps", "reverse_kl_standard_error")
            if all(name in point for point in measured)
        }

    ends = {name: [seed["arms"][name][-1] for seed in seeds] for name in seeds[0]["arms"]}
    arms = {name: over_seeds(points) for name, points in ends.items()}
    further_sft = arms[SFT]["reverse_kl"]["mean"]
    for name, points in ends.items():
        of_seeds = zip(points, ends[SFT], strict=True)
        arms[name]["below_further_sft"] = {
            "mean": 1 - arms[name]["reverse_kl"]["mean"] / further_sft,
            "seeds": [1 - point["reverse_kl"] / sft["reverse_kl"] for point, sft in of_seeds],
        }
    return {
        TEACHER: over_seeds([seed[TEACHER] for seed in seeds]),
        BEFORE: over_seeds([seed[BEFORE] for seed in seeds]),
        "arms": arms,
    }


def titled(measure: str) -> str:
    label = MEASURES[measure]
    return label[0].upper() + label[1:]


def findings(record: dict) -> list[str]:
    """What the numbers say, in sentences, for and against MiniLLM."""
    summary, n_seeds = record["summary"], len(record["seeds"])
    arms = summary["arms"]

    def value(name: str, measure: str) -> float:
        return arms[name][measure]["mean"]

    def ranked(measure: str) -> list[str]:
        return sorted(arms, key=lambda name: value(name, measure))

    below = {name: arms[name]["below_further_sft"] for name in ON_POLICY}
    reached = []
    for name, found in below.items():
        n_reach = sum(share >= TARGET for share in found["seeds"])
        of_seeds = f" in {n_reach} of {n_seeds} seeds" if n_seeds > 1 else ""
        reached += [name + of_seeds] if found["mean"] >= TARGET else []
    seeds = f"the mean of {n_seeds} seeds" if n_seeds > 1 else "one seed"
    said = [
        f"Reverse KL to the teacher on own samples, {seeds}, against as many seconds of further SFT: "
        + ", ".join(f"{name} {0 - found['mean']:+.0%}" for name, found in below.items())
        + f". At least {TARGET:.0%} below it: {', '.join(reached) or 'none'}."
    ]
    for measure in ("reverse_kl", "forward_kl", "perplexity"):
        order = ranked(measure)
        place = order.index(MINILLM) + 1
        best, second = (f"{name} ({value(name, measure):.3g})" for name in order[:2])
        rest = (
            f"{best} has the lowest, before {second}"
            if place == 1
            else f"{best} has the lowest, MiniLLM ({value(MINILLM, measure):.3g}) is number {place} of "
            f"{len(order)}"
        )
        apart = abs(value(MINILLM, measure) - value(order[0 if place > 1 else 1], measure))
        spread = arms[MINILLM][measure]["spread"]
        if spread is not None and apart <= spread:
            rest += "; the two are no further apart than MiniLLM's spread over the seeds"
        said.append(f"{titled(measure)}: {rest}.")
    worse = [
        MEASURES[measure]
        for measure in ("reverse_kl", "forward_kl", "perplexity")
        if value(MINILLM, measure) > summary[BEFORE][measure]["mean"]
    ]
    said.append(
        "MiniLLM's student ends worse than it began in " + " and ".join(worse) + "."
        if worse
        else "MiniLLM's student ends better than it began in all three."
    )
    entropy = ", ".join(f"{name} {value(name, 'entropy'):.2f}" for name in ranked("entropy"))
    said.append(
        f"Entropy of what is sampled, in nats: {entropy}; the student before "
        f"{summary[BEFORE]['entropy']['mean']:.2f}, the teacher "
        f"{summary[TEACHER]['entropy']['mean']:.2f}."
    )
    error = max(arm["reverse_kl_standard_error"]["mean"] for arm in arms.values())
    said.append(
        f"The standard error of one seed's reverse KL is at most {error:.3f} nats on average; the "
        "same prompts and random numbers serve all students, so their differences are less noisy."
    )
    return said


def rows_of(record: dict) -> list[list[str]]:
    """The table: a row each for the teacher, the student before, and every way of training on."""
    summary = record["summary"]

    def cell(found: dict, digits: int) -> str:
        spread = "" if found["spread"] is None else f" ± {found['spread']:.{digits}f}"
        return f"{found['mean']:.{digits}f}{spread}"

    def row(name: str, measured: dict) -> list[str]:
        digits = {"perplexity": 1, "entropy": 2}
        steps = f"{measured['steps']['mean']:.0f}" if "steps" in measured else ""
        below = measured.get("below_further_sft")
        share = f"{0 - below['mean']:+.0%}" if below and name != SFT else ""
        cells = [cell(measured[measure], digits.get(measure, 3)) for measure in MEASURES]
        if name == TEACHER:  # its distance from itself
            cells[:2] = ["0", "0"]
        return [name, steps, cells[0], share, *cells[1:]]

    return [
        row(TEACHER, summary[TEACHER]),
        row(BEFORE, summary[BEFORE]),
        *(row(name, measured) for name, measured in summary["arms"].items()),
    ]


HEADINGS = ["", "steps", "reverse KL", "vs SFT", "forward KL", "perplexity", "entropy"]


def title_of(record: dict) -> str:
    seconds, n_seeds = record["config"]["seconds"], len(record["seeds"])
    spread = f"means of {n_seeds} seeds ± standard deviation" if n_seeds > 1 else "one seed"
    return f"{seconds:g} s of training each; nats a token; {spread}"


def show(record: dict) -> None:
    """Print the table, one prompt's continuations, and the findings."""
    table = Table(title=title_of(record), title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for row in rows_of(record):
        table.add_row(*row)
    console.print(table)
    samples = record["seeds"][0]["samples"]
    console.print(f"samples, continuing {samples['prompt'][0]!r}", markup=False)
    for name, texts in samples.items():
        if name != "prompt":
            console.print(f"  {name}: {texts[0]!r}", markup=False)
    for sentence in findings(record):
        console.print(f"- {sentence}", markup=False)
    seconds = mean(seed["total_seconds"] for seed in record["seeds"])
    console.print(f"wall time: {seconds:.0f} s a seed")


def draw_measure(axes: Axes, record: dict, measure: str) -> None:
    """Every way's mean over the seeds against seconds of training, with their range as a band."""
    for name in record["summary"]["arms"]:
        curves = [seed["arms"][name] for seed in record["seeds"]]
        points = list(zip(*curves, strict=True))
        seconds = [mean(point["seconds"] for point in at) for at in points]
        values = [[point[measure] for point in at] for at in points]
        axes.plot(
            seconds, list(map(mean, values)), "o-", color=COLOURS[name], label=name, lw=2, ms=4
        )
        if len(curves) > 1:
            axes.fill_between(
                seconds, list(map(min, values)), list(map(max, values)),
                color=COLOURS[name], alpha=0.15, lw=0,
            )  # fmt: skip
    axes.set_title(titled(measure), loc="left", fontsize=11)
    axes.set_xlabel("seconds of training on")
    axes.margins(x=0.03)


def draw(record: dict, path: Path) -> None:
    """Both KLs and the entropy over time."""
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    measures = ("reverse_kl", "forward_kl", "entropy")
    of_measures = figure.subplots(1, len(measures))
    for axes, measure in zip(of_measures, measures, strict=True):
        draw_measure(axes, record, measure)
    teacher = record["summary"][TEACHER]["entropy"]["mean"]
    of_measures[-1].axhline(teacher, color=GREY, lw=1, ls="--", label="the teacher's")
    of_measures[0].set_ylabel("nats per token")
    handles = of_measures[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), frameon=False)
    save_figure(figure, record, path)


BEGIN, END = "<!-- minillm:begin -->", "<!-- minillm:end -->"


def block_of(record: dict) -> str:
    """What stands between the page's two markers."""
    rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *rows_of(record)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    said = "\n".join(f"- {sentence}" for sentence in findings(record))
    machine, versions = record["machine"], record["versions"]
    seconds = mean(seed["total_seconds"] for seed in record["seeds"])
    return (
        "![both KLs and the entropy over time](../examples/results/minillm.png)\n\n"
        f"{title_of(record)}:\n\n{table}\n\n{said}\n\n"
        f"`{record['command']}`, {seconds / 60:.0f} minutes a seed, {machine['torch_threads']} "
        f"threads of {machine['cpu']}, torch {versions['torch']}, {record['date'][:10]}."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("record", type=Path)
    parser.add_argument("--page", type=Path, help="that has the two markers")
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    draw(record, options.record.with_suffix(".png"))
    show(record)
    if options.page:
        options.page.write_text(in_page(options.page.read_text(), block_of(record), BEGIN, END))


if __name__ == "__main__":
    main()
