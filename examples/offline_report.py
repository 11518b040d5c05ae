"""Table and plot of ``offline_teacher.py``.

    python examples/offline_report.py examples/results/offline_teacher.json

draws the plot again, beside the JSON file.
"""

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from report import GREY, LIMIT, console, save_figure
from rich.table import Table

LIVE, STORED = "live teacher", "stored teacher"
COLOURS = {LIVE: "#9db7d5", STORED: "#d1495b"}
TEACHER_COLOUR, REST_COLOUR = "#e3b565", "#dddddd"
PARTS = {  # of a training step
    "step": "whole step",
    "teacher": "teacher: forward, or rows from the disk",
    "loss": "loss, forward + backward",
    "rest": "rest of the step",
}


def size(n_bytes: float) -> str:
    """In decimal units, to three digits."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


def pays_after(record: dict) -> str:
    steps = record["pays_after_steps"]
    return "does not pay: no step is faster" if steps is None else f"pays after {steps:.0f} steps"


def show(record: dict) -> None:
    """Print times, sizes and losses side by side."""
    names = (LIVE, STORED)
    students = [record["students"][name] for name in names]
    config, store = record["config"], record["store"]
    table = Table(
        title=f"the students: {config['steps']} steps, {config['epochs']} epochs, median times, "
        "nats a token",
        title_justify="left",
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for part, label in PARTS.items():
        values = [student["median_ms"][part] for student in students]
        table.add_row(f"{label} (ms)", *(f"{value:.1f}" for value in values))

    def compare(label: str, values: list[float]) -> None:
        table.add_row(label, *(f"{value:.4f}" for value in values))

    for when, i in (("first", 0), ("last", -1)):
        compare(f"forward KL, {when} step", [student["forward_kl"][i] for student in students])
    for when, i in (("before", 0), ("after", -1)):
        found = [student["held_out"]["nats"][i] for student in students]
        compare(f"held-out loss {when} training", found)
    closeness = [student["held_out_teacher"] for student in students]
    compare("held-out KL from the whole teacher", [x["forward_kl_nats"] for x in closeness])
    compare("held-out top-1 agreement with it", [x["top1_agreement"] for x in closeness])
    console.print(table)

    seconds = store["seconds"]
    console.print(
        f"store: {store['tokens']:,} tokens, top {config['k']} of {config['vocab_size']:,}, "
        f"{store['covered_probability']:.0%} of the teacher's probability\n"
        f"       {size(store['bytes'])}, {store['bytes_per_token']:.1f} bytes a token, in "
        f"{store['files']} files; bfloat16 logits: {size(store['bfloat16_logits_bytes'])}\n"
        f"       {seconds['total']:.1f} s: teacher {seconds['teacher']:.1f}, top-k "
        f"{seconds['topk']:.1f}, writing {seconds['write']:.1f}; {pays_after(record)}"
    )
    teacher = record["teacher_held_out_nats"]["after"]
    console.print(f"teacher's held-out loss: {teacher:.4f}")
    for name, check in record["checks"].items():
        verdict = "holds" if check["holds"] else "FAILED"
        label = name.replace("_", " ")
        console.print(f"{verdict}: {label} {check['found']:.6g}, at most {check['allowed']:.6g}")
    stages = (f"{name.replace('_', ' ')} {s:.0f} s" for name, s in record["seconds"].items())
    console.print("wall time: " + ", ".join(stages))


def draw_losses(training: Axes, held_out: Axes, record: dict) -> None:
    styles = {LIVE: {"lw": 3.0}, STORED: {"lw": 1.2}}
    labels = {
        LIVE: f"{LIVE}: whole vocabulary",
        STORED: f"{STORED}: top {record['config']['k']} and the rest as one",
    }
    for name, style in styles.items():
        student = record["students"][name]
        training.plot(student["forward_kl"], color=COLOURS[name], label=labels[name], **style)
        points = student["held_out"]["steps"], student["held_out"]["nats"]
        held_out.plot(*points, "o-", color=COLOURS[name], label=name, ms=4, **style)
    training.set_ylabel("training forward KL\n(nats per token)")
    training.set_ylim(bottom=0)
    training.set_title("Training: the KL that each student sees", loc="left", fontsize=11)
    training.legend(frameon=False)
    training.tick_params(labelbottom=False)

    teacher = record["teacher_held_out_nats"]["after"]
    held_out.axhline(teacher, color=LIMIT, lw=1, ls="--")
    held_out.annotate(
        f"the teacher: {teacher:.2f}", (1, teacher), xycoords=("axes fraction", "data"),
        xytext=(0, -3), textcoords="offset points", ha="right", va="top", color=LIMIT, fontsize=9,
    )  # fmt: skip
    ends = [record["students"][name]["held_out"]["nats"][-1] for name in (LIVE, STORED)]
    held_out.set_title(
        f"Held-out loss: {ends[0]:.3f} live, {ends[1]:.3f} stored",
        loc="left", fontsize=11,
    )  # fmt: skip
    held_out.set(xlabel="step", ylabel="cross-entropy with the labels\n(nats per token)")
    held_out.margins(y=0.15)
    held_out.xaxis.set_major_locator(MaxNLocator(integer=True))
    held_out.legend(frameon=False)


def draw_step(axes: Axes, record: dict) -> None:
    names = [LIVE, STORED]
    bottom = [0.0, 0.0]
    whole = max(record["students"][name]["median_ms"]["step"] for name in names)
    colours = {
        "rest": REST_COLOUR,
        "loss": [COLOURS[name] for name in names],
        "teacher": TEACHER_COLOUR,
    }
    titles = {
        "rest": ["rest", "rest"],
        "loss": ["loss", "loss"],
        "teacher": ["teacher", "reading"],
    }
    for part, colour in colours.items():
        values = [record["students"][name]["median_ms"][part] for name in names]
        axes.bar(names, values, width=0.75, bottom=bottom, color=colour)
        for i, (value, base) in enumerate(zip(values, bottom, strict=True)):
            text = f"{titles[part][i]} {value:.0f} ms"
            inside = value > 0.05 * whole  # else above the bar: nothing is stacked on a thin one
            height = base + (value / 2 if inside else value + 0.01 * whole)
            axes.text(i, height, text, ha="center", va="center" if inside else "bottom")
        bottom = [base + value for base, value in zip(bottom, values, strict=True)]
    axes.set_ylabel("training step, median (ms)")
    axes.set_title("Time of a step", loc="left", fontsize=11)
    axes.margins(y=0.08)


def draw_total(axes: Axes, record: dict) -> None:
    config, store_s = record["config"], record["store"]["seconds"]["total"]
    lines = {LIVE: (LIVE, 0.0), STORED: (f"{STORED}, with storing it ({store_s:.0f} s)", store_s)}
    for name, (label, begin) in lines.items():
        step_s = record["students"][name]["median_ms"]["step"] / 1e3
        end = begin + config["steps"] * step_s
        axes.plot([0, config["steps"]], [begin, end], color=COLOURS[name], lw=2, label=label)
    for i in range(1, config["epochs"]):
        axes.axvline(i * config["steps"] / config["epochs"], color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="step (dotted: an epoch ends)", ylabel="time in all, at median steps (s)")
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Storing {pays_after(record)}", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper left")


def draw_sizes(axes: Axes, record: dict) -> None:
    store, config = record["store"], record["config"]
    labels = ["bfloat16\nlogits", f"top {config['k']}"]
    n_bytes = [store["bfloat16_logits_bytes"], store["bytes"]]
    bars = axes.barh(labels, n_bytes, height=0.6, color=[REST_COLOUR, COLOURS[STORED]])
    texts = [f"{size(n)}, {n / store['tokens']:,.0f} bytes a token" for n in n_bytes]
    texts = [f" {text}" for text in texts]
    axes.text(0, bars[0].get_y() + 0.3, texts[0], va="center")
    axes.text(n_bytes[1], bars[1].get_y() + 0.3, texts[1], va="center")
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(f"Disk: {n_bytes[0] / n_bytes[1]:.0f} to 1", loc="left", fontsize=11)


def draw(record: dict, path: Path) -> None:
    """Losses on the left, the time of a step in the middle, time in all and disk on the right."""
    figure = Figure(figsize=(14, 6.6), layout="constrained")
    grid = figure.add_gridspec(3, 3, width_ratios=[1.8, 1.1, 1.3], wspace=0.08)
    halves = grid[:, 0].subgridspec(2, 1)
    training = figure.add_subplot(halves[0])
    draw_losses(training, figure.add_subplot(halves[1], sharex=training), record)
    draw_step(figure.add_subplot(grid[:, 1]), record)
    draw_total(figure.add_subplot(grid[:2, 2]), record)
    draw_sizes(figure.add_subplot(grid[2, 2]), record)
    save_figure(figure, record, path)


def main() -> None:
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))


if __name__ == "__main__":
    main()
