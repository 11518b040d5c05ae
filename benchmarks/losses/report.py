"""The dense losses' tables of docs/benchmarks.md: every case, and the three ways to hold a gradient."""

from collections.abc import Iterable, Sequence

from ..core.machine import machine_line
from ..core.markdown import markdown_table
from ..core.records import EAGER, OURS, find, group_by_case
from ..core.screen import mebibytes, number
from .providers import PROVIDERS
from .records import COMPILE, OVERHEAD, WAYS, Record, ours_against

NOT_PEERS = (EAGER, "native", COMPILE, *WAYS)


def _row(records: Sequence[Record], providers: Sequence[str]) -> list[str]:
    """A case's line; dashes for what was not measured."""
    first = records[0]
    timed = {name: find(records, provider=name, mode="train") for name in providers}

    def peak(name: str) -> str:
        return mebibytes(timed[name] and timed[name].peak_bytes)

    return [
        first.loss,
        first.shape,
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
        if not all(ways) or records[0].shape != (shape or records[0].shape):
            continue
        shape = records[0].shape
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
    header = [
        shape,
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
