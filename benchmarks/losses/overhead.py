"""The cost in Python of one forward + backward: ``python -m benchmarks.losses.overhead``.

A [4, 128] tensor has next to no arithmetic. The baseline is what a user would write by hand,
``kl_div(log_softmax(student), softmax(teacher))``.
"""

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console

from ..core.machine import add_device_argument
from ..core.records import OURS
from ..core.timing import Budget, interleaved
from .cases import LOSSES, Case, make_inputs
from .check import run_once
from .providers import PROVIDERS
from .records import OVERHEAD, Record, case_fields, time_fields
from .tables import overhead_table

BASELINE = "kl_div"
BUDGET = Budget(seconds=2.0, min_rounds=200, max_rounds=2000)


def kl_div(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")


def measure(device: torch.device) -> list[Record]:
    """The baseline's record, and ours for each loss."""
    ours = PROVIDERS[OURS]
    cases = [Case(loss, tokens=4, vocab=128, dtype="float32") for loss in (BASELINE, *LOSSES)]
    student, teacher = make_inputs(cases[0], device)
    functions = {
        case.loss: kl_div if case.loss == BASELINE else ours.build(case, device) for case in cases
    }

    def prepare() -> None:
        student.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()  # no run waits for the queue of the one before

    runs = {loss: lambda f=f: run_once(f, student, teacher) for loss, f in functions.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking others would be measured, and there is no work for them
    try:
        # the host's clock on a GPU too: what counts is when Python is free again
        times = interleaved(runs, prepare, torch.device("cpu"), BUDGET)
    finally:
        torch.set_num_threads(threads)
    return [
        Record(
            **{**case_fields(case), "case": OVERHEAD},
            provider=BASELINE if case.loss == BASELINE else OURS,
            label="by hand" if case.loss == BASELINE else ours.label,
            mode="train",
            **time_fields(times[case.loss], times[BASELINE]),
        )
        for case in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses.overhead", description=__doc__
    )
    add_device_argument(parser)
    device = parser.parse_args().device
    Console().print(overhead_table(measure(device)))


if __name__ == "__main__":
    main()
