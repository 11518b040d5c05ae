"""The picture of docs/static-roofline.md: for each loss how long each limit alone would take."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..core.screen import number
from .chips import CHIPS
from .launches import BF16, DENSE, TRAIN
from .page import CHIP, chosen
from .results import Report
from .roofline import ISSUE, MEMORY, SPECIAL

LIMITS = {MEMORY: "#4c9f70", SPECIAL: "#d1495b", ISSUE: "#e0a030"}
LABELS = {MEMORY: "device memory", SPECIAL: "exp and log", ISSUE: "instructions"}
FAINT = 0.35  # opacity of what does not bind
THICK = 0.26  # of a bar, in lines
GREY = "#5c677d"


def draw(path: Path, report: Report) -> None:
    """Write the picture; its format is the path's suffix."""
    found = list(chosen(report))
    figure = Figure(figsize=(9.6, 0.5 * len(found) + 1.9), layout="constrained")
    axes = figure.subplots()
    for line, (_, prediction) in enumerate(found):
        copy = CHIPS[CHIP].memory_picoseconds(prediction.memory_bytes.minimal)
        for place, (limit, colour) in enumerate(LIMITS.items()):
            binds = prediction.binds == limit
            axes.barh(
                line + (place - 1) * THICK, prediction.times[limit] / copy, height=0.9 * THICK,
                color=colour, alpha=1.0 if binds else FAINT, linewidth=0,
            )  # fmt: skip
        ends = [[prediction.times_copy - prediction.low], [prediction.high - prediction.times_copy]]
        place = list(LIMITS).index(prediction.binds) if prediction.binds in LIMITS else 1
        if prediction.high > prediction.low:
            axes.errorbar(
                prediction.times_copy, line + (place - 1) * THICK, xerr=ends, color="black",
                linewidth=0.9, capsize=2,
            )  # fmt: skip
        axes.text(
            1.01, line, f"{number(prediction.times_copy)}x  {LABELS.get(prediction.binds)}",
            transform=axes.get_yaxis_transform(), va="center", fontsize=9,
        )  # fmt: skip
    axes.axvline(1.0, color=GREY, linewidth=1.0, linestyle=":")
    axes.annotate(
        "a copy", (1.0, 0), (0, -16), ("data", "axes fraction"), "offset points", color=GREY, ha="center",
        va="top", fontsize=9,
    )  # fmt: skip
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("predicted time, a copy of the least bytes = 1", labelpad=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        f"What the kernels should take on an {CHIP}: predicted, not measured",
        fontsize=12,
        loc="left",
        pad=40,
    )
    axes.text(
        0, 1.015, f"{CHIP}, {BF16} logits, {DENSE[TRAIN].n_cols} columns, forward + backward. A bar is how "
        "long one limit alone would take;\nthe longest binds. Whiskers: the cache model's two ends.",
        transform=axes.transAxes, va="bottom", fontsize=9, color=GREY,
    )  # fmt: skip
    handles = [Patch(color=colour, label=LABELS[limit]) for limit, colour in LIMITS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
