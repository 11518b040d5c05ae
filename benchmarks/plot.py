"""The bar plot: a panel per case, forward + backward, rows of shapes and columns of losses."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import COPY, EAGER, OURS, OVERHEAD, Record, group_by_case
from .screen import number

COLOURS = {OURS: "#d1495b", EAGER: "#8d99ae"}
OTHERS = "#c3cad6"
PANEL_WIDTH, BAR_HEIGHT, TITLE_HEIGHT = 4.2, 0.3, 0.75  # inches


def _draw(axes: Axes, records: Sequence[Record]) -> None:
    medians = [r.median_ms for r in records]
    spread = [
        [r.median_ms - r.low_ms for r in records],
        [r.high_ms - r.median_ms for r in records],
    ]
    bars = axes.barh(
        [r.label for r in records],
        medians,
        xerr=spread,
        color=[COLOURS.get(r.provider, OTHERS) for r in records],
        error_kw={"elinewidth": 1, "ecolor": "#444444"},
        height=0.7,
    )
    ratios = [
        f"{number(r.median_ms)} ms"
        + (f", {number(r.times_baseline)}x" if r.times_baseline and r.provider != EAGER else "")
        for r in records
    ]
    axes.bar_label(bars, ratios, padding=4, fontsize=7.5)
    axes.invert_yaxis()  # the first provider on top
    axes.set_xlim(0, 1.65 * max(r.high_ms for r in records))  # room for the labels
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    first = records[0]
    model = f" ({first.model})" if first.model else ""
    axes.set_title(
        f"{first.loss}\n[{first.tokens}, {first.vocab}] {first.dtype}{model}",
        fontsize=9,
        loc="left",
    )


def draw(path: Path, records: Sequence[Record], caption: str) -> None:
    """Write the plot of every timed training record; its format is the path's suffix."""
    shown = [r for r in records if r.mode == "train" and r.provider != COPY and r.case != OVERHEAD]
    losses = list(dict.fromkeys(r.loss for r in shown))
    shapes = list(dict.fromkeys((r.tokens, r.vocab, r.dtype) for r in shown))
    timed = [r for r in shown if r.measured]
    panels = group_by_case(timed)
    bars = max((len(panel) for panel in panels.values()), default=1)
    figure = Figure(
        figsize=(PANEL_WIDTH * len(losses), (BAR_HEIGHT * bars + TITLE_HEIGHT) * len(shapes) + 0.8),
        layout="constrained",
    )
    grid = figure.subplots(len(shapes), len(losses), squeeze=False, sharey=False)
    for row, shape in zip(grid, shapes, strict=True):
        for axes, loss in zip(row, losses, strict=True):
            panel = [r for r in timed if r.loss == loss and (r.tokens, r.vocab, r.dtype) == shape]
            if panel:
                _draw(axes, panel)
            else:
                axes.set_axis_off()
    figure.supxlabel("forward + backward, ms; in the labels, times as fast as eager", fontsize=8)
    figure.suptitle(caption, fontsize=8, color="#555555", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
