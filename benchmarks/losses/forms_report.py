"""The README's table of the other forms: ``python -m benchmarks.forms_report FILE [--readme README]``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .form_providers import PRODUCTS
from .forms import FormRecord
from .machine import machine_line
from .records import EAGER, OURS, load
from .report import markdown_table, replace_marked
from .screen import mebibytes, number

BEGIN, END = "<!-- forms:begin -->", "<!-- forms:end -->"


def _row(records: Sequence[FormRecord]) -> list[str]:
    first = records[0]
    timed = {r.provider: r for r in records if r.measured}
    ours, eager = timed.get(OURS), timed.get(EAGER)
    sizes = [first.tokens, *([first.hidden] if first.hidden else []), first.vocab]
    peers = [
        f"{r.label} {number(r.median_ms)}"
        for r in timed.values()
        if r.provider not in (OURS, EAGER, PRODUCTS)
    ]
    return [
        f"{first.form} {first.loss}",
        f"{sizes} {first.dtype}" + (f" K={first.k}" if first.k else ""),
        ", ".join(peers) or "–",
        number(eager and eager.median_ms),
        number(ours and ours.median_ms),
        number(ours and ours.times_eager, "x"),
        number(ours and ours.times_products, "x"),
        mebibytes(eager and eager.above_gradients_bytes),
        mebibytes(ours and ours.above_gradients_bytes),
    ]


def markdown(records: Sequence[FormRecord], facts: dict[str, object]) -> str:
    """A row for each case, the captions, and who was skipped and why."""
    cases: dict[str, list[FormRecord]] = {}
    for record in records:
        cases.setdefault(record.case, []).append(record)
    header = [
        "form", "tokens, hidden, vocabulary", "peers, ms", "eager, ms", "distill_ops, ms", "vs eager",
        "of its matrix products", "MiB, eager", "MiB, ours",
    ]  # fmt: skip
    reasons = dict.fromkeys(f"{r.label}: {r.reason}" for r in records if not r.measured)
    rounds = min(r.rounds for r in records if r.measured)
    lines = markdown_table(header, [_row(group) for group in cases.values()], n_names=3)
    lines += [
        "",
        f"Forward + backward, medians of {rounds} or more rounds in which every provider runs once; "
        "MiB: peak above the inputs and the gradients of the leaves. `cross_entropy`: the hard label "
        "alone.",
        "",
        "Not measured: " + "; ".join(reasons) + ".",
        "",
        f"`{facts['command']}` on {machine_line(facts)}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forms_report", description=__doc__)
    parser.add_argument("json", type=Path, help="what python -m benchmarks.forms wrote")
    parser.add_argument("--readme", type=Path, help=f"replace what lies between {BEGIN} and {END}")
    options = parser.parse_args(arguments)
    table = markdown(*load(options.json, FormRecord))
    print(table)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(replace_marked(text, table, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
