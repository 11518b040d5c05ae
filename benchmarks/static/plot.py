"""The plot: what each divergence asks an element, within what each chip has time for; and the
predicted times, coloured by what binds."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..core.screen import number
from .chips import CHIPS
from .results import Report
from .roofline import FLOATS, ISSUE, MEMORY, SPECIAL

COLOURS = {MEMORY: "#4c9f70", ISSUE: "#e0a030", SPECIAL: "#d1495b", FLOATS: "#7768ae"}
CHIP_COLOURS = {"A100": "#8d99ae", "H100": "#1d6fa5", "H200": "#2a9d8f", "B200": "#d1495b"}
POINTS_FROM = "sm_90"
MINIMAL_BYTES = 6  # bf16: both inputs read once, the gradient written once


def _map(axes: Axes, report: Report) -> None:
    """Instructions against exp + log: inside a chip's box, memory is what binds."""
    rows = report.trained(POINTS_FROM)
    limits = {name: CHIPS[name].limits(MINIMAL_BYTES) for name in CHIP_COLOURS}
    right = 1.25 * max(row.instructions for row in rows)
    top = 1.25 * max(row.special for row in rows)
    for name, colour in CHIP_COLOURS.items():
        width, height = limits[name]["instructions"], limits[name]["special"]
        box = {"facecolor": to_rgba(colour, 0.07), "edgecolor": colour, "linewidth": 1.6}
        axes.add_patch(Rectangle((0, 0), width, height, **box))
        outside = limits[name] == max(limits.values(), key=lambda limit: limit["instructions"])
        axes.annotate(
            f"{name}: {width:.0f} / {height:.1f}",
            (width, 0),
            xytext=(3 if outside else -3, 6),
            textcoords="offset points",
            rotation=90,
            ha="left" if outside else "right",
            va="bottom",
            fontsize=8.5,
            color=colour,
            weight="bold",
        )
    axes.scatter([r.instructions for r in rows], [r.special for r in rows], color="#222222", s=26)
    left = []  # points whose label stands at their left
    for row in sorted(rows, key=lambda row: row.instructions):
        x, y = row.instructions, row.special
        # on the left where the label would run into a point at the right, and there above another
        crowded = any(
            0 < other.instructions - x < 0.25 * right and abs(other.special - y) < 0.06 * top
            for other in rows
        )
        above = crowded and any(
            x - x_left < 0.25 * right and abs(y_left - y) < 0.06 * top for x_left, y_left in left
        )
        left += [(x, y)] if crowded else []
        axes.annotate(
            row.divergence,
            (x, y),
            xytext=(-7 if crowded else 7, 11 if above else 0),
            textcoords="offset points",
            ha="right" if crowded else "left",
            va="center",
            fontsize=8.5,
        )
    axes.set_xlim(0, max(right, *(1.05 * limit["instructions"] for limit in limits.values())))
    axes.set_ylim(0, max(top, *(1.05 * limit["special"] for limit in limits.values())))
    axes.set_xlabel("lane-instructions an element")
    axes.set_ylabel("exp + log results an element")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"What an element costs (points, {POINTS_FROM}) and what a chip has time for (boxes)\n"
        f"while it moves {MINIMAL_BYTES} bytes: inside its box a kernel is bound by memory",
        fontsize=10,
        loc="left",
    )


def _times(axes: Axes, report: Report) -> None:
    """Predicted times over a copy's, a cell for each divergence and chip."""
    names = list(dict.fromkeys(p.divergence for p in report.predictions))
    chips = list(dict.fromkeys(p.chip for p in report.predictions))
    for y, name in enumerate(names):
        for x, chip in enumerate(chips):
            found = report.predicted(name, chip)
            if found is None:
                continue
            colour = to_rgba(COLOURS[found.binds], 0.75)
            axes.add_patch(Rectangle((x, y), 0.96, 0.92, facecolor=colour))
            axes.text(x + 0.48, y + 0.46, f"{number(found.times_copy)}x", ha="center", va="center")
    axes.set_xlim(0, len(chips))
    axes.set_ylim(len(names), 0)
    axes.set_xticks([x + 0.48 for x in range(len(chips))], chips)
    axes.set_yticks([y + 0.46 for y in range(len(names))], names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "Predicted time over that of a copy of the same bytes, and what binds",
        fontsize=10,
        loc="left",
    )
    axes.legend(
        handles=[Patch(color=to_rgba(c, 0.75), label=name) for name, c in COLOURS.items()],
        loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=len(COLOURS), frameon=False, fontsize=9,
    )  # fmt: skip


def draw(path: Path, report: Report) -> None:
    """Write the plot; its format is the path's suffix."""
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _map(left, report)
    _times(right, report)
    form = report.trained(POINTS_FROM)[0]
    figure.suptitle(
        f"Static roofline: predictions from compiled code, {form.dtype} logits, {form.n_cols} columns, "
        "gradient made in the forward",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
