"""Answers in texts: parsers that take one out of what a model wrote, and what makes two of them equal.

A parser takes a text and returns the answer, or None where it finds none: that sample then counts as
unparsable. Where it cannot be sure it returns None, as a wrong answer would be trained on.
"""

import re
import unicodedata
from dataclasses import dataclass

_STATED = re.compile(r"\banswer\b[*_]*\s*(?:is\b\s*:?|:)[*_]*", re.IGNORECASE)
_BOXED = r"\boxed{"
_WORD = re.compile(  # an article or a pronoun, by what stands around it
    r"(?<!\()(?<![Oo]ption )(?<![Cc]hoice )(?<![Rr]esponse )"
    r"[AI] +(?!(?:and|because|has|is|or|over|since|was|wins)\b)\w"
)
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


@dataclass(frozen=True)
class Choice:
    """A parser of one letter among those of the options, as :func:`final_answer` finds it.

    None where it is a word, as in "A better one" or "I think so".

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
        if stated is None:
            return None
        found = list(re.finditer(rf"(?<!\w)[{self.letters}](?!\w)", stated))
        sure = [letter for letter in found if not _WORD.match(stated, letter.start())]
        return sure[0][0] if sure and len({letter[0] for letter in found}) == 1 else None
