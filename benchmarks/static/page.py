"""``docs/static-roofline.md``: one picture and one table of what is predicted for an H100."""

from collections.abc import Iterator

from ..core.markdown import markdown_table
from ..core.screen import number
from .kernels import Row
from .launches import BF16, BUCKET, DENSE, ENTROPY, LOG_PROB, N_ROWS, TRAIN
from .results import Report
from .roofline import FLOATS, ISSUE, MEMORY, SPECIAL, Prediction

PLOT = "static-roofline.png"
TABLES = "static-tables.md"
CHIP = "H100"
BINDS = {
    MEMORY: "bytes through device memory",
    ISSUE: "instructions issued",
    SPECIAL: "exponentials and logarithms",
    FLOATS: "float32 arithmetic",
}
# what a reader asks for first: a name, and the kernel, divergence and form that it stands for
OTHERS = (
    ("top-k forward_kl", "topk", "forward_kl", BUCKET),
    ("top-k jensen_shannon", "topk", "jensen_shannon", BUCKET),
    ("token log-probability", "token", None, LOG_PROB),
    ("token with entropy", "token", None, ENTROPY),
    ("gather of 64", "gather", None, "K=64"),
)
VERSIONS = ("python", "torch", "triton", "distill_ops")


def chosen(report: Report) -> Iterator[tuple[str, Prediction]]:
    """The lines of the picture and the table: every dense divergence, then the other kernels."""
    names = dict.fromkeys(p.divergence for p in report.predictions if p.kernel == "dense")
    lines = [(name, "dense", name, TRAIN) for name in names]
    for label, kernel, divergence, form in (*lines, *OTHERS):
        if found := report.predicted(divergence, CHIP, kernel, form):
            yield label, found


def milliseconds(prediction: Prediction, n_cols: int) -> float:
    """Forward + backward of ``N_ROWS`` tokens."""
    return prediction.picoseconds * N_ROWS * n_cols * 1e-9


def made_by(report: Report) -> str:
    """Command, versions and commit of the run."""
    facts = report.facts
    versions = ", ".join(f"{name} {facts[name]}" for name in VERSIONS if facts.get(name))
    return f"`{facts['command']}` ({versions}; commit {facts.get('commit')}, {facts['date'][:10]})"


def _in_words(found: list[tuple[str, Prediction]]) -> list[str]:
    """A sentence for each limit that binds something."""
    groups: dict[str, list[tuple[str, Prediction]]] = {}
    for line in found:
        groups.setdefault(line[1].binds, []).append(line)
    sentences = []
    for binds, lines in groups.items():
        low, high = (end(p.times_copy for _, p in lines) for end in (min, max))
        times = number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"
        names = ", ".join(name for name, _ in lines)
        sentences.append(f"- **{BINDS[binds].capitalize()}** bind {names}: {times} times a copy.")
    return sentences


def _usage(rows: list[Row]) -> str:
    """What all launches have in common, in a sentence."""
    targets = ", ".join(dict.fromkeys(row.target for row in rows))
    clean = [row for row in rows if not (row.stack or row.spills)]
    return (
        f"Of {len(rows)} launches compiled for {targets}, {len(clean)} have no stack and no spilled "
        f"register; the most registers of a thread are {max(row.registers for row in rows)}."
    )


def page(report: Report) -> str:
    """The whole page."""
    n_cols = DENSE[TRAIN].n_cols
    found = list(chosen(report))
    others = [chip for chip in dict.fromkeys(p.chip for p in report.predictions) if chip != CHIP]
    header = [
        "loss",
        f"{N_ROWS} tokens, ms",
        "times a copy",
        "from",
        "to",
        "bytes an element",
        "binds",
    ]
    rows = [
        [
            name,
            number(milliseconds(p, n_cols)),
            *(number(x) for x in (p.times_copy, p.low, p.high)),
            number(p.memory_bytes.predicted),
            p.binds,
        ]
        for name, p in found
    ]
    lines = [
        f"# What the kernels should take on an {CHIP}: a prediction",
        "",
        "**No GPU took part.** The kernels are compiled ahead of time, their instructions are counted",
        f"in the machine code, and the times follow from the {CHIP}'s nominal rates: the largest of four",
        f"limits, as if they overlapped perfectly. Forward + backward of {BF16} logits, {n_cols} columns.",
        "",
        *_in_words(found),
        "",
        f"![predicted time of each loss on an {CHIP}]({PLOT})",
        "",
        *markdown_table(header, rows),
        "",
        "A copy reads what the loss must read and writes the gradient, each once, at the nominal",
        "bandwidth; a real copy reaches about nine tenths of that. `from` and `to` are the two ends of",
        "the cache model, which says how much of a row is still in L2 when it is read again; for top-k",
        "and token kernels all of it is taken to be. Left out: latency, the reductions between",
        "sweeps, L2's bandwidth and power limits.",
        "",
        _usage(report.rows),
        f"Every form, dtype and target, and {', '.join(others)}: [{TABLES}]({TABLES}). Made by",
        f"{made_by(report)}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
