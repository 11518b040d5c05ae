"""The plot of forward + backward: a panel per shape, a line per loss, a mark per provider."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..core.records import EAGER, OURS, find
from ..core.screen import number
from .records import COMPILE, OURS_BACKWARD, OURS_INPLACE, Record, ours_against, timed_training

OURS_COLOUR = "#d1495b"
STYLES = {  # provider: marker, colour, filled
    EAGER: ("s", "#5c677d", True),
    "native": ("s", "#5c677d", False),
    COMPILE: ("D", "#2a7f9e", True),
    OURS: ("o", OURS_COLOUR, True),
    OURS_BACKWARD: (">", OURS_COLOUR, False),
    OURS_INPLACE: ("<", OURS_COLOUR, False),
}
OTHERS = ("^", "v", "P", "X")  # the peers' markers, in their order
OTHERS_COLOUR = "#7d8f4e"
PANELS_IN_ROW = 5  # the named models' vocabularies
PANEL_WIDTH, LINE_HEIGHT, TITLE_HEIGHT = 6.2, 0.34, 0.9  # inches
CAPTION_WIDTH = 90  # letters to a panel


def _styles(records: Sequence[Record]) -> dict[str, tuple[str, str, bool]]:
    """Of every provider that was timed, the peers last."""
    names = dict.fromkeys(r.provider for r in records)
    peers = [name for name in names if name not in STYLES]
    others = {name: (OTHERS[i % len(OTHERS)], OTHERS_COLOUR, True) for i, name in enumerate(peers)}
    return {name: style for name, style in (STYLES | others).items() if name in names}


def _draw(axes: Axes, records: Sequence[Record], losses: Sequence[str], styles) -> None:
    """One shape. Marks of one loss stand a little apart, so that near-equal times stay visible."""
    lanes = {name: 0.5 * (i / max(len(styles) - 1, 1) - 0.5) for i, name in enumerate(styles)}
    for name, (marker, colour, filled) in styles.items():
        mine = [r for r in records if r.provider == name]
        axes.errorbar(
            [r.median_ms for r in mine],
            [losses.index(r.loss) + lanes[name] for r in mine],
            xerr=[
                [r.median_ms - r.low_ms for r in mine],
                [r.high_ms - r.median_ms for r in mine],
            ],
            linestyle="none",
            elinewidth=0.8,
            marker=marker,
            markersize=5.5,
            color=colour,
            markerfacecolor=colour if filled else "white",
        )
    for line, loss in enumerate(losses):
        of_loss = [r for r in records if r.loss == loss]
        ours, ratio = find(of_loss, provider=OURS), ours_against(EAGER, of_loss)
        if ours:
            text = f"{number(ours.median_ms)} ms" + (f", {number(ratio)}x" if ratio else "")
            axes.text(
                1.015, line, text, transform=axes.get_yaxis_transform(), fontsize=8, va="center"
            )  # fmt: skip
    low, high = min(r.low_ms for r in records), max(r.high_ms for r in records)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.15, high * 1.15)
    # under a decade the powers of ten alone would leave one tick or none
    subs = (1.0, 2.0, 5.0) if math.log10(high / low) < 3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(losses)), losses)
    axes.set_ylim(len(losses) - 0.5, -0.5)  # the first loss on top
    for boundary in range(1, len(losses)):
        axes.axhline(boundary - 0.5, color="#dddddd", linewidth=0.8)
    axes.tick_params(labelsize=8, length=0)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    first = records[0]
    model = f" ({first.model})" if first.model else ""
    axes.set_title(f"[{first.tokens}, {first.vocab}] {first.dtype}{model}", fontsize=9, loc="left")
    axes.text(
        1.015, 1.02, "distill_ops, vs eager", transform=axes.transAxes, fontsize=8,
        color=OURS_COLOUR,
    )  # fmt: skip
    axes.set_xlabel("forward + backward, ms", fontsize=8)


def draw(path: Path, records: Sequence[Record], caption: str) -> None:
    """Write the plot of every timed training record; its format is the path's suffix."""
    timed = timed_training(records)
    losses = list(dict.fromkeys(r.loss for r in timed))
    styles = _styles(timed)
    panels: dict[tuple, list[Record]] = {}
    for record in timed:
        panels.setdefault((record.tokens, record.vocab, record.dtype), []).append(record)
    columns = min(len(panels), PANELS_IN_ROW) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(
        figsize=(PANEL_WIDTH * columns, (LINE_HEIGHT * len(losses) + TITLE_HEIGHT) * rows + 1.1),
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels.values(), strict=False):
        _draw(axes, panel, losses, styles)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    labels = {r.provider: r.label for r in timed}
    marks = [
        Line2D(
            [], [], linewidth=0.8, marker=marker, markersize=5.5, color=colour, label=labels[name],
            markerfacecolor=colour if filled else "white",
        )
        for name, (marker, colour, filled) in styles.items()
    ]  # fmt: skip
    figure.legend(
        handles=marks, loc="outside lower center", ncols=4 * columns, fontsize=8, frameon=False,
        title="medians; whiskers: 20% and 80% quantiles", title_fontsize=8,
    )  # fmt: skip
    lines = [part for line in caption.splitlines() for part in wrap(line, CAPTION_WIDTH * columns)]
    figure.suptitle("\n".join(lines), fontsize=8, color="#555555", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
