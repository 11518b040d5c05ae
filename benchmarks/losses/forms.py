"""``python -m benchmarks.forms``: the losses from hidden states, from a top-k teacher, and of single
tokens, beside eager PyTorch and peers. Forward + backward.

Every provider is first checked on a few tokens against the reference in float64. The linear cases
also time their matrix products alone, in the same rounds, which no implementation can do without.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from ..core.machine import RESULTS, add_device_argument, describe, device_name, machine_line
from ..core.memory import peak_above_inputs
from ..core.records import EAGER, FAILED, OURS, SKIPPED, Measured, save
from ..core.screen import left_out, make_console, make_table, mebibytes, number
from ..core.timing import Budget, Times, interleaved
from .form_cases import CASES_CPU, CASES_GPU, FormCase, Tensors, make_tensors
from .form_providers import PRODUCTS, PROVIDERS, products
from .peers import Skipped

BUDGET = Budget(seconds=8.0, min_rounds=5, max_rounds=60)
QUICK_BUDGET = Budget(seconds=1.0, min_rounds=2, max_rounds=10)
CHECKED_TOKENS = 16
# of the value and, by norm, of each gradient: roundings of the products' sums in the case's dtype
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# eager PyTorch's logits of a head are rounded to bfloat16 before the K are chosen: some others are
ROUNDED_CHOICE = {("linear_support", "bfloat16"): 1e-1}


@dataclass(frozen=True, kw_only=True)
class FormRecord(Measured):
    """A provider on a case of any form."""

    form: str
    hidden: int | None
    k: int | None
    tail: str = "bucket"
    times_eager: float | None = None  # eager's median over this one: above 1 is faster
    times_products: float | None = None  # this one's median over that of the matrix products
    n_products: int | None = None  # as many as ours makes
    above_gradients_bytes: int | None = None  # the peak without the gradients
    error: float | None = None  # the largest, relative, of value and gradients

    @property
    def shape(self) -> str:
        sizes = [self.tokens, *([self.hidden] if self.hidden else []), self.vocab]
        return f"{sizes} {self.dtype}" + (f" K={self.k}" if self.k else "")


def _run(function: Callable, tensors: Tensors) -> torch.Tensor:
    """One step: forward + backward, its gradients left with the leaves."""
    loss = function(tensors)
    loss.backward()
    return loss.detach()


def _clear(tensors: Tensors) -> None:
    for leaf in tensors.leaves():
        leaf.grad = None


def error_of(function: Callable, truth: Callable, tensors: Tensors) -> float:
    """The largest relative error of value and gradients on a few tokens."""
    wide = tensors.double()
    expected = _run(truth, wide)
    found = _run(function, tensors)
    errors = [abs(found.item() - expected.item()) / max(abs(expected.item()), 1e-30)]
    for mine, theirs in zip(tensors.leaves(), wide.leaves(), strict=True):
        difference = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        errors.append(difference.item())
    _clear(tensors)
    return max(errors) if all(e == e for e in errors) else float("nan")


def run_case(case: FormCase, device: torch.device, budget: Budget) -> list[FormRecord]:
    fields = {"case": case.name, **asdict(case)}
    few = make_tensors(case, device, min(CHECKED_TOKENS, case.tokens))
    tensors = make_tensors(case, device, case.tokens)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in tensors.leaves())
    runs, peaks, errors, records = {}, {}, {}, []
    for provider in PROVIDERS:
        if case.form not in provider.forms:
            continue
        try:
            function = provider.build(case, device)
            error = error_of(function, provider.truth or case.truth(), few)
            if not error <= ROUNDED_CHOICE.get((case.form, case.dtype), TOLERANCE[case.dtype]):
                raise ValueError(f"wrong: relative error {error:.2e}")
            _run(function, tensors)  # warm
            _clear(tensors)
            peaks[provider.name] = peak_above_inputs(lambda f=function: _run(f, tensors), device)
            _clear(tensors)
        except Exception as problem:  # a rival may fail in any way, which is a result too
            skipped = isinstance(problem, Skipped)
            reason = str(problem) if skipped else f"{type(problem).__name__}: {problem}"
            records.append(
                FormRecord(
                    **fields, provider=provider.name, label=provider.label,
                    status=SKIPPED if skipped else FAILED, reason=reason.partition("\n")[0],
                )
            )  # fmt: skip
            continue
        errors[provider.name] = error
        runs[provider.name] = lambda f=function: _run(f, tensors)
    n_products = case.n_products
    if n_products:
        runs[PRODUCTS] = products(case, tensors)
    times = interleaved(runs, lambda: _clear(tensors), device, budget)
    baseline, alone = times.get(EAGER), times.get(PRODUCTS)
    labels = {p.name: p.label for p in PROVIDERS} | {PRODUCTS: f"{n_products} products alone"}

    def record(name: str, its_times: Times) -> FormRecord:
        peak = peaks.get(name)
        return FormRecord(
            **fields, provider=name, label=labels[name], **asdict(its_times),
            times_eager=baseline and baseline.median_ms / its_times.median_ms,
            times_products=alone and its_times.median_ms / alone.median_ms,
            n_products=n_products or None, peak_bytes=peak,
            above_gradients_bytes=None if peak is None else peak - gradients,
            error=errors.get(name),
        )  # fmt: skip

    return [record(name, its_times) for name, its_times in times.items()] + records


def table_of(records: Sequence[FormRecord]) -> Table:
    first = records[0]

    def row(r: FormRecord) -> list[str]:
        if not r.measured:
            return [r.label, r.status, *[""] * 5]
        return [
            f"[bold]{r.label}[/bold]" if r.provider == OURS else r.label,
            number(r.median_ms),
            f"{number(r.low_ms)}-{number(r.high_ms)}",
            number(r.times_eager, "x"),
            number(r.times_products, "x"),
            mebibytes(r.peak_bytes),
            mebibytes(r.above_gradients_bytes),
        ]

    header = ["provider", "ms", "20-80%", "vs eager", "of products", "MiB", "less grads"]
    caption = "MiB: peak above the inputs; less grads: without the gradients"
    return make_table(first.case, header, [row(r) for r in records], caption)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forms", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, short rounds")
    parser.add_argument("--forms", nargs="+", help="only these forms, such as linear topk tokens")
    parser.add_argument("--seconds", type=float, help=f"of a case's rounds ({BUDGET.seconds:g})")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the records go")
    add_device_argument(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where ours failed its check."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = options.device
    cases = CASES_CPU if device.type == "cpu" else CASES_GPU
    cases = [c for c in cases if not options.forms or c.form in options.forms]
    if options.quick:
        cases = [c.smaller() for c in cases]
    budget = QUICK_BUDGET if options.quick else BUDGET
    budget = replace(budget, seconds=options.seconds or budget.seconds)
    facts = describe(device, arguments, "benchmarks.forms")
    console = make_console()
    console.print(machine_line(facts))
    records: list[FormRecord] = []
    for case in cases:
        new = run_case(case, device, budget)
        console.print(table_of(new))
        for line in left_out(new):
            console.print(line, markup=False)
        records += new
        if options.json:
            save(options.json, records, facts)  # as far as it came
    name = device_name(options.device).lower().replace(" ", "-")
    default = RESULTS / ("forms-cpu.json" if device.type == "cpu" else f"forms-gpu-{name}.json")
    partial = options.quick or options.forms or options.seconds
    path = options.json or (None if partial else default)
    if path:
        save(path, records, facts)
        console.print(f"records: {path}")
    return int(any(r.status == FAILED and r.provider == OURS for r in records))
