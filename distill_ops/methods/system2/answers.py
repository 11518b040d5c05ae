"""Answers in texts: parsers that take one out of what a model wrote, and what makes two of them equal.

A parser takes a text and returns the answer, or None where it finds none: that sample then counts as
unparsable. Where it cannot be sure it returns None, as a wrong answer would be trained on.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal

_STATED = re.compile(r"\banswer\b[*_]*\s*(?:is\b\s*:?|:)[*_]*", re.IGNORECASE)
_BOXED = r"\boxed{"
_NUMERIC = re.compile(
    r"(?<!\w)[-+\u2212]?\.?\d[\d.,/]*(?:[eE][-+]?\d+)?"
)  # a run that may be a number
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_AROUND = " \t\r\n*_`\"'“”‘’"


def normalize_answer(answer: str) -> str:
    """What two answers that count as one have in common: letters, in any case, and nothing around them.

    ``NFC(answer)``, lower case, single spaces, without quotes, markup or full stops around it.
    A string goes in and comes out, empty where nothing is left: such an answer is unparsable.

    Example:
        >>> from distill_ops.methods.system2 import normalize_answer
        >>> normalize_answer(' **New  York**. '), normalize_answer("x²") == normalize_answer("x2")
        ('new york', False)

    Canonical equivalence alone (NFC): compatibility forms would make x² and x2 one answer.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", answer).lower())
    text = re.sub(r"^\.+(?![\d.])", "", text.strip(_AROUND).rstrip(_AROUND + "."))  # .5 is not 5
    return " ".join(text.strip(_AROUND).split())


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends with.

    The last ``\boxed{...}``, else what follows the last "answer is" or "answer:", else the last line.
    A text goes in, an answer without quotes, markup and full stop around it comes out, or None.

    Example:
        >>> from distill_ops.methods.system2 import final_answer
        >>> final_answer("The last letters are e and y. So the answer is 'ey'.")
        'ey'
        >>> final_answer(" ") is None
        True
    """
    boxed = text.rfind(_BOXED)
    if boxed >= 0:
        return _bare(_braced(text[boxed + len(_BOXED) :]) or "")
    stated = list(_STATED.finditer(text))
    lines = [line for line in text.splitlines() if line.strip(_AROUND)]
    if stated:
        lines = [line for line in text[stated[-1].end() :].splitlines() if line.strip(_AROUND)]
        return _bare(lines[0]) if lines else None
    return _bare(lines[-1]) if lines else None


def _braced(text: str) -> str | None:
    """What comes before the brace that closes one opened before the text."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:i]
    return None


def _bare(text: str) -> str | None:
    return text.strip(_AROUND).removesuffix(".").strip(_AROUND) or None


def last_number(text: str) -> str | None:
    """The last number of a text, in one spelling.

    ``1,000.50`` is "1000.5"; a last one like 1/2, 1e5 or 1,5 gives None, and digits of a word are no number.
    A text goes in, a decimal number as a string comes out, or None where there is none.

    Example:
        >>> from distill_ops.methods.system2 import last_number
        >>> last_number("6 boxes of 200 are 1,200.00 dollars."), last_number("about 1/2")
        ('1200', None)
    """
    found = _NUMERIC.findall(text)
    if not found or not _NUMBER.fullmatch(found[-1].rstrip(".,/")):
        return None
    value = Decimal(found[-1].rstrip(".,/").replace(",", "").replace("\u2212", "-"))
    shown = format(value, "f")
    shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return "0" if shown in ("-0", "") else shown


@dataclass(frozen=True)
class Choice:
    """A parser of one letter among those of the options, as :func:`final_answer` finds it.

    Example:
        >>> from distill_ops.methods.system2 import Choice
        >>> parse = Choice("ABC")
        >>> parse("A is near, but the answer is (B)."), parse("The answer is A or B.")
        ('B', None)

    Args:
        letters: those of the options, upper case: a small "a" is an article.
    """

    letters: str = "ABCD"

    def __post_init__(self) -> None:
        if not isinstance(self.letters, str) or not re.fullmatch(r"[^\W\d_]+", self.letters):
            raise ValueError(f"letters must be a string of letters, got {self.letters!r}")

    def __call__(self, text: str) -> str | None:
        stated = final_answer(text)
        found = set(re.findall(rf"(?<!\w)[{self.letters}](?!\w)", stated or ""))
        return found.pop() if len(found) == 1 else None
