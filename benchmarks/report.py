"""README's benchmark picture and table, docs/benchmarks.md and the methods' tables, out of the JSON of runs.

``python -m benchmarks.report --readme README.md --page docs/benchmarks.md --methods docs``; without these
it prints the table. Nothing is measured, and no figure is typed.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .core.machine import RESULTS, machine_line
from .core.markdown import markdown_table, replace_marked
from .core.records import EAGER, OURS, Measured, find, group_by_case, load
from .core.screen import mebibytes, number
from .losses import forms_report, minillm, parallel, plot
from .losses import report as dense_report
from .losses.forms import FormRecord
from .losses.records import COMPILE, Record, timed_training

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
# pages of docs/ with the table of a JSON of their own between the markers
METHODS = {"minillm": "minillm-cpu.json", "vocab-parallel": parallel.RECORDS}
# the README's lines: dense losses at the first shape, and the first case of (form, loss)
DENSE = ("soft_cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
FORMS = (
    ("linear", "forward_kl"),
    ("linear", "jensen_shannon"),
    ("topk", "forward_kl"),
    ("linear_topk", "forward_kl"),
    ("tokens", "log_prob"),
)


def _chosen(
    dense: Sequence[Record], forms: Sequence[FormRecord]
) -> list[tuple[str, list[Measured]]]:
    """The README's lines: a name, and the records of one case."""
    cases = list(group_by_case(timed_training(dense)).values())
    form_cases = list(group_by_case(r for r in forms if r.measured).values())
    lines = []
    for loss in DENSE:
        lines += [(loss, case) for case in cases if case[0].loss == loss][:1]
    for form, loss in FORMS:
        found = [case for case in form_cases if (case[0].form, case[0].loss) == (form, loss)]
        lines += [(f"{form} {loss}", case) for case in found[:1]]
    return lines


def readme_table(dense: Sequence[Record], forms: Sequence[FormRecord]) -> list[str]:
    """A line for each loss that a reader asks for first."""

    def row(name: str, case: Sequence[Measured]) -> list[str]:
        eager, compiled, ours = (find(case, provider=p) for p in (EAGER, COMPILE, OURS))
        ratio = eager.median_ms / ours.median_ms if eager and ours else None
        return [
            name,
            case[0].shape,
            *(number(record and record.median_ms) for record in (eager, compiled, ours)),
            number(ratio, "x"),
            *(mebibytes(record and record.peak_bytes) for record in (eager, ours)),
        ]

    header = [
        "loss", "tokens, (hidden,) vocabulary", "eager, ms", "torch.compile, ms",
        "distill_ops, ms", "vs eager", "peak MiB, eager", "peak MiB, distill_ops",
    ]  # fmt: skip
    rows = [row(name, case) for name, case in _chosen(dense, forms)]
    return markdown_table(header, rows, n_names=2)


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.resolve().parent)).as_posix()


def readme_part(
    dense: Sequence[Record],
    forms: Sequence[FormRecord],
    facts: dict[str, object],
    forms_facts: dict[str, object],
    picture: str,
    page: str,
) -> str:
    """What stands between README's markers; ``picture`` and ``page`` are links."""
    return "\n".join(
        [
            f"![forward + backward, every loss]({picture})",
            "",
            *readme_table(dense, forms),
            "",
            "Forward + backward, medians of interleaved rounds; peak: above the inputs, gradients "
            f"included; –: not measured. On {machine_line(facts)}; the forms beside the dense one on "
            f"{machine_line(forms_facts)}. Every case, the peers, and the three ways to hold a "
            f"gradient: [benchmarks]({page}).",
        ]
    )


def page(
    dense: tuple[Sequence[Record], dict[str, object]],
    forms: tuple[Sequence[FormRecord], dict[str, object]],
    picture: str,
) -> str:
    """docs/benchmarks.md."""
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Made by `python -m benchmarks.report` from the JSON in `benchmarks/results/`. Every "
            "provider is checked against the float64 reference before it is timed.",
            "",
            "## Dense losses",
            "",
            f"![forward + backward, every loss]({picture})",
            "",
            dense_report.markdown(*dense),
            "",
            "## From hidden states, from a top-k teacher, of single tokens",
            "",
            forms_report.markdown(*forms),
            "",
        ]
    )


def method_part(name: str) -> str:
    """What stands between the markers of a method's page."""
    if METHODS[name] == parallel.RECORDS:
        return parallel.markdown(*load(RESULTS / parallel.RECORDS, parallel.ParallelRecord))
    return forms_report.of_a_method(*load(RESULTS / METHODS[name], FormRecord), minillm.STATISTICS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    add = parser.add_argument
    add("json", type=Path, nargs="?", default=RESULTS / "cpu.json", help="of python -m benchmarks")
    add(
        "--forms",
        type=Path,
        default=RESULTS / "forms-cpu.json",
        help="of python -m benchmarks.forms",
    )
    add("--readme", type=Path, help=f"replace what lies between {BEGIN} and {END}")
    add("--page", type=Path, help="write every table there, and the picture beside the JSON")
    add(
        "--methods",
        type=Path,
        metavar="DOCS",
        help="the folder of the methods' pages, for their tables",
    )
    options = parser.parse_args(arguments)
    dense, facts = load(options.json, Record)
    forms = load(options.forms, FormRecord)
    picture = options.json.resolve().with_suffix(".png")
    print("\n".join(readme_table(dense, forms[0])))
    if options.page:
        plot.draw(picture, dense, f"{facts['command']}\n{machine_line(facts)}")
        options.page.parent.mkdir(parents=True, exist_ok=True)
        text = page((dense, facts), forms, _link(picture, options.page))
        options.page.write_text(text, encoding="utf-8")
    for name in METHODS if options.methods else ():
        file = options.methods / f"{name}.md"
        text = replace_marked(file.read_text(encoding="utf-8"), method_part(name), BEGIN, END)
        file.write_text(text, encoding="utf-8")
    if options.readme:
        every = (options.page or options.readme.parent / "docs/benchmarks.md").resolve()
        links = _link(picture, options.readme), _link(every, options.readme)
        text = options.readme.read_text(encoding="utf-8")
        part = readme_part(dense, forms[0], facts, forms[1], *links)
        options.readme.write_text(replace_marked(text, part, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
