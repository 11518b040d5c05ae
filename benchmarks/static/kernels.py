"""What every kernel costs, counted in its compiled code: one row a launch."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from distill_ops.kernels import reduction
from distill_ops.kernels.launch import padded
from distill_ops.kernels.sweeps import PEELED

from distill_ops.analysis import amd, aot, forms, sass
from distill_ops.analysis.forms import Counts, Form
from distill_ops.divergences import BUILT_IN, Divergence

TRAIN, ODD, EVEN, EVAL, BACKWARD, HARD = (
    "train", "odd vocabulary", "even vocabulary", "no gradient", "gradient in backward", "hard label",
)  # fmt: skip
FORMS = {
    TRAIN: Form(128256),
    ODD: Form(50257),  # GPT-2's: rows begin at odd addresses
    EVEN: Form(50304),  # its neighbour, which the odd one is compared with
    EVAL: Form(128256, gradient="none"),
    BACKWARD: Form(128256, gradient="backward"),
    HARD: Form(128256, hard_label_weight=0.5),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """A launch's counts; those "an element" are of one column of a row, over all sweeps.

    ``guarded_instructions``: of the loops that a row with infinities takes after its first fast
    sweep. ``row_instructions``: with the partial tiles at a row's ends, without its reductions.
    ``padding``: columns of a row's tiles over its columns. ``narrow``: accesses of less than 16 bytes
    in the fast loops. ``barriers``: barriers, shuffles and shared memory in the loops over tiles.
    ``stack`` and ``shared`` are bytes; spilled registers are part of the stack.
    """

    kernel: str
    target: str
    registers: int
    stack: int
    shared: int
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
    narrow: int | None = None
    barriers: int | None = None


def built_in() -> dict[str, Divergence]:
    """The package's divergences with their default parameters, by name."""
    return {name: divergence() for name, divergence in BUILT_IN.items()}


def form(name: str, dtype: str) -> Form:
    """A form in a dtype; float16 never makes its gradient in the forward."""
    logits = DTYPES[dtype]
    found = replace(FORMS[name], student_dtype=logits, teacher_dtype=logits)
    if dtype == "float16" and found.gradient == "forward":
        found = replace(found, gradient="backward")
    return found


def selected(quick: bool) -> list[tuple[str, str]]:
    """The forms to compile, each with a dtype."""
    if quick:
        return [(TRAIN, "bfloat16"), (ODD, "bfloat16")]
    every = [(name, dtype) for dtype in DTYPES for name in FORMS]
    # the even neighbour is for one comparison; float16 trains as BACKWARD says
    left_out = {(EVEN, "float16"), (EVEN, "float32"), (TRAIN, "float16")}
    return [pair for pair in every if pair not in left_out]


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


def dense_row(launch: aot.Launch, target: aot.Target, counts: Counts, **labels: str | None) -> Row:
    """The counts of one launch of the dense kernel as a row."""
    arguments = launch.arguments
    tile = arguments["LANES"] * arguments["WIDTH"]
    fast = counts.fast()
    floats = None
    if target.backend == "cuda":
        floats = sum(_floats(loop) / counts.columns(loop) for loop in fast.values())
    return Row(
        "dense",
        target.name,
        **asdict(counts.usage),
        num_warps=arguments["num_warps"],
        programs=launch.grid[0],
        **labels,
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
        narrow=sum(loop.narrow_accesses for loop in fast.values()),
        barriers=sum(loop.barriers for loops in counts.sweeps.values() for loop in loops),
    )


def form_rows(
    divergence: Divergence, name: str, dtype: str, target: aot.Target
) -> tuple[list[aot.Launch], list[Row]]:
    """The launches of one form and their counts."""
    launches = form(name, dtype).launches(divergence, target)
    made_in = [None] if len(launches) == 1 else ["forward", "backward"]
    labels = {"divergence": divergence.name, "form": name, "dtype": dtype}
    rows = [
        dense_row(launch, target, count(launch, target), **labels, made_in=which)
        for launch, which in zip(launches, made_in, strict=True)
    ]
    return launches, rows


def _calls_over_tokens() -> Iterator[Callable[[], object]]:
    """The launchers of ``reduction.py`` as the operators call them."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    losses = empty(8192)
    labels, mask = empty(8192, dtype=torch.int64), empty(8192, dtype=torch.bool)
    yield lambda: reduction.token_weights(mask, labels, -100)
    yield lambda: reduction.total(losses, empty(2, 8192), losses, empty())
    for dtype in DTYPES.values():
        yield lambda dtype=dtype: reduction.scale_(empty(8192, 32000, dtype=dtype), empty())


def token_rows(target: aot.Target) -> list[Row]:
    """The kernels over tokens: registers, stack and shared memory."""
    rows = []
    for call in _calls_over_tokens():
        (launch,) = aot.record(call, target.facts)
        compiled = aot.compile_launch(launch, target)
        cuda = target.backend == "cuda"
        usage = sass.disassemble(compiled)[1] if cuda else sass.amd_usage(compiled)
        pointer = launch.arguments.get("gradient_ptr")
        dtype = None if pointer is None else str(pointer.dtype).removeprefix("torch.")
        name = launch.kernel.fn.__name__.removesuffix("_kernel")
        rows.append(
            Row(
                name, target.name, **asdict(usage), num_warps=launch.arguments["num_warps"],
                programs=launch.grid[0], dtype=dtype,
            )
        )  # fmt: skip
    return rows
