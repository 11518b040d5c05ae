"""What is seen on the terminal: progress, a table per case, and who was left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .records import (
    COMPILE,
    COPY,
    EAGER,
    FAILED,
    OURS,
    SKIPPED,
    Record,
    find,
    group_by_case,
    ours_against,
)

MIB = 1 << 20
WIDTH = 100  # where there is no terminal to ask


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def number(value: float | None, unit: str = "") -> str:
    """Three digits; a dash for what was not measured."""
    if value is None:
        return "–"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def mebibytes(n_bytes: int | None) -> str:
    return "–" if n_bytes is None else f"{round(n_bytes / MIB)}"  # no "-0"


@contextmanager
def progress_bar(console: Console, n_stages: int) -> Iterator[Callable[[str], None]]:
    """Gives a function that is told what comes next; no bar where there is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=n_stages)
        done = count()
        yield lambda text: progress.update(task, description=text, completed=next(done))


def make_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None
) -> Table:
    """A name in the first column, numbers in the others."""
    table = Table(
        title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    rows = list(rows)
    for heading, *cells in zip(header, *rows, strict=True):
        # on a narrow terminal headings and names wrap, but words and numbers stay whole
        words = Text.from_markup(" ".join([heading, *cells])).plain.split()
        justify = "left" if heading == header[0] else "right"
        table.add_column(heading, justify=justify, min_width=max(map(len, words)))
    for row in rows:
        table.add_row(*row)
    return table


def case_table(records: Sequence[Record]) -> Table:
    """One case: its providers by rows, in the order of their records."""
    first = records[0]
    model = f", {first.model}'s vocabulary" if first.model else ""
    copy = find(records, provider=COPY, mode="train")

    def row(record: Record) -> list[str]:
        if record.status == FAILED:
            return [record.label, "[red]failed[/red]"]
        forward = find(records, provider=record.provider, mode="eval")
        return [
            f"[bold]{record.label}[/bold]" if record.provider == OURS else record.label,
            number(record.median_ms),
            f"{number(record.low_ms)}-{number(record.high_ms)}",
            number(forward and forward.median_ms),
            number(record.times_baseline, "x"),
            mebibytes(record.peak_bytes),
            number(record.copy_fraction),
            number(record.error_ratio),
        ]

    return make_table(
        f"{first.loss} [{first.tokens}, {first.vocab}] {first.dtype}{model}",
        [
            "provider",
            "train ms",
            "20-80%",
            "eval ms",
            "vs eager",
            "MiB",
            "of copy",
            "error",
        ],
        [
            row(record)
            for record in records
            if record.mode == "train" and record.status != SKIPPED and record.provider != COPY
        ],
        "train: forward + backward; eval: forward alone; MiB: peak above the inputs\n"
        f"a copy runs at {number(copy.gb_per_s)} GB/s; error: of the gradient, over eager's",
    )


def summary_table(records: Sequence[Record]) -> Table:
    """Ours against eager and torch.compile, a row for each case."""

    def row(name: str, case: Sequence[Record]) -> list[str]:
        timed = [find(case, provider=p, mode="train") for p in (EAGER, COMPILE, OURS)]
        ratios = [ours_against(p, case) for p in (EAGER, COMPILE)]
        return [
            name,
            *(number(record and record.median_ms) for record in timed),
            *(number(ratio, "x") for ratio in ratios),
        ]

    return make_table(
        "Ours against eager and torch.compile, forward + backward",
        ["case", "eager ms", "compile ms", "ours ms", "vs eager", "vs compile"],
        [row(name, case) for name, case in group_by_case(records).items()],
    )


def overhead_table(records: Sequence[Record]) -> Table:
    """Forward + backward of a tiny tensor, ours over the baseline written by hand."""
    first = records[0]
    return make_table(
        f"Python overhead, forward + backward of [{first.tokens}, {first.vocab}]",
        ["loss", "µs", "20-80%", "times kl_div(log_softmax, softmax)"],
        [
            [
                record.loss,
                f"{record.median_ms * 1e3:.0f}",
                f"{record.low_ms * 1e3:.0f}-{record.high_ms * 1e3:.0f}",
                number(1 / record.times_baseline, "x"),
            ]
            for record in records
        ],
    )


def left_out(records: Sequence[Record]) -> list[str]:
    """A line for each reason why a provider was not timed."""
    reasons = Counter((r.label, r.status, r.reason) for r in records if not r.measured)
    return [
        f"{status}: {label}, {reason}" + (f" ({n} cases)" if n > 1 else "")
        for (label, status, reason), n in reasons.items()
    ]
