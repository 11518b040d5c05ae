"""``python -m benchmarks.static_forms``: what the token, statistics and top-k kernels cost, counted
in their machine code without a GPU, and which limit binds. Writes a JSON and a page.

Predictions, not measurements; the dense kernel has ``python -m benchmarks.static``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill_ops import ForwardKL, JensenShannon, ReverseKL
from distill_ops.analysis import aot, sass
from distill_ops.analysis.forms import statistics_launches, token_launches, topk_launches

from .chips import CHIPS, Chip
from .machine import describe, machine_line
from .records import save
from .report import markdown_table
from .screen import number

RESULTS = Path(__file__).parent / "results" / "static-forms.json"
PAGE = Path(__file__).parents[1] / "docs" / "static-forms.md"
DTYPE = torch.bfloat16
NVIDIA = ("sm_80", "sm_90", "sm_100")
VOCABULARIES = (128256, 50257)
# the most that the design allows of the token kernel, an element a sweep
MOST_TOKEN_INSTRUCTIONS = 12


@dataclass(frozen=True)
class FormRow:
    """A launch; "an element" is one column of a row, over the launch's sweeps.

    ``moved``: bytes of device memory an element, every tensor read or written once."""

    kernel: str
    launch: str
    n_cols: int
    target: str
    registers: int
    stack: int
    sweeps: list[tuple[float, float]] | None = None  # instructions and exp + log an element, each
    narrow: int | None = None  # accesses of less than 16 bytes in the loops over whole tiles
    barriers: int | None = None  # barriers, shuffles and shared memory in the loops
    moved: float = 0.0

    @property
    def instructions(self) -> float:
        return sum(n for n, _ in self.sweeps)

    @property
    def special(self) -> float:
        return sum(n for _, n in self.sweeps)


def whole_tile_loops(loops: list[sass.Loop]) -> list[sass.Loop]:
    """The loops over whole tiles: those of the partial ones, where an odd vocabulary has them, load
    two bytes at a time, and the remainder of an unrolled loop is a shorter copy of it."""
    found = [x for x in loops if x.special and x.bytes_loaded]
    wide = [x for x in found if x.narrow_accesses == 0 or x.count("LDG.E.U8", "LDG.E.S8")]
    longest = {}
    for loop in wide or found:
        key = (loop.stores > 0, loop.count("FMNMX") > 0)
        if key not in longest or loop.bytes_loaded > longest[key].bytes_loaded:
            longest[key] = loop
    return list(longest.values())


def count(
    kernel: str, name: str, launch: aot.Launch, target: aot.Target, inputs: int, moved: float
) -> FormRow:
    """Compile and count one launch; ``inputs`` tensors are read a column."""
    n_cols = launch.arguments["n_cols"]
    compiled = aot.compile_launch(launch, target)
    if target.backend != "cuda":
        usage = sass.amd_usage(compiled)
        return FormRow(kernel, name, n_cols, target.name, usage.registers, usage.stack, moved=moved)
    code, usage = sass.disassemble(compiled)
    loops = whole_tile_loops(sass.innermost_loops(code))
    sweeps = []
    for loop in loops:
        columns = loop.count("LDG.E.128") * 16 / DTYPE.itemsize / inputs
        columns = columns or loop.bytes_loaded / DTYPE.itemsize / inputs
        sweeps.append((loop.instructions / columns, loop.special / columns))
    return FormRow(
        kernel, name, n_cols, target.name, usage.registers, usage.stack, sweeps,
        sum(x.narrow_accesses - x.count("LDG.E.U8", "LDG.E.S8") for x in loops),
        sum(x.barriers for x in loops), moved,
    )  # fmt: skip


def rows_of(target: aot.Target) -> Iterator[FormRow]:
    for n_cols in VOCABULARIES:
        for entropy in (False, True):
            name = "token, with entropy" if entropy else "token"
            forward, backward = token_launches(n_cols, DTYPE, entropy, target)
            yield count(name, "forward", forward, target, 1, 2.0)
            yield count(name, "gradient", backward, target, 1, 4.0)
        for divergence in (ForwardKL(), JensenShannon()):
            (launch,) = topk_launches(divergence, n_cols, 64, DTYPE, target)
            name = f"top-k (64), {divergence.name}"
            yield count(name, "forward with gradient", launch, target, 1, 4.0)
    forward, backward = statistics_launches(ReverseKL(), VOCABULARIES[0], DTYPE, target)
    yield count("statistics, reverse_kl", "gradient", backward, target, 2, 6.0)


def limits_of(row: FormRow, chip: Chip) -> dict[str, float]:
    """Picoseconds an element that each limit alone asks of a launch."""
    return {
        "memory": chip.memory_picoseconds(row.moved),
        "issue": chip.picoseconds(row.instructions / chip.lanes),
        "exp + log": chip.picoseconds(row.special / chip.special),
    }


def binds(row: FormRow, chip_name: str) -> str:
    """The limit that binds on a chip, and the predicted time over that of a copy of the bytes."""
    times = limits_of(row, CHIPS[chip_name])
    name = max(times, key=times.get)
    return f"{name} {times[name] / times['memory']:.2f}"


def page(rows: Sequence[FormRow], facts: dict[str, object]) -> str:
    lines = [
        "# Static counts of the token, statistics and top-k kernels",
        "",
        "Counted in machine code compiled ahead of time for each target, bf16; no GPU was used. "
        "Instructions and exp + log are an element (one column of a row), each sweep's in order. "
        "`of a copy` is a prediction: the binding limit's time over the time that the bytes alone "
        "take at the chip's nominal bandwidth, a second sweep finding the row in cache. In the "
        "statistics kernel only the backward launch is counted here: the forward is the token "
        "kernel's sweep of both rows and the dense kernel's sweeps.",
        "",
    ]
    chips = {"sm_80": ["A100"], "sm_90": ["H100", "H200"], "sm_100": ["B200"]}
    for target in dict.fromkeys(r.target for r in rows):
        of_target = [r for r in rows if r.target == target]
        lines += [f"## {target}", ""]
        names = [c for c in chips.get(target, []) if c in CHIPS]
        header = ["kernel", "launch", "vocabulary", "registers", "stack"]
        if of_target[0].sweeps is not None:
            header += ["instructions", "exp + log", "narrow", "barriers", "bytes"]
            header += [f"{chip}, of a copy" for chip in names]
        table = []
        for r in of_target:
            cells = [r.kernel, r.launch, str(r.n_cols), str(r.registers), str(r.stack)]
            if r.sweeps is not None:
                cells += [
                    " + ".join(number(n) for n, _ in r.sweeps),
                    " + ".join(number(n) for _, n in r.sweeps),
                    str(r.narrow),
                    str(r.barriers),
                    f"{r.moved:g}",
                    *(binds(r, chip) for chip in names),
                ]
            table.append(cells)
        lines += [*markdown_table(header, table, n_names=2), ""]
    lines += [f"`{facts['command']}` with {machine_line(facts)}.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, write the JSON and the page; the exit status is 1 where a loop spills or is too long."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_forms", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    rows = [row for target in aot.TARGETS.values() for row in rows_of(target)]
    facts = describe(torch.device("cpu"), [], "benchmarks.static_forms")
    save(options.json, rows, facts)
    options.page.write_text(page(rows, facts), encoding="utf-8")
    print(options.page.read_text(encoding="utf-8"))
    wrong = [r for r in rows if r.stack]
    wrong += [
        r for r in rows
        if r.kernel.startswith("token") and any(n > MOST_TOKEN_INSTRUCTIONS for n, _ in r.sweeps or [])
    ]  # fmt: skip
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
