"""What a compiled launch costs: registers, stack, and the instructions of its loops, as one row."""

import re
from dataclasses import asdict, dataclass, replace

from distill_ops.kernels.launch import padded
from distill_ops.kernels.sweeps import PEELED

from distill_ops.analysis import amd, aot, forms, sass
from distill_ops.analysis.forms import Counts

from .launches import Entry, launches

# tensors [tokens, vocab] that a kernel reads and writes a column
READS = {
    "topk": ("student_ptr",),
    "token": ("logits_ptr",),
    "gather": ("logits_ptr",),
    "statistics": ("student_ptr", "teacher_ptr"),
    "metrics": ("student_ptr", "teacher_ptr"),
    "normalise": ("student_ptr", "teacher_ptr"),
    "reduce": ("student_ptr", "teacher_ptr"),
    "pair": ("student_ptr", "teacher_ptr"),
    "pair_sums": ("student_ptr", "teacher_ptr"),
    "topk_normalise": ("student_ptr",),
    "topk_differentiate": ("student_ptr",),
    "finish": ("product_ptr",),
    "softcap_gradient": ("gradient_ptr", "logits_ptr"),
    "scale": ("gradient_ptr",),
}
WRITES = {"finish": "logits_ptr"}  # the others write "gradient_ptr", if any
READ_ONLY = ("metrics", "gather", "normalise", "reduce", "pair", "pair_sums", "topk_normalise")
BITMAP = ("LDG.E.U8", "LDG.E.S8", "global_load_ubyte", "global_load_sbyte", "buffer_load_ubyte")


@dataclass(frozen=True)
class Row:
    """A launch's counts; those "an element" are of one column of a row, over all sweeps.

    ``guarded_instructions``: of the loops that a row with infinities takes after its first fast
    sweep. ``row_instructions``: with the partial tiles at a row's ends, without its reductions.
    ``padding``: columns of a row's tiles over its columns. ``load_bytes``: the widest load of the
    fast loops, by a thread; ``narrow``: their accesses of less than 16 bytes, without the top-k
    kernel's bitmap. ``barriers``: barriers, shuffles and shared memory in the loops over tiles.
    ``moved``: bytes an element, every tensor read or written once. ``stack`` and ``shared`` are
    bytes; spilled registers are part of the stack, and ``spills`` counts how often they move.
    """

    kernel: str
    target: str
    registers: int
    stack: int
    shared: int
    spills: int
    num_warps: int
    programs: int
    divergence: str | None = None
    form: str | None = None
    dtype: str | None = None
    made_in: str | None = None  # which launch of a form with two: "forward" or "backward"
    n_cols: int | None = None
    sweeps: dict[str, list[float]] | None = None  # name: instructions and exp + log an element
    instructions: float | None = None
    special: float | None = None
    floats: float | None = None
    guarded_instructions: float | None = None
    row_instructions: float | None = None
    padding: float | None = None
    load_bytes: int | None = None
    narrow: int | None = None
    barriers: int | None = None
    moved: float | None = None

    @property
    def entry(self) -> Entry:
        """The line of the matrix that it is counted for."""
        return Entry(self.kernel, self.form, self.dtype, self.divergence)


def _floats(loop: sass.Loop) -> int:
    """float32 additions, multiplications and multiply-adds; a packed one is two."""
    return loop.count("FADD", "FMUL", "FFMA") + loop.count("FADD2", "FMUL2", "FFMA2")


def _row_instructions(counts: Counts, launch: aot.Launch, target: aot.Target) -> float:
    """Instructions an element of a whole row.

    A partial tile costs what its loop says; where it is straight-line code (and on AMD, where it is a
    branch a column) it is taken as a whole one."""
    arguments = launch.arguments
    n_cols, tile = arguments["n_cols"], arguments["LANES"] * arguments["WIDTH"]
    n_tiles = padded(n_cols, tile) // tile
    peeled = arguments["ENDS"] == PEELED.value
    n_whole = max(0, n_cols // tile - peeled)
    total = 0.0
    for name, fast in counts.fast().items():
        ends = [loop for loop in counts.sweeps[name] if loop.narrow_accesses and not loop.guarded]
        if target.backend != "cuda":
            ends = []
        for loop, times in ((fast, n_whole), ([*ends, fast][0], n_tiles - n_whole)):
            total += times * loop.instructions / counts.columns(loop)
    return total * tile / n_cols


def _guarded_instructions(counts: Counts) -> float:
    """Of the guarded loops over whole tiles, one a sweep."""
    total = 0.0
    for loops in counts.sweeps.values():
        guarded = [loop for loop in loops if loop.guarded and not loop.narrow_accesses]
        total += sum(loop.instructions / counts.columns(loop) for loop in guarded[:1])
    return total


def count(launch: aot.Launch, target: aot.Target) -> Counts:
    """Compile a launch of the dense kernel and count its loops."""
    return (forms.count if target.backend == "cuda" else amd.count)(launch, target)


def _wide_loads(loop: sass.Loop) -> int:
    """Loads of 16 bytes."""
    loads = {
        o: n for o, n in loop.opcodes.items() if o.startswith(("LDG", "global_load", "buffer_load"))
    }
    return sum(n for o, n in loads.items() if ".128" in o or o.endswith("_dwordx4"))


def dense_row(entry: Entry, launch: aot.Launch, target: aot.Target, made_in: str | None) -> Row:
    """The counts of one launch of the dense kernel."""
    arguments = launch.arguments
    counts = count(launch, target)
    tile = arguments["LANES"] * arguments["WIDTH"]
    fast = counts.fast()
    floats = None
    if target.backend == "cuda":
        floats = sum(_floats(loop) / counts.columns(loop) for loop in fast.values())
    return Row(
        **asdict(entry),
        **asdict(counts.usage),
        target=target.name,
        made_in=made_in,
        num_warps=arguments["num_warps"],
        programs=launch.grid[0],
        n_cols=arguments["n_cols"],
        sweeps={
            name: [count / counts.columns(loop) for count in (loop.instructions, loop.special)]
            for name, loop in fast.items()
        },
        instructions=counts.instructions(),
        special=counts.special(),
        floats=floats,
        guarded_instructions=_guarded_instructions(counts),
        row_instructions=_row_instructions(counts, launch, target),
        padding=padded(arguments["n_cols"], tile) / arguments["n_cols"],
        load_bytes=max(16 if _wide_loads(x) else 0 for x in fast.values()),
        narrow=sum(loop.narrow_accesses for loop in fast.values()),
        barriers=sum(loop.barriers for loops in counts.sweeps.values() for loop in loops),
    )


def _compiled(
    launch: aot.Launch, target: aot.Target
) -> tuple[list[sass.Loop], sass.Usage, int | None]:
    """The innermost loops of a compiled launch, its usage, and, for AMD, its widest load's bytes."""
    compiled = aot.compile_launch(launch, target)
    if target.backend != "cuda":
        text = compiled.asm["amdgcn"]
        widest = max(
            (amd.LOADED.get(width, 0) for width in re.findall(r"_load_(\w+)", text)), default=0
        )
        return amd.innermost_loops(text), sass.amd_usage(compiled), widest
    code, usage = sass.disassemble(compiled)
    return sass.innermost_loops(code), usage, None


def _over_tiles(kernel: str, loops: list[sass.Loop]) -> dict[str, list[sass.Loop]]:
    """The loops over tiles by sweep, the fast one first; a head's or the scale's are one sweep."""
    if kernel in ("normalise", "reduce"):  # the first has a guarded sweep that sums as the second
        return {
            name: found for name, found in sass.sweeps(loops).items() if found and name == kernel
        }
    if kernel in ("topk", "token", "gather", "statistics", "metrics"):
        return {name: found for name, found in sass.sweeps(loops).items() if found}
    found = [loop for loop in loops if loop.bytes_loaded and loop.instructions]
    found.sort(key=lambda loop: loop.narrow_accesses / loop.bytes_loaded)
    return {"loop": found} if found else {}


def _element_size(launch: aot.Launch, name: str) -> int:
    return launch.arguments[name].element_size()


def other_row(entry: Entry, launch: aot.Launch, target: aot.Target, made_in: str | None) -> Row:
    """The counts of one launch of any kernel but the dense one."""
    loops, usage, widest = _compiled(launch, target)
    arguments = launch.arguments
    found = _over_tiles(entry.kernel, loops)
    if not arguments.get("WRITE_GRADIENT", True):  # what stores is the loop over rows, broken up
        found.pop("differentiate", None)
    plain = Row(
        **asdict(entry), **asdict(usage), target=target.name, made_in=made_in,
        num_warps=arguments["num_warps"], programs=launch.grid[0], n_cols=arguments.get("n_cols"),
    )  # fmt: skip
    if entry.kernel not in READS:
        return plain
    if not found:  # no loop over tiles, or one that AMD's assembly breaks up
        return replace(plain, load_bytes=widest)
    read = sum(_element_size(launch, name) for name in READS[entry.kernel])
    fast = {name: sweep[0] for name, sweep in found.items()}
    sweeps = {}
    for name, loop in fast.items():
        columns = (16 * _wide_loads(loop) or loop.bytes_loaded) / read
        sweeps[name] = [loop.instructions / columns, loop.special / columns]
    writes = arguments.get("WRITE_GRADIENT", entry.kernel not in READ_ONLY)
    written = _element_size(launch, WRITES.get(entry.kernel, "gradient_ptr")) if writes else 0
    # its forward has the token kernel's sweep too, so that the loops of one row are not known
    whole = (entry.kernel, made_in) != ("statistics", "forward")
    return replace(
        plain,
        sweeps=sweeps,
        instructions=sum(n for n, _ in sweeps.values()) if whole else None,
        special=sum(n for _, n in sweeps.values()) if whole else None,
        load_bytes=max(
            16 if _wide_loads(x) else x.bytes_loaded // x.count("LDG") for x in fast.values()
        ),
        narrow=sum(x.narrow_accesses - x.count(*BITMAP) for x in fast.values()),
        barriers=sum(x.barriers for sweep in found.values() for x in sweep),
        moved=float(read + written),
    )


def entry_rows(entry: Entry, target: aot.Target) -> tuple[list[aot.Launch], list[Row]]:
    """The launches of one line of the matrix and their counts."""
    found = launches(entry, target)
    made_in = [None] if len(found) == 1 else ["forward", "backward"]
    make = dense_row if entry.kernel == "dense" else other_row
    each = zip(found, made_in, strict=True)
    return found, [make(entry, launch, target, which) for launch, which in each]
