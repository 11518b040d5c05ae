"""A bar for a long curation, with rich where it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .records import Summary


@contextmanager
def no_bar(total: int | None, summary: Summary) -> Iterator[Callable[[], None]]:
    yield lambda: None


def rich_bar() -> Callable:
    """A context manager that shows inputs done, the share kept and the time left, then the summary.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError("progress=True needs rich: pip install rich") from error

    @contextmanager
    def bar(total: int | None, summary: Summary) -> Iterator[Callable[[], None]]:
        console = Console(stderr=True)
        with Progress(console=console) as shown:
            task = shown.add_task("inputs", total=total)

            def advance() -> None:
                text = f"{summary.n} inputs, {summary.share:.1%} kept"
                shown.update(task, advance=1, description=text)

            yield advance
        console.print(str(summary), highlight=False, markup=False)

    return bar
