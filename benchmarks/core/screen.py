"""What is seen on the terminal: progress, tables, and numbers in three digits."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .records import Measured

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


def left_out(records: Sequence[Measured]) -> list[str]:
    """A line for each reason why a provider was not timed."""
    reasons = Counter((r.label, r.status, r.reason) for r in records if not r.measured)
    return [
        f"{status}: {label}, {reason}" + (f" ({n} cases)" if n > 1 else "")
        for (label, status, reason), n in reasons.items()
    ]
