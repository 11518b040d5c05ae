"""``python -m benchmarks.gpu.graphs``: small shapes, forward + backward, launched from Python and as a
replayed CUDA graph, which leaves the host's part out.

Ours beside eager PyTorch and a copy, all in the same rounds, and held against eager's gradient.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from rich.table import Table

from ..core.machine import describe, machine_line
from ..core.records import EAGER, FAILED, OURS, Measured, save
from ..core.screen import left_out, make_console, make_table, number
from ..core.timing import Budget, Run, interleaved
from ..losses.cases import LOSSES, Case, make_inputs
from ..losses.providers import PROVIDERS, LossFunction
from ..losses.records import COPY, OURS_BACKWARD
from . import stages

SHAPES = [(64, 32000), (256, 32000), (1024, 32000), (64, 50257), (64, 128256), (256, 128256)]
SMALL_LOSSES = ("forward_kl", "jensen_shannon")
CONTENDERS = (EAGER, OURS, OURS_BACKWARD)
GRAPHED = " graph"  # behind the name of a contender whose run is replayed
BUDGET = Budget(seconds=1.5, min_rounds=10, max_rounds=200)
WARM_UPS = 3
GRADIENT_TOLERANCE = 1e-2  # of bf16 gradients, by norm


@dataclass(frozen=True, kw_only=True)
class GraphRecord(Measured):
    """A provider on a case, launched from Python (``median_ms``) and as a graph; medians."""

    graph_ms: float | None = None
    host_ms: float | None = None  # the difference
    copy_ms: float | None = None  # of a graph that copies the teacher's logits
    times_copy: float | None = None  # graph_ms over that of a copy of the minimal bytes


def captured(run: Run, device: torch.device) -> Run:
    """``run`` as the replay of a CUDA graph; what it made when captured, each replay makes again.

    Raises:
        RuntimeError: the device is no GPU.
    """
    if device.type != "cuda":
        raise RuntimeError(f"a CUDA graph needs a GPU, got the device {device}")
    stream = torch.cuda.Stream()  # capture allows no work of the default stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def step(function: LossFunction, student: torch.Tensor, teacher: torch.Tensor) -> Run:
    """Forward + backward into a fresh gradient."""

    def run() -> None:
        student.grad = None
        function(student, teacher).backward()

    return run


def require_close(name: str, gradient: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a gradient that differs from eager's by more than roundings (ValueError)."""
    expected = expected.double()
    error = ((gradient.double() - expected).norm() / expected.norm()).item()
    if not error <= GRADIENT_TOLERANCE:
        raise ValueError(f"wrong gradient of {name}: {error:.2e} from eager's, by norm")


def runs_of(case: Case, device: torch.device) -> tuple[dict[str, Run], dict[str, str]]:
    """Each contender's run and its replay, and the copy's; of who failed, the reason."""
    student, teacher = make_inputs(case, device)
    runs, failed = {}, {}
    expected = None
    for name in CONTENDERS:
        try:
            # a leaf of its own: the graph writes to the gradient that it was captured with
            own = student.detach().clone().requires_grad_()
            run = step(PROVIDERS[name].build(case, device), own, teacher)
            run()
            expected = own.grad.clone() if expected is None else expected
            require_close(name, own.grad, expected)
            replay = captured(run, device)
            own.grad.zero_()
            replay()
            require_close(name + GRAPHED, own.grad, expected)
        except Exception as error:  # the others are measured all the same
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            plain = student.detach().clone().requires_grad_()
            runs[name] = step(PROVIDERS[name].build(case, device), plain, teacher)
            runs[name + GRAPHED] = replay
    target = torch.empty_like(teacher)
    runs[COPY] = captured(lambda: target.copy_(teacher), device)
    return runs, failed


def records_of(case: Case, medians: dict[str, float], failed: dict[str, str]) -> list[GraphRecord]:
    """The records of a case from its medians in milliseconds by run."""
    fields = {"case": case.name, **asdict(case)}
    # a copy of as many bytes as the case moves at least
    copy = medians[COPY] * case.minimal_bytes("train") / (2 * case.logits_bytes)
    found = []
    for name in CONTENDERS:
        labels = {"provider": name, "label": PROVIDERS[name].label}
        if name in failed:
            found.append(GraphRecord(**fields, **labels, status=FAILED, reason=failed[name]))
            continue
        plain, graph = medians[name], medians[name + GRAPHED]
        found.append(
            GraphRecord(
                **fields, **labels, median_ms=plain, graph_ms=graph, host_ms=plain - graph,
                copy_ms=medians[COPY], times_copy=graph / copy,
            )
        )  # fmt: skip
    return found


def run_case(case: Case, device: torch.device, budget: Budget) -> list[GraphRecord]:
    runs, failed = runs_of(case, device)
    times = interleaved(runs, lambda: None, device, budget)
    return records_of(case, {name: t.median_ms for name, t in times.items()}, failed)


def table_of(records: Sequence[GraphRecord]) -> Table:
    header = ["provider", "ms", "as a graph", "host", "of a copy"]
    return make_table(
        records[0].case,
        header,
        [
            [r.label, number(r.median_ms), number(r.graph_ms), number(r.host_ms), number(r.times_copy)]
            if r.measured
            else [r.label, r.status, "", "", ""]
            for r in records
        ],
        "ms; of a copy: the graph's time over that of a copy of the least bytes, a graph too",
    )  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.graphs", description=__doc__)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=SMALL_LOSSES)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the records go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where ours failed, 2 without a GPU."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if reason := stages.missing_gpu():
        print(reason, file=sys.stderr)
        return stages.NO_GPU
    device = torch.device("cuda")
    facts = describe(device, arguments, "benchmarks.gpu.graphs")
    console = make_console()
    console.print(machine_line(facts))
    records: list[GraphRecord] = []
    for shape, loss in product(SHAPES, options.losses):
        new = run_case(Case(loss, *shape, "bfloat16"), device, BUDGET)
        console.print(table_of(new))
        for line in left_out(new):
            console.print(line, markup=False)
        records += new
        if options.json:
            save(options.json, records, facts)  # what there is: the run may be cut short
    return int(any(not r.measured for r in records))


if __name__ == "__main__":
    sys.exit(main())
