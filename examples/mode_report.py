"""Table and plot of ``mode_seeking.py``.

    python examples/mode_report.py examples/results/mode_seeking.json --page docs/which-divergence.md

draws the plot again, beside the JSON file, and writes the numbers between the page's marks.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from report import GREY, console, in_page
from rich.box import SIMPLE_HEAD
from rich.table import Table

COVERS, SEEKS = "covers", "seeks"
COLOURS = {COVERS: "#2e6f9e", SEEKS: "#d1495b"}
TEACHER_COLOUR = "#d9d9d9"
TO_REVERSE = {  # the families that lead from the forward to the reverse KL
    "SymmetricKL(weight)": "#2a7f62",
    "JensenShannon(beta)": "#8a5aa8",
    "AlphaBeta(1 - x, x)": "#e39b3b",
}
SKEW = {"SkewForwardKL(alpha)": "#1b7f8c", "SkewReverseKL(alpha)": "#8c5a2b"}


def behaviour(minimum: dict) -> str:
    """Covers, where the student is empty on less than a tenth of the teacher's mass."""
    return COVERS if minimum["missed"] < 0.1 else SEEKS


def changes(points: list[dict]) -> str:
    """What the global minimum does along a parameter, in words."""
    found = behaviour(points[0])
    for before, after in zip(points, points[1:], strict=False):
        if behaviour(before) != behaviour(after):
            middle = (before["parameter"] + after["parameter"]) / 2
            found += f", from {middle:.2f} on {behaviour(after)}"
    return found


def show(record: dict) -> None:
    """Print the minima of each divergence, and where its families change."""
    starts = record["config"]["starts"]["count"]
    table = Table(
        title=f"one Gaussian for a mixture of two: minima found from {starts} starts",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("divergence", no_wrap=True)
    for heading in ("mean", "sigma", "loss", "starts", "void", "missed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, found in record["divergences"].items():
        for i, minimum in enumerate(found["minima"]):
            table.add_row(
                "  local" if i else name,
                f"{minimum['mean']:.3f}",
                f"{minimum['sigma']:.3f}",
                f"{minimum['loss']:.4f}",
                f"{minimum['starts'] / starts:.0%}",
                f"{minimum['void']:.1%}",
                f"{minimum['missed']:.1%}",
                behaviour(minimum),
                style="dim" if i else None,
            )
        if stuck := found["starts_without_a_minimum"]:
            table.add_row("  no minimum", "", "", "", f"{stuck / starts:.0%}", style="dim")
    console.print(table)
    console.print(
        "starts: share that ends there\n"
        "void: the student's mass where the teacher has nearly none\n"
        "missed: the teacher's mass where the student has nearly none"
    )
    for name, points in record["families"].items():
        console.print(f"{name}: {changes(points)}")


def markdown(record: dict) -> str:
    """The numbers as a page has them: a row a divergence, then the families."""
    starts = record["config"]["starts"]["count"]
    lines = [
        "| divergence | mean | sigma | loss | void | missed | starts | local minima: mean, sigma, "
        "loss, starts |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, found in record["divergences"].items():
        best, *others = found["minima"]
        local = "; ".join(
            f"{m['mean']:.2f}, {m['sigma']:.2f}, {m['loss']:.3f}, {m['starts'] / starts:.0%}"
            for m in others
        )
        numbers = f"{best['mean']:.3f} | {best['sigma']:.3f} | {best['loss']:.4f}"
        shares = f"{best['void']:.0%} | {best['missed']:.0%} | {best['starts'] / starts:.0%}"
        lines.append(f"| {name} | {numbers} | {shares} | {local or 'none'} |")
    count = len(next(iter(record["families"].values())))
    lines += ["", f"Along a parameter, in {count} steps, the global minimum", ""]
    lines += [f"- of `{name}` {changes(points)};" for name, points in record["families"].items()]
    return "\n".join(lines).removesuffix(";") + "."


def write_into(page: Path, text: str, name: str = "mode_seeking") -> None:
    """Between the page's marks of that name, in place of what stands there."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    try:
        page.write_text(in_page(page.read_text(), text, begin, end))
    except ValueError:
        raise SystemExit(f"{page} must have {begin} and {end}, once") from None


def density(x: torch.Tensor, mean: float, sigma: float) -> torch.Tensor:
    """Of a Gaussian that is normalised over the points ``x``."""
    values = torch.exp(-0.5 * ((x - mean) / sigma) ** 2)
    return values / (values.sum() * (x[1] - x[0]))


def draw_fit(axes: Axes, name: str, minima: list[dict], config: dict) -> None:
    low, high, count = config["points"]
    x = torch.linspace(low, high, count, dtype=torch.float64)
    teacher = sum(m["weight"] * density(x, m["mean"], m["sigma"]) for m in config["modes"])
    axes.fill_between(x, teacher, color=TEACHER_COLOUR, lw=0)
    for minimum in minima[1:]:
        axes.plot(
            x, density(x, minimum["mean"], minimum["sigma"]), color=GREY, lw=0.9, ls=(0, (4, 3))
        )
    best = minima[0]
    colour = COLOURS[behaviour(best)]
    axes.plot(x, density(x, best["mean"], best["sigma"]), color=colour, lw=2.2)
    numbers = f"mean {best['mean']:.2f}, sigma {best['sigma']:.2f}, loss {best['loss']:.3f}"
    axes.set_title(name, loc="left", fontsize=10.5, pad=17)
    axes.text(0, 1.025, numbers, transform=axes.transAxes, fontsize=9, color=colour)
    axes.set(xlim=(low, high), ylim=(0, 0.72), yticks=[], xticks=[-4, -2, 0, 2, 4])
    axes.spines["left"].set_visible(False)


def draw_families(axes: Axes, families: dict[str, list[dict]], colours: dict[str, str]) -> None:
    """Standard deviations along the parameter: solid where they move, dotted where they jump."""
    for name, colour in colours.items():
        points = families[name]
        x, y = ([point[key] for point in points] for key in ("parameter", "sigma"))
        jumps = [i for i in range(1, len(y)) if abs(y[i] - y[i - 1]) > 0.5]
        for i in jumps:
            axes.plot(x[i - 1 : i + 1], y[i - 1 : i + 1], color=colour, ls=":", lw=1.2)
        for i in reversed(jumps):  # a gap in the line
            x.insert(i, x[i])
            y.insert(i, math.nan)
        axes.plot(x, y, color=colour, lw=2, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 3.6), ylabel="sigma of the global minimum")
    axes.legend(frameon=False, fontsize=9, loc="upper left", borderaxespad=0)


def draw(record: dict, path: Path) -> None:
    """The students of each divergence on the left, the families along their parameter on the right."""
    config, fits, families = record["config"], record["divergences"], record["families"]
    figure = Figure(figsize=(14, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[3, 1], wspace=0.02)
    panels = left.subplots(-(-len(fits) // 4), 4, sharex=True).flat
    for axes in panels[len(fits) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels, fits.items(), strict=False):
        draw_fit(axes, name, found["minima"], config)
    teacher = " + ".join(
        f"{m['weight']:g} N({m['mean']:g}, {m['sigma']:g}²)" for m in config["modes"]
    )
    marks = [
        Patch(color=TEACHER_COLOUR, label=f"teacher, {teacher}"),
        Line2D([], [], color=COLOURS[COVERS], lw=2.2, label="global minimum, covers both modes"),
        Line2D([], [], color=COLOURS[SEEKS], lw=2.2, label="global minimum, seeks one"),
        Line2D([], [], color=GREY, lw=0.9, ls=(0, (4, 3)), label="local minima"),
    ]
    left.legend(handles=marks, loc="outside upper left", ncols=4, frameon=False, fontsize=9.5)

    upper, lower = right.subplots(2, 1)
    draw_families(upper, families, TO_REVERSE)
    upper.set_title("From the forward to the reverse KL", loc="left", fontsize=10.5)
    upper.set_xlabel("parameter (0: forward, 1: reverse KL)")
    draw_families(lower, families, SKEW)
    lower.set_title("Skew KLs", loc="left", fontsize=10.5)
    lower.set_xlabel("parameter (0: the KL itself)")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="mode_seeking.json")
    parser.add_argument("--page", type=Path, help="page to write the numbers into")
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    draw(record, options.record.with_suffix(".png"))
    if options.page:
        write_into(options.page, markdown(record))


if __name__ == "__main__":
    main()
