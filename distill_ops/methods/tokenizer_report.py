"""What a comparison of two tokenizers found: verdict, reasons, what to do, and a table of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EQUAL, LOOK, DIFFERS, UNKNOWN = "equal", "look", "differs", "not known"
MARKS = {EQUAL: "green", LOOK: "yellow", DIFFERS: "red", UNKNOWN: "dim"}
COLUMNS = ("compared", "student", "teacher", "")


class Row(NamedTuple):
    """One thing that was compared: what each side has, and "equal", "differs", "not known", or "look" (at ``to_do``)."""

    compared: str
    student: str
    teacher: str
    found: str


@dataclass(frozen=True)
class TokenizerReport:
    """Whether a student can learn from a teacher's probabilities, and what that takes.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from distill_ops.methods.tokenizers import check_same_tokenizer
        >>> student = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
        >>> teacher = Tokenizer(models.WordLevel({"<unk>": 0, "b": 1, "a": 2}, unk_token="<unk>"))
        >>> report = check_same_tokenizer(student, teacher)
        >>> report.usable, report.vocab_size
        (False, None)
        >>> report.raise_if_unusable()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: student and teacher cannot be compared token by token: ...

    ``print(report)`` is the table as plain text; a rich console prints it in colours, and so does
    :meth:`print`.
    """

    usable: bool
    """Whether losses of this pair mean what they say, once ``to_do`` is done."""
    vocab_size: int | None
    """For every loss's ``vocab_size=``: of both models the columns that are a token, the same token. None
    where the pair is not usable. Padded heads have more columns, which are then in neither softmax."""
    tokenize_with: tuple[str, ...]
    """Whose ids both models can read: "student", "teacher", or both; empty where it is not usable."""
    reasons: tuple[str, ...]
    """Why it is not usable; empty where it is."""
    to_do: tuple[str, ...]
    """What the caller has to take care of; may be empty."""
    rows: tuple[Row, ...]
    """All that was compared."""

    def raise_if_unusable(self) -> "TokenizerReport":
        """The report itself, or a ValueError with all reasons."""
        if not self.usable:
            reasons = "; ".join(self.reasons)
            raise ValueError(
                f"student and teacher cannot be compared token by token: {reasons}. "
                "docs/when-not-to-use.md has what to use for such a pair"
            )
        return self

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.usable:
            return "not usable"
        return f"usable with vocab_size={self.vocab_size}"

    def lines(self) -> list[str]:
        """The verdict, then a reason or a thing to do a line."""
        return [self.verdict, *(f"- {text}" for text in (*self.reasons, *self.to_do))]

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
        return "\n".join([*lines, *self.lines()])

    def __rich_console__(self, console: "Console", options) -> "list[Table | str]":
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        for column in COLUMNS:
            table.add_column(column)
        for *cells, found in self.rows:
            table.add_row(*map(escape, cells), f"[{MARKS[found]}]{found}")
        verdict, *rest = map(escape, self.lines())
        colour = MARKS[EQUAL if self.usable else DIFFERS]
        return [table, "\n".join([f"[bold {colour}]{verdict}[/]", *rest])]

    def print(self, console: "Console | None" = None) -> None:
        """The table in colours, on a rich console. Needs rich; ``print(report)`` does not."""
        if console is None:
            try:
                from rich.console import Console
            except ImportError as error:
                raise ImportError(
                    "TokenizerReport.print needs rich: pip install rich, or print(report)"
                ) from error
            console = Console()
        console.print(self)
