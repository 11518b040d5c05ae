"""The README's table out of a run's JSON: ``python -m benchmarks.report FILE [--readme README]``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from .machine import machine_line
from .providers import PROVIDERS
from .records import COMPILE, EAGER, OURS, OVERHEAD, Record, find, group_by_case, load, ours_against
from .screen import mebibytes, number

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
NOT_PEERS = (EAGER, "native", COMPILE, OURS)


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
    """A row for each case, ours beside eager, torch.compile and the peers that were timed, then
    the caption and the overhead."""
    cases = group_by_case(records)
    overhead = cases.pop(OVERHEAD, None)
    measured = [r for group in cases.values() for r in group if r.measured]
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
    alignment = ["---"] * 2 + ["---:"] * (len(header) - 2)
    rows = [header, alignment, *(_row(group, providers) for group in cases.values())]
    lines = [
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Forward + backward, medians of {min(r.rounds for r in measured)} or more rounds in which "
        "every provider runs once; memory above the inputs, gradient included; “of a copy”: reading "
        "both logits and writing the gradient at the speed of a copy would be 1.",
        "",
        f"`{facts['command']}` on {machine_line(facts)}.",
    ]
    if overhead:
        lines += ["", _overhead_line(overhead)]
    return "\n".join(lines)


def replace_marked(text: str, new: str) -> str:
    """Put ``new`` between the markers.

    Raises:
        ValueError: the text does not hold the two markers, once and in this order.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or not pattern.search(text):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, once each")
    return pattern.sub(lambda _: f"{BEGIN}\n{new}\n{END}", text)


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
