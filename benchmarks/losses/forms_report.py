"""The table of docs/benchmarks.md for the forms beside the dense one."""

from collections.abc import Sequence

from ..core.machine import machine_line
from ..core.markdown import markdown_table
from ..core.records import EAGER, OURS, group_by_case
from ..core.screen import left_out, mebibytes, number
from .form_providers import PRODUCTS
from .forms import FormRecord


def _row(records: Sequence[FormRecord]) -> list[str]:
    first = records[0]
    timed = {r.provider: r for r in records if r.measured}
    ours, eager = timed.get(OURS), timed.get(EAGER)
    peers = [
        f"{r.label} {number(r.median_ms)}"
        for r in timed.values()
        if r.provider not in (OURS, EAGER, PRODUCTS)
    ]
    return [
        f"{first.form} {first.loss}" + (f" {first.tail}" if first.tail != "bucket" else ""),
        first.shape,
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
    header = [
        "form", "tokens, hidden, vocabulary", "peers, ms", "eager, ms", "distill_ops, ms", "vs eager",
        "of its matrix products", "MiB, eager", "MiB, ours",
    ]  # fmt: skip
    rounds = min(r.rounds for r in records if r.measured)
    rows = map(_row, group_by_case(records).values())
    lines = markdown_table(header, rows, n_names=3)
    lines += [
        "",
        f"Forward + backward, medians of {rounds} or more rounds in which every provider runs once; "
        "MiB: peak above the inputs and the gradients of the leaves. `cross_entropy`: the hard label "
        "alone.",
        "",
        *(f"- {line}" for line in left_out(records)),
        "",
        f"`{facts['command']}` on {machine_line(facts)}.",
    ]
    return "\n".join(lines)


def of_a_method(records: Sequence[FormRecord], facts: dict[str, object], alone: str) -> str:
    """A row for each provider of one case, beside eager PyTorch and the fused call ``alone``."""
    timed = {r.provider: r for r in records if r.measured}
    base = timed[alone]

    def row(r: FormRecord) -> list[str]:
        return [
            "its code in eager PyTorch" if r.provider == EAGER else r.label,
            number(r.median_ms),
            number(r.times_eager, "x"),
            f"{r.median_ms / base.median_ms:.2f}x",
            mebibytes(r.peak_bytes),
            mebibytes(r.above_gradients_bytes),
        ]

    header = ["", "ms", "faster than its code", "of the statistics alone", "peak MiB", "less the gradient"]  # fmt: skip
    rounds = min(r.rounds for r in timed.values())
    lines = markdown_table(header, map(row, timed.values()))
    lines += [
        "",
        f"Forward + backward of logits {records[0].shape}, medians of {rounds} or more interleaved rounds; "
        f"memory above the inputs. `{facts['command']}` on {machine_line(facts)}.",
    ]
    return "\n".join(lines)
