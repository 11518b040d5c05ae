"""``python -m benchmarks.accuracy``: the numeric rule, for every divergence, dtype and path.

Draws random configurations and prints, for the loss (with a gradient and alone) and the gradient,
the median and the worst ratio of our error to that of eager PyTorch, as ``numeric_rule.py`` defines
it, and of the total variation how many undecided signs are not float64's; the exit status is 1 where
one is too large. Without a GPU the Triton kernels run in Triton's interpreter, in processes of their
own.
"""

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from ..core.machine import RESULTS, describe, machine_line
from ..core.screen import make_console, make_table, number, progress_bar
from .numeric_rule import (
    DIVERGENCES,
    DOUBTFUL,
    DTYPES,
    FIRST,
    MEDIAN,
    MOST,
    ROWS,
    WORST,
    Measurement,
    Quantities,
    loss_on,
    measure,
    summarise,
)

PATHS = ("torch", "triton")
CONFIGURATIONS = {"ordinary": 200, "peaked": 100}
# the kernels do not keep the rule in nearly one-hot rows, whose losses are below float32's rounding of 1
ROWS_OF = {"torch": tuple(ROWS), "triton": ("ordinary",)}
GPU_WORKERS = 4
GROUP = 25  # configurations a task
RESULT = RESULTS / "accuracy.json"

Key = tuple[str, str, str, str]  # divergence, dtype, path, rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    add("--rows", nargs="+", choices=ROWS, help="all; of the kernels' path, ordinary")
    numbers = ", ".join(f"{number} of {rows} rows" for rows, number in CONFIGURATIONS.items())
    add("--configs", type=int, help=f"configurations of each ({numbers})")
    add("--seed", type=int, default=0, help="seed of the first configuration; the next follow")
    add("--only", type=int, metavar="SEED", help="the configuration of this seed alone, in detail")
    add(
        "--workers",
        type=int,
        metavar="N",
        help=f"processes ({GPU_WORKERS} on a GPU, else one a core)",
    )
    add("--json", type=Path, metavar="FILE", help=f"default of a full run: {RESULT.name}")
    return parser.parse_args(arguments)


def device_of(path: str) -> torch.device:
    return torch.device("cuda" if path == "triton" and torch.cuda.is_available() else "cpu")


def default_workers(path: str) -> int:
    """Each worker on a GPU has a context of its own there, and few keep it busy."""
    return GPU_WORKERS if device_of(path).type == "cuda" else os.cpu_count() or 1


def _quicken_the_interpreter() -> None:
    """Call device functions of kernels as they are: the interpreter patches ``triton.language``
    anew at every call, more than half of its time, though the kernel's launch has done so."""
    from triton.runtime import interpreter

    patched = []

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton.") and not patched:  # Triton's own, on tl.core
            interpreter._patch_lang(self.fn)
            patched.append(True)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def start_worker() -> None:
    torch.set_num_threads(1)
    # of numpy, where a masked lane of the interpreter holds -inf
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _quicken_the_interpreter()


@contextmanager
def workers(path: str, n_workers: int) -> Iterator[Executor]:
    """Fresh processes, since the interpreter is switched on when triton is imported."""
    before = os.environ.get("TRITON_INTERPRET")
    if path == "triton" and device_of(path).type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(n_workers, get_context("spawn"), start_worker) as pool:
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def measure_group(key: Key, seeds: list[int]) -> tuple[Key, list[Measurement]]:
    """What a worker does: some configurations of a divergence, dtype and path."""
    divergence, dtype, path, rows = key
    return key, [
        measure(
            loss_on(path),
            ROWS[rows](seed),
            DIVERGENCES[divergence],
            DTYPES[dtype],
            device_of(path),
        )
        for seed in seeds
    ]


def sweep(
    path: str,
    keys: Sequence[Key],
    seeds: Callable[[Key], Sequence[int]],
    n_workers: int,
    step: Callable[[str], None],
    finished: Callable[[Key, list[Measurement]], None],
) -> dict[Key, list[Measurement]]:
    """The configurations of every key of a path, in the order of the keys and the seeds.

    ``step`` is told of every task done, ``finished`` of every key."""
    keys = [key for key in keys if key[2] == path]
    found = {key: [] for key in keys}
    with workers(path, n_workers) as pool:
        tasks = [
            pool.submit(measure_group, key, list(seeds(key)[i : i + GROUP]))
            for key in keys
            for i in range(0, len(seeds(key)), GROUP)
        ]
        for task in as_completed(tasks):
            key, measurements = task.result()
            found[key] += measurements
            step(" ".join(key))
            if len(found[key]) == len(seeds(key)):
                found[key].sort(key=lambda m: m.seed)
                finished(key, found[key])
    return found


class ChangedSigns(NamedTuple):
    """Undecided signs of the total variation that are not float64's."""

    ours: int
    eager: int

    @property
    def passed(self) -> bool:
        return self.ours <= WORST * self.eager


def changed_signs(measurements: list[Measurement]) -> ChangedSigns:
    return ChangedSigns(*map(sum, zip(*(m.changed_signs for m in measurements), strict=True)))


def passed(measurements: list[Measurement]) -> bool:
    return all(s.passed for s in (*summarise(measurements).values(), changed_signs(measurements)))


def ratio(value: float, limit: float) -> str:
    text = number(value) if math.isfinite(value) else "inf"
    return text if value <= limit else f"[red]{text}[/red]"


def result_line(key: Key, measurements: list[Measurement]) -> str:
    """What is printed of a key where there is no progress bar."""
    quantities = summarise(measurements)
    ratios = [f"{name} {s.median:.2f} {s.worst:.2f}" for name, s in quantities.items()]
    signs = changed_signs(measurements)
    if any(signs):
        ratios.append(f"changed signs {signs.ours}, eager's {signs.eager}")
    return f"{' '.join(key)}: {', '.join(ratios)}, {'pass' if passed(measurements) else 'fail'}"


def result_table(path: str, measurements: dict[Key, list[Measurement]]) -> Table:
    """Of one path: median and worst ratio of each quantity, the seed of the worst, the verdict."""
    header = ["divergence", "dtype", "rows"]
    for name in ("loss", "alone", "gradient"):
        header += [name, "worst"]
    header += ["at seed", "rule"]
    rows = []
    for (divergence, dtype, _, kind), found in measurements.items():
        quantities = summarise(found)
        row = [divergence.replace(", ", ","), dtype, kind]  # a name stays on one line
        for summary in quantities.values():
            row += [ratio(summary.median, MEDIAN), ratio(summary.worst, WORST)]
        row.append(str(max(quantities.values(), key=lambda s: s.worst).worst_seed))
        row.append("pass" if passed(found) else "[red]fail[/red]")
        rows.append(row)
    return make_table(
        f"Path {path}: our error beyond one unit over eager's",
        header,
        rows,
        f"median and worst, at most {MEDIAN} and {WORST}; alone: the loss without a gradient",
    )


def records(measurements: dict[Key, list[Measurement]]) -> list[dict[str, object]]:
    """What the JSON holds of each divergence, dtype and path."""

    def finite(value):
        return value if math.isfinite(value) else None  # JSON has no infinity

    return [
        {
            "divergence": divergence,
            "dtype": dtype,
            "path": path,
            "rows": rows,
            "device": device_of(path).type,
            "configurations": len(found),
            "tokens": sum(m.tokens for m in found),
            "passed": passed(found),
            "changed_signs": changed_signs(found)._asdict(),
            "ratios": {
                name: {k: finite(v) for k, v in asdict(summary).items()}
                for name, summary in summarise(found).items()
            },
        }
        for (divergence, dtype, path, rows), found in measurements.items()
    ]


def save(path: Path, rows: list[dict[str, object]], facts: dict[str, object]) -> None:
    rule = {
        "median": MEDIAN,
        "worst": WORST,
        "first_tokens": FIRST,
        "most_tokens": MOST,
        "doubtful": DOUBTFUL,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, "rule": rule, "records": rows}, indent=1, allow_nan=False)
    path.write_text(text + "\n")


def only_table(measurements: dict[Key, list[Measurement]]) -> Table:
    """The errors of one configuration, each quantity in a row."""
    rows = [
        [
            *key, str(m.tokens), name, *(f"{math.sqrt(x):.2e}" for x in (s.ours, s.eager, s.unit)),
            ratio(s.ratio, WORST),
        ]
        for key, (m,) in measurements.items()
        for name, s in zip(Quantities._fields, m.squares, strict=True)
    ]  # fmt: skip
    header = ["divergence", "dtype", "path", "rows", "tokens", "", "ours", "eager", "unit", "ratio"]
    return make_table("Errors by norm over all tokens", header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    keys = [
        (divergence, dtype, path, rows)
        for path in dict.fromkeys(options.paths)
        for divergence in dict.fromkeys(options.divergences)
        for dtype in dict.fromkeys(options.dtypes)
        for rows in dict.fromkeys(options.rows or ROWS_OF[path])
    ]
    facts = describe(device_of("triton"), arguments, "benchmarks.accuracy")
    facts["numpy"] = version("numpy")  # the interpreter's arithmetic
    console = make_console()
    console.print(machine_line(facts))
    if options.only is not None:
        for rows in options.rows or ROWS:
            for name, value in ROWS[rows](options.only)._asdict().items():
                console.print(f"{name}: {value}")
    measurements: dict[Key, list[Measurement]] = {}

    def seeds(key: Key) -> range:
        if options.only is not None:
            return range(options.only, options.only + 1)
        return range(options.seed, options.seed + (options.configs or CONFIGURATIONS[key[-1]]))

    def finished(key: Key, found: list[Measurement]) -> None:
        if not console.is_terminal:
            console.print(result_line(key, found), markup=False, soft_wrap=True)

    n_tasks = sum(math.ceil(len(seeds(key)) / GROUP) for key in keys)
    with progress_bar(console, n_tasks) as step:
        for path in dict.fromkeys(options.paths):
            n_workers = options.workers or default_workers(path)
            of_path = sweep(path, keys, seeds, n_workers, step, finished)
            measurements |= of_path
            if options.only is not None:
                console.print(only_table(of_path))
            else:
                console.print(result_table(path, of_path))
    if options.only is not None:
        return 0
    rows = records(measurements)
    of_paths = sum(len(ROWS_OF[path]) for path in PATHS)
    full = len(keys) == len(DIVERGENCES) * len(DTYPES) * of_paths
    full &= all(len(found) >= CONFIGURATIONS[key[-1]] for key, found in measurements.items())
    output = options.json or (RESULT if full else None)
    if output:
        save(output, rows, facts)
        console.print(f"records: {output}")
    n_passed = sum(row["passed"] for row in rows)
    console.print(f"{n_passed} of {len(rows)} pass")
    return int(n_passed < len(rows))
