"""The last number of a text, where it stands for itself: not a part of a fraction, a power, a product..."""

import re
from decimal import Decimal

_NUMERIC = re.compile(
    r"(?<!\w)[-+\u2212]?\.?\d[\d.,/]*(?:[eE][-+]?\d+)?"
)  # a run that may be a number
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")

# What makes a number beside it a part of more. "~" is a space within the line.
_DASHES = r"\-\u2010-\u2015\u2212"
_HARMLESS = r"(?!approx|implies|mathrm|quad|right|text|to)"  # commands of LaTeX
_MONEY = r"(?:\\?[$€£¥₹]~*)?\Z"


def _compiled(*alternatives: str) -> re.Pattern:
    return re.compile("|".join(alternatives).replace("~", r"[^\S\n]"), re.IGNORECASE)


_MORE_BEFORE = _compiled(
    rf"[{_DASHES}+±√×·⋅÷^]~*[({{]?{_MONEY}",  # 3-4, = - 2, -$5, 10^3, 10^(3)
    rf"[\d)\]}}]~*(?:x|\*+|/)~*\(?{_MONEY}",  # 5 x 10, 2 x $9
    rf"\\{_HARMLESS}[a-z]+~*\Z",  # \times 10
    r"(?<!\\boxed)(?<!\\textbf)(?<!\\mathbf)\{~*\\?\$?\Z",  # \frac{1}{2}
    r"[\w)]\(\Z",  # f(2)
    r"\d[^\s=≈]\Z",  # 1'000, 2:30
    r"\d~+:~*\Z",
    r"\d\S*~+(?:or|to)~+\Z",
    r"\|\Z",
)
_MORE_BEFORE_A_SIGN = _compiled(r"[\d)]~*\Z")  # 3 -4
_MORE_BEFORE_THREE_DIGITS = _compiled(r"\d,?~+\Z")  # 1 000
_MORE_AFTER = _compiled(
    r"(?!(?-i:[kmc][mgl]|[km]ph|lbs?|oz|ft|mins?|hrs?|secs?)\b)\w",  # 0x1F, 2x, 10k, 2nd; not 5kg
    r"~*[×·⋅÷√±]",
    r"~*\^(?!\{?\\circ)",
    r"\*\w|~\*~\w|\(",  # 2*y, 2 * y, 2(x + 1)
    r"~*\+~*\w",
    r"/[a-z]\b",
    rf"~*\\{_HARMLESS}[a-z]",  # 2\pi
    r"(?:~|-)*(?:(?:hundred|thousand|million|billion|trillion)(?:ths?|s)?|dozens?|lakh|crore|k|bn|mn)\b",
    r"(?:~|-)+(?:half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?)\b",
    r"~+and~+(?:a|one)~+(?:half|third|quarter)",
    r"[\s\S]*[¼-¾⅐-⅞]",
)


def last_number(text: str) -> str | None:
    """The last number of a text, in one spelling.

    ``1,000.50`` is "1000.5"; a last one that is a part of more gives None, and digits of a word are no number.
    A text goes in, a decimal number as a string comes out, or None where there is none.

    Example:
        >>> from distill_ops.methods.system2 import last_number
        >>> last_number("6 boxes of 200 are 1,200.00 dollars."), last_number("about 1/2")
        ('1200', None)

    A part of more: of a fraction, a power, a product or sum that is not worked out, a range, a date,
    of thousands with a space or an apostrophe, of "5 million", "0x1F", "2x", "10k", "- 2". Units and "%" after a
    number are not looked at. A comma is of thousands, a full stop of decimals, as in English.
    """
    runs = list(_NUMERIC.finditer(text))
    if not runs:
        return None
    found = runs[-1]
    number = found[0].rstrip(".,/")
    if not _NUMBER.fullmatch(number):
        return None
    before = text[max(0, found.start() - 40) : found.start()]
    looked_at = [_MORE_BEFORE]
    if not number[0].isdigit():
        looked_at.append(_MORE_BEFORE_A_SIGN)
    if re.match(r"\d{3}(?!\d)", number):
        looked_at.append(_MORE_BEFORE_THREE_DIGITS)
    if any(more.search(before) for more in looked_at):
        return None
    if _MORE_AFTER.match(text, found.start() + len(number)):
        return None
    value = Decimal(number.replace(",", "").replace("\u2212", "-"))
    shown = format(value, "f")
    shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return "0" if shown in ("-0", "") else shown
