"""The README's tables out of a run's JSON: ``python -m benchmarks.report FILE [--readme README]``."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .machine import machine_line
from .providers import PROVIDERS
from .records import (
    COMPILE,
    EAGER,
    OURS,
    OURS_BACKWARD,
    OURS_INPLACE,
    OVERHEAD,
    Record,
    find,
    group_by_case,
    load,
    ours_against,
)
from .screen import mebibytes, number

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
WAYS = {OURS: "forward", OURS_BACKWARD: "backward", OURS_INPLACE: "in place"}
NOT_PEERS = (EAGER, "native", COMPILE, *WAYS)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], n_names: int) -> list[str]:
    """``n_names`` columns of names, the others of numbers."""
    alignment = ["---"] * n_names + ["---:"] * (len(header) - n_names)
    return ["| " + " | ".join(row) + " |" for row in (header, alignment, *rows)]


def _row(records: Sequence[Record], providers: Sequence[str]) -> list[str]:
    """A case's line; dashes for what was not measured."""
    first = records[0]
    timed = {name: find(records, provider=name, mode="train") for name in providers}

    def peak(name: str) -> str:
        return mebibytes(timed[name] and timed[name].peak_bytes)

    return [
        first.loss,
        f"[{first.tokens}, {first.vocab}] {first.dtype}",
        *(number(record and record.median_ms) for record in timed.values()),
        number(ours_against(EAGER, records), "x"),
        number(ours_against(COMPILE, records), "x"),
        number(timed[OURS] and timed[OURS].copy_fraction),
        peak(EAGER),
        peak(OURS),
    ]


def _gradient_lines(cases: Iterable[Sequence[Record]]) -> list[str]:
    """How the gradient is held: a row for each loss, at the first shape that was timed so."""
    shape, rows = None, []
    for records in cases:
        ways = [find(records, provider=name, mode="train") for name in WAYS]
        here = records[0].tokens, records[0].vocab, records[0].dtype
        if not all(ways) or here != (shape or here):
            continue
        shape = here
        forward, _, inplace = ways
        rows.append(
            [
                forward.loss,
                *(number(way.median_ms) for way in ways),
                number(forward.median_ms / inplace.median_ms, "x"),
                *(mebibytes(way.peak_bytes) for way in ways),
                *(mebibytes(way.kept_bytes) for way in ways),
            ]
        )
    if not rows:
        return []
    tokens, vocab, dtype = shape
    header = [
        f"[{tokens}, {vocab}] {dtype}",
        *(f"{way}, ms" for way in WAYS.values()),
        "in place vs forward",
        *(f"peak MiB, {way}" for way in WAYS.values()),
        *(f"kept MiB, {way}" for way in WAYS.values()),
    ]
    return [
        *markdown_table(header, rows, n_names=1),
        "",
        "The three ways to hold the gradient: made in the forward in a buffer of its own (the "
        'default), `gradient="backward"`, `inplace=True`. Peak: above the inputs, the gradient '
        "included; kept: above the inputs, between forward and backward.",
    ]


def _overhead_line(records: Sequence[Record]) -> str:
    first = records[0]
    ratios = ", ".join(
        f"{r.loss} {number(1 / r.times_baseline)}" for r in records if r.provider == OURS
    )
    return (
        f"Python overhead, as a multiple of `kl_div(log_softmax(s), softmax(t))` forward + backward "
        f"on [{first.tokens}, {first.vocab}]: {ratios}."
    )


def markdown(records: Sequence[Record], facts: dict[str, object]) -> str:
    """A row for each case, ours beside eager, torch.compile and the peers that were timed; a row
    for each loss, ours in its three ways to hold the gradient; the captions and the overhead."""
    cases = group_by_case(records)
    overhead = cases.pop(OVERHEAD, None)
    measured = [r for group in cases.values() for r in group if r.measured]
    rounds = [r.rounds for r in measured if r.mode == "train"]
    timed = {r.provider for r in measured}
    peers = [name for name in PROVIDERS if name in timed and name not in NOT_PEERS]
    providers = [EAGER, COMPILE, *peers, OURS]
    header = [
        "loss",
        "logits",
        *(f"{PROVIDERS[name].label}, ms" for name in providers),
        "vs eager",
        "vs torch.compile",
        "of a copy",
        "peak MiB, eager",
        "peak MiB, ours",
    ]
    lines = [
        *markdown_table(header, (_row(group, providers) for group in cases.values()), n_names=2),
        "",
        f"Forward + backward, medians of {min(rounds)} or more rounds in which "
        "every provider runs once; memory above the inputs, gradient included; “of a copy”: reading "
        "both logits and writing the gradient at the speed of a copy would be 1.",
    ]
    if ways := _gradient_lines(cases.values()):
        lines += ["", *ways]
    lines += ["", f"`{facts['command']}` on {machine_line(facts)}."]
    if overhead:
        lines += ["", _overhead_line(overhead)]
    return "\n".join(lines)


def replace_marked(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """Put ``new`` between the markers.

    Raises:
        ValueError: the text does not hold the two markers, once and in this order.
    """
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not pattern.search(text):
        raise ValueError(f"expected {begin} and, after it, {end}, once each")
    return pattern.sub(lambda _: f"{begin}\n{new}\n{end}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", type=Path, help="what python -m benchmarks wrote")
    parser.add_argument("--readme", type=Path, help=f"replace what lies between {BEGIN} and {END}")
    options = parser.parse_args(arguments)
    table = markdown(*load(options.json))
    print(table)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(replace_marked(text, table), encoding="utf-8")


if __name__ == "__main__":
    main()
