"""What a compiled kernel costs, read from its machine code.

For NVIDIA the disassembly and the resource usage come from ``nvdisasm`` and ``cuobjdump``, which
ship inside Triton's wheel; for AMD from the assembly's own metadata.
"""

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

from ..kernels.running import rescale


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions by opcode, and the lines of source that they come from."""

    opcodes: Counter
    lines: frozenset[tuple[str, int]] = frozenset()  # file name without folder, line

    def has_lines_of(self, function: triton.JITFunction) -> bool:
        """Whether instructions of this device function are in the loop."""
        text, first = inspect.getsourcelines(function.fn)
        file = Path(inspect.getsourcefile(function.fn)).name
        return any(name == file and first <= n < first + len(text) for name, n in self.lines)

    def count(self, *prefixes: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes))

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def special(self) -> int:
        """exp2, log2 and reciprocals: results of the special-function units."""
        return self.count("MUFU")

    @property
    def barriers(self) -> int:
        return self.count("BAR", "SHFL", "LDS", "STS", "WARPSYNC", "REDUX")

    @property
    def narrow_accesses(self) -> int:
        """Accesses of device memory that move less than 16 bytes a thread."""
        accesses = Counter({o: n for o, n in self.opcodes.items() if o.startswith(("LDG", "STG"))})
        return sum(n for opcode, n in accesses.items() if ".128" not in opcode)

    @property
    def bytes_loaded(self) -> int:
        """From device memory, by a thread in one turn."""
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        loads = [(o.split("."), n) for o, n in self.opcodes.items() if o.startswith("LDG")]
        return sum(n * next((sizes[p] for p in o if p in sizes), 4) for o, n in loads)

    @property
    def guarded(self) -> bool:
        """Whether it compares with infinity or clamps and keeps NaN, as the guarded sweeps do."""
        return self.count("FMNMX.NAN", "FSETP.NEU", "FSETP.NEU.AND") > 0

    @property
    def stores(self) -> int:
        return self.count("STG")


@dataclass(frozen=True)
class Usage:
    """Registers a thread, bytes of stack (spills included) and shared memory, and how often a
    register is spilled or read back."""

    registers: int
    stack: int
    shared: int
    spills: int


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def disassemble(compiled) -> tuple[list[str], Usage]:
    """SASS of a kernel compiled for NVIDIA, a line an instruction, label or place in the source,
    and its usage."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", "-g", str(cubin))
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    stack = found["STACK"] + found["LOCAL"]
    spills = len(re.findall(r"\s(?:LDL|STL)[.\s]", code))
    return code.splitlines(), Usage(found["REG"], stack, found["SHARED"], spills)


class Syntax(NamedTuple):
    """How a line of assembly reads: a label, the file and line of what follows, or an opcode and the
    label to which it may jump."""

    label: str
    place: str
    instruction: str


NVIDIA = Syntax(
    label=r"\s*(\.L_\w+):",
    place=r'\s*//## File "(?:.*/)?([^"/]+)", line (\d+)',
    instruction=r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?=([^\s;]+))(?:BRA.*?(\.L_\w+))?.*;",
)


def innermost_loops(
    code: list[str], syntax: Syntax = NVIDIA, kind: type[Loop] = Loop
) -> list[Loop]:
    """Loops that hold no other loop, in program order: from a label to a jump back to it."""
    opcodes: list[str] = []
    sources: list[tuple[str, int]] = []  # the instructions' places
    source = ("", 0)
    labels: dict[str, int] = {}  # before which instruction each stands
    jumps: list[tuple[int, str]] = []
    for line in code:
        if label := re.match(syntax.label, line):
            labels[label[1]] = len(opcodes)
        elif place := re.match(syntax.place, line):
            source = (place[1], int(place[2]))
        elif instruction := re.match(syntax.instruction, line):
            opcode, target = instruction.groups()
            if target:
                jumps.append((len(opcodes), target))
            opcodes.append(opcode)
            sources.append(source)
    spans = {(labels[label], at) for at, label in jumps if labels.get(label, at + 1) <= at}
    inner = [
        (first, last)
        for first, last in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    return [
        kind(Counter(opcodes[first : last + 1]), frozenset(sources[first : last + 1]))
        for first, last in sorted(inner)
    ]


def amd_usage(compiled) -> Usage:
    """Usage of a kernel compiled for AMD; spills to memory are part of the private segment."""
    text = compiled.asm["amdgcn"]
    names = (
        "vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size", "vgpr_spill_count",
    )  # fmt: skip
    return Usage(*(int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names))


def sweeps(loops: list[Loop]) -> dict[str, list[Loop]]:
    """The loops over tiles by sweep, each list from the fast form to the guarded one: the last
    sweep stores, and the first one alone rescales a running sum."""
    found: dict[str, list[Loop]] = {"normalise": [], "reduce": [], "differentiate": []}
    for loop in loops:
        if loop.count("LDG") == 0 or loop.special == 0:
            continue
        if loop.stores:
            found["differentiate"].append(loop)
        elif loop.has_lines_of(rescale):
            found["normalise"].append(loop)
        else:
            found["reduce"].append(loop)
    cost = lambda loop: (loop.guarded, loop.instructions / loop.bytes_loaded)
    return {name: sorted(found[name], key=cost) for name in found}
