"""``docs/semantics.md`` as data: its formulas and its worked values, which the tests compute with."""

import math
import re

import distill_ops
from tests.support import ROOT

PAGE = (ROOT / "docs/semantics.md").read_text()
NAMES = {name: getattr(distill_ops, name) for name in distill_ops.__all__}


def table(section: int) -> list[list[str]]:
    """The rows of a section's table, its cells without backticks."""
    text = re.search(rf"^## {section}\. .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [
        [cell.strip().strip("`") for cell in re.split(r" \|", row.strip("|"))] for row in rows[1:]
    ]


# name -> how it is made, value, slope, what they use besides
FORMULAS = {name: rest for name, *rest in table(2)}

ROWS = {
    "S": (1, 2, -1, 0.5, 0),
    "Q": (0.5, 1.5, 0, -0.5, 2),
    "S2": (1, 2, -math.inf, 0.5, 0),
    "Q2": (0.5, 1.5, -math.inf, -0.5, 2),
}


def worked_values() -> list[tuple]:
    """(divergence, options, student, teacher, loss, gradient) of each line."""
    found = []
    for made, options, rows, loss, gradient in table(14):
        student, teacher = (ROWS[name] for name in rows.split(", "))
        options = eval(f"dict({options})")
        found.append((eval(made, NAMES), options, student, teacher, float(loss), eval(gradient)))
    return found
