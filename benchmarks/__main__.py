"""``python -m benchmarks``: the dense losses, ours beside eager PyTorch, torch.compile and peers.

Every provider is checked against the float64 reference before it is timed. Times are medians over
interleaved rounds; memory is the peak above the inputs.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .core.machine import RESULTS, add_device_argument, describe, device_name, machine_line
from .core.records import FAILED, OURS, save
from .core.screen import left_out, make_console, progress_bar
from .core.timing import Budget
from .losses import overhead, plot
from .losses.cases import DTYPES, LOSSES, Shape, select_cases
from .losses.harness import run_case, stages
from .losses.providers import PROVIDERS
from .losses.records import Record
from .losses.tables import case_table, overhead_table, summary_table

# of a case's forward + backward; its forward alone gets half
BUDGET = Budget(seconds=6.0, min_rounds=5, max_rounds=100)
QUICK_BUDGET = Budget(seconds=1.0, min_rounds=3, max_rounds=30)


def parse_shape(text: str) -> Shape:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected TOKENSxVOCAB such as 1024x32000, got {text!r}")
    return int(match[1]), int(match[2])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="few tokens, short rounds: a few minutes, most of them torch.compile's",
    )
    add("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    add("--shapes", nargs="+", type=parse_shape, metavar="TOKENSxVOCAB")
    add("--dtype", nargs="+", choices=DTYPES, help="of the logits, for every shape")
    add("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    add("--json", type=Path, metavar="PATH", help="where the records go")
    add("--plot", type=Path, metavar="PATH", help="where the bar plot goes (.png, .svg, .pdf)")
    add_device_argument(parser)
    return parser.parse_args(arguments)


def default_output(options: argparse.Namespace) -> Path | None:
    """``results/cpu`` or ``results/gpu-<name>``, and only of a full run: a partial one must not
    replace the numbers that the README is made of."""
    partial = options.quick or options.shapes or options.dtype
    partial = partial or set(options.losses) != set(LOSSES)
    if partial or set(options.providers) != set(PROVIDERS):
        return None
    if options.device.type == "cpu":
        return RESULTS / "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(options.device).lower()).strip("-")
    return RESULTS / f"gpu-{name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where ours failed its check."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = options.device
    providers = [PROVIDERS[name] for name in dict.fromkeys(options.providers)]
    cases = select_cases(device.type, options.quick, options.losses, options.shapes, options.dtype)
    budget = QUICK_BUDGET if options.quick else BUDGET
    facts = describe(device, arguments)
    console = make_console()
    console.print(machine_line(facts))

    records: list[Record] = []
    with progress_bar(console, len(cases) * stages(providers)) as step:
        for case in cases:
            new = run_case(
                case, providers, device, budget, lambda s, c=case: step(f"{c.name}: {s}")
            )
            console.print(case_table(new))
            records += new
            if options.json:
                save(options.json, records, facts)  # as far as it came
    for line in left_out(records):
        console.print(line, markup=False)
    console.print(summary_table(records))
    tiny = overhead.measure(device)
    console.print(overhead_table(tiny))

    output = default_output(options)
    json_path = options.json or (output and output.with_suffix(".json"))
    plot_path = options.plot or (output and output.with_suffix(".png"))
    if json_path:
        save(json_path, records + tiny, facts)
        console.print(f"records: {json_path}")
    if plot_path:
        plot.draw(plot_path, records, f"{facts['command']}\n{machine_line(facts)}")
        console.print(f"plot: {plot_path}")
    return int(any(r.status == FAILED and r.provider == OURS for r in records))


if __name__ == "__main__":
    sys.exit(main())
