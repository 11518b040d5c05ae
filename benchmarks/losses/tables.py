"""The dense losses on the terminal: a table per case, a summary, and the overhead in Python."""

from collections.abc import Sequence

from rich.table import Table

from ..core.records import EAGER, FAILED, OURS, SKIPPED, find, group_by_case
from ..core.screen import make_table, mebibytes, number
from .records import COMPILE, COPY, Record, ours_against


def case_table(records: Sequence[Record]) -> Table:
    """One case: its providers by rows, in the order of their records."""
    first = records[0]
    model = f", {first.model}'s vocabulary" if first.model else ""
    copy = find(records, provider=COPY, mode="train")

    def row(record: Record) -> list[str]:
        if record.status == FAILED:
            return [record.label, "[red]failed[/red]"]
        forward = find(records, provider=record.provider, mode="eval")
        return [
            f"[bold]{record.label}[/bold]" if record.provider == OURS else record.label,
            number(record.median_ms),
            f"{number(record.low_ms)}-{number(record.high_ms)}",
            number(forward and forward.median_ms),
            number(record.times_baseline, "x"),
            mebibytes(record.peak_bytes),
            number(record.copy_fraction),
            number(record.error_ratio),
        ]

    return make_table(
        f"{first.loss} {first.shape}{model}",
        [
            "provider",
            "train ms",
            "20-80%",
            "eval ms",
            "vs eager",
            "MiB",
            "of copy",
            "error",
        ],
        [
            row(record)
            for record in records
            if record.mode == "train" and record.status != SKIPPED and record.provider != COPY
        ],
        "train: forward + backward; eval: forward alone; MiB: peak above the inputs\n"
        f"a copy runs at {number(copy.gb_per_s)} GB/s; error: of the gradient, over eager's",
    )


def summary_table(records: Sequence[Record]) -> Table:
    """Ours against eager and torch.compile, a row for each case."""

    def row(name: str, case: Sequence[Record]) -> list[str]:
        timed = [find(case, provider=p, mode="train") for p in (EAGER, COMPILE, OURS)]
        ratios = [ours_against(p, case) for p in (EAGER, COMPILE)]
        return [
            name,
            *(number(record and record.median_ms) for record in timed),
            *(number(ratio, "x") for ratio in ratios),
        ]

    return make_table(
        "Ours against eager and torch.compile, forward + backward",
        ["case", "eager ms", "compile ms", "ours ms", "vs eager", "vs compile"],
        [row(name, case) for name, case in group_by_case(records).items()],
    )


def overhead_table(records: Sequence[Record]) -> Table:
    """Forward + backward of a tiny tensor, ours over the baseline written by hand."""
    first = records[0]
    return make_table(
        f"Python overhead, forward + backward of [{first.tokens}, {first.vocab}]",
        ["loss", "µs", "20-80%", "times kl_div(log_softmax, softmax)"],
        [
            [
                record.loss,
                f"{record.median_ms * 1e3:.0f}",
                f"{record.low_ms * 1e3:.0f}-{record.high_ms * 1e3:.0f}",
                number(1 / record.times_baseline, "x"),
            ]
            for record in records
        ],
    )
