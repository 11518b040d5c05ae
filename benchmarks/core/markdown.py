"""Tables in Markdown, and the marked part of a page that is made of them."""

import re
from collections.abc import Iterable, Sequence


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], n_names: int = 1
) -> list[str]:
    """``n_names`` columns of names, the others of numbers."""
    alignment = ["---"] * n_names + ["---:"] * (len(header) - n_names)
    return ["| " + " | ".join(row) + " |" for row in (header, alignment, *rows)]


def replace_marked(text: str, new: str, begin: str, end: str) -> str:
    """Put ``new`` between two markers.

    Raises:
        ValueError: the text does not hold the two markers, once and in this order.
    """
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not pattern.search(text):
        raise ValueError(f"expected {begin} and, after it, {end}, once each")
    return pattern.sub(lambda _: f"{begin}\n{new}\n{end}", text)
