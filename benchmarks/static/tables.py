"""``docs/static-tables.md``, which nobody must read: every count and prediction of a run's JSON."""

from collections.abc import Iterable

from ..core.markdown import markdown_table as table
from ..core.screen import number
from .chips import CHIPS
from .kernels import Row
from .launches import BACKWARD, BF16, DENSE, EVAL, EVEN, HARD_T, ODD, STRIDED, TRAIN
from .limits import KNOWN_MISSES, LIMITS, QUANTITIES, TARGETS_ON
from .page import made_by
from .peers import TARGET as PEERS_TARGET
from .results import CacheRow, Report
from .roofline import Prediction

MINIMAL_BYTES = 6  # bf16: both inputs read once, the gradient written once
Key = tuple[str, ...]  # of a cell: the names of its line and its column


def _grid(
    corner: list[str],
    lines: Iterable[Key],
    columns: Iterable[str],
    cells: dict[Key, str],
) -> list[str]:
    """A table of the cells that there are, dashes for the others; ``corner`` heads the lines' names."""
    columns = list(columns)
    body = [[*line, *(cells.get((*line, column), "–") for column in columns)] for line in lines]
    return table([*corner, *columns], body, n_names=len(corner))


def _against_limit(row: Row, quantity: str) -> str:
    """The count, and the limit that it must keep to."""
    count = getattr(row, QUANTITIES[quantity])
    limit = getattr(LIMITS[row.divergence], quantity)
    text = f"{number(count)} of {limit:g}"
    return text if count <= limit else f"**{text}**"


def _counts(report: Report, target: str) -> list[str]:
    header = [
        "divergence", "instructions", "exp + log", "guarded instructions", "registers", "warps",
        "stack", "spills", "accesses below 16 bytes", "barriers in loops", "limits",
    ]  # fmt: skip
    rows = []
    for row in report.trained(target):
        whose = "design" if LIMITS[row.divergence].by_design else "reached"
        none_wanted = (row.stack, row.spills, row.narrow, row.barriers)
        rows.append(
            [
                row.divergence, *(_against_limit(row, q) for q in QUANTITIES), str(row.registers),
                str(row.num_warps), *(f"**{n}**" if n else "0" for n in none_wanted), whose,
            ]
        )  # fmt: skip
    return [f"### {target}", "", *table(header, rows), ""]


def _misses() -> list[str]:
    if not KNOWN_MISSES:
        return ["Every limit is met.", ""]
    named = [
        f"- {divergence}: {most:g} {quantity}, {getattr(LIMITS[divergence], quantity):g} wanted"
        for (divergence, quantity), most in KNOWN_MISSES.items()
    ]
    lines = ["Known misses, which the tests do not let grow (the larger of the two targets):", ""]
    return [*lines, *named, ""]


def _of_prediction(p: Prediction) -> Key:
    return p.kernel, p.divergence or "–", p.form


def _predictions(report: Report) -> list[str]:
    found = [p for p in report.predictions if p.dtype == BF16]
    found = [p for p in found if p.kernel != "dense" or p.form == TRAIN]
    chips = dict.fromkeys(p.chip for p in found)
    cells = {(*_of_prediction(p), p.chip): f"{number(p.times_copy)}, {p.binds}" for p in found}
    limits = {chip: CHIPS[chip].limits(MINIMAL_BYTES) for chip in chips}
    fits = {
        ("what fits", chip): f"{limit['instructions']:.0f} / {limit['special']:.1f}"
        for chip, limit in limits.items()
    }
    return [
        *_grid(["kernel", "divergence", "form"], dict.fromkeys(map(_of_prediction, found)), chips, cells),
        "",
        "Beside it, how many instructions / exp + log an element the chip has time for while it moves "
        f"{MINIMAL_BYTES} bytes, the least possible:",
        "",
        *_grid([""], [("what fits",)], chips, fits),
        "",
    ]  # fmt: skip


def _bytes(row: CacheRow) -> str:
    moved = row.memory_bytes
    return f"{moved.predicted:.1f} ({moved.low:.1f}-{moved.high:.1f})"


def _cache(report: Report) -> list[str]:
    """A line for each chip and vocabulary; divergences that fare alike share a column."""
    vocabularies = list(dict.fromkeys(row.n_cols for row in report.cache))
    chips = list(dict.fromkeys(row.chip for row in report.cache))
    cells: dict[str, dict[tuple[str, int], CacheRow]] = {}
    for row in report.cache:
        cells.setdefault(row.divergence, {})[row.chip, row.n_cols] = row
    groups: dict[tuple, list[str]] = {}
    for name, of in cells.items():
        groups.setdefault(tuple((r.programs, r.memory_bytes) for r in of.values()), []).append(name)
    columns = [(", ".join(names), cells[names[0]]) for names in groups.values()]
    rows = [
        [
            chip, str(n_cols),
            *(text for _, of in columns for text in (str(of[chip, n_cols].programs), _bytes(of[chip, n_cols]))),
        ]
        for chip in chips
        for n_cols in vocabularies
    ]  # fmt: skip
    header = ["chip", "vocabulary"]
    for names, of in columns:
        requested = next(iter(of.values())).memory_bytes.requested
        header += ["programs", f"{names} (requests {requested:g})"]
    return [*table(header, rows), ""]


def _of_form(row: Row) -> Key:
    return f"{row.form}{f' ({row.made_in} launch)' if row.made_in else ''}", row.dtype


def _forms(report: Report, target: str) -> list[str]:
    """Instructions and exp + log an element of every form and dtype of the dense kernel."""
    rows = [r for r in report.rows if r.kernel == "dense" and r.target == target]
    names = dict.fromkeys(r.divergence for r in rows)
    cells = {(*_of_form(r), r.divergence): f"{r.instructions:.1f} / {r.special:.1f}" for r in rows}
    lines = _grid(["form", "dtype"], dict.fromkeys(map(_of_form, rows)), names, cells)
    return [f"### {target}", "", *lines, ""]


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


def _others(report: Report, target: str) -> list[str]:
    """A line for each launch of the other kernels."""
    rows = [r for r in report.rows if r.kernel != "dense" and r.target == target]
    header = [
        "kernel", "form", "dtype", "divergence", "registers", "stack", "spills", "shared", "warps",
        "load, bytes", "narrow", "barriers", "instructions", "exp + log",
    ]  # fmt: skip
    lines = [
        [
            r.kernel, *_of_form(r), r.divergence or "–",
            *map(str, (r.registers, r.stack, r.spills, r.shared, r.num_warps)),
            *map(_or_dash, (r.load_bytes, r.narrow, r.barriers)),
            *(" + ".join(number(n[i]) for n in r.sweeps.values()) if r.sweeps else "–" for i in (0, 1)),
        ]
        for r in rows
    ]  # fmt: skip
    return [f"### {target}", "", *table(header, lines, n_names=4), ""]


def _peers(report: Report) -> list[str]:
    if not report.peers:
        return ["Not part of this run.", ""]
    header = [
        "package", "kernel", "counted", "reads", "bytes", "instructions", "exp + log", "barriers",
        "registers", "stack",
    ]  # fmt: skip
    counted = [r for r in report.peers if r.skipped is None]
    lines = [
        [f"{r.package} {r.version}", f"`{r.kernel}`", r.date or "now", r.takes, str(r.bytes_an_element),
         number(r.instructions), number(r.special), number(r.barriers), str(r.registers), str(r.stack)]
        for r in counted
    ]  # fmt: skip
    skipped = {(r.package, r.skipped): None for r in report.peers if r.skipped is not None}
    return [
        *(table(header, lines) if counted else []),
        *([""] if counted else []),
        *(f"- {package} left out: {reason}" for package, reason in skipped),
        *([""] if skipped else []),
    ]


def page(report: Report) -> str:
    """The whole page."""
    columns = {name: DENSE[name].n_cols for name in (TRAIN, ODD, EVEN)}
    toolchain = ", ".join(f"{k} {v}" for k, v in report.facts["toolchain"].items())
    lines = [
        "# Static counts: all tables",
        "",
        "What [static-roofline.md](static-roofline.md) is made of. Counts are exact, **times are",
        f"predictions**: no GPU took part. Made by {made_by(report)},",
        f"with {toolchain}, of the kernels' code with the SHA-256 `{report.facts['kernels'][:16]}`.",
        "",
        "## The dense kernel and its limits",
        "",
        f"As its launcher launches it: {BF16} logits, {columns[TRAIN]} columns, gradient made in the",
        "forward. Instructions and exp + log an element of one tensor, over the loops of all sweeps",
        "(`exp + log` counts reciprocals too); “guarded” are the loops that a row with infinities takes",
        "after its first sweep. “24 of 34” is a count and its limit: from the design, or, where that",
        "sets none, what was reached and some slack. A miss is in bold. The tests hold all of it on",
        f"{' and '.join(TARGETS_ON)}.",
        "",
    ]  # fmt: skip
    for target in report.targets():
        lines += _counts(report, target)
    lines += [
        *_misses(),
        "On gfx942 the instructions are those of the vector unit, and a packed one serves two columns.",
        "",
        "## Predicted time",
        "",
        "Times a copy of the same bytes (what is read and written, each once, nominal bandwidth), and",
        "what binds: `memory` (bytes of the cache model below; for the other kernels the least), `issue`",
        f"of instructions, the `exp + log` units, or the `float32` units; {BF16}.",
        "",
        *_predictions(report),
        "## Predicted device-memory traffic",
        "",
        f"Bytes an element by the cache model (`benchmarks/static/cache_model.py`), {BF16}, gradient made",
        "in the forward; in brackets its two ends, and before it the programs that the launcher starts.",
        f"The least possible is {MINIMAL_BYTES}; without a cache it would be what the kernel requests.",
        "",
        *_cache(report),
        "## Every form of the dense kernel",
        "",
        "Instructions / exp + log an element over the fast loops.",
        f"`{ODD}` and `{STRIDED}` have {columns[ODD]} columns and `{EVEN}` {columns[EVEN]}; `{TRAIN}`, and",
        f"what names no vocabulary, {columns[TRAIN]}; `{BACKWARD}` is two launches; `{EVAL}` is the loss",
        f"alone; `{HARD_T}` adds cross-entropy, at temperature 2 the divergence alone.",
        "",
    ]  # fmt: skip
    for target in report.targets():
        lines += _forms(report, target)
    lines += [
        "## The other kernels",
        "",
        "Instructions and exp + log an element, each sweep's; `narrow`: accesses of less than 16 bytes",
        "in loops over whole tiles; `barriers`: with shuffles and shared memory, in loops over tiles.",
        "Of a loop that the assembly breaks up nothing is said. The statistics kernel's forward has the",
        "token kernel's sweep too, which is not listed.",
        "",
    ]  # fmt: skip
    for target in report.targets():
        lines += _others(report, target)
    lines += [
        "## Other packages' kernels",
        "",
        f"The same counts on {PEERS_TARGET}, launched by their own launchers. They are parts of a loss: Liger's",
        "take log-probabilities, which the caller makes in further passes; TRL's and fla's work on tiles of",
        "logits between matrix products. `bytes` are the kernel's own loads and stores an element;",
        "`barriers` counts shuffles and accesses of shared memory too, an element.",
        "",
        *_peers(report),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"
