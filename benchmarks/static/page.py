"""``docs/static-roofline.md`` out of a run's JSON: nothing on the page is typed."""

from collections.abc import Iterable, Sequence

from ..core.screen import number
from .chips import CHIPS
from .kernels import BACKWARD, EVAL, EVEN, FORMS, HARD, ODD, TRAIN, Row
from .limits import KNOWN_MISSES, LIMITS, QUANTITIES, TARGETS_ON
from .peers import TARGET as PEERS_TARGET
from .results import BF16, CacheRow, Report
from .roofline import Prediction

PLOT = "static-roofline.png"
VERSIONS = ("python", "torch", "triton", "distill_ops")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown, the first column left and the others right."""
    dashes = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, dashes, *rows)]


def _against_limit(row: Row, quantity: str) -> str:
    """The count, and the limit that it must keep to."""
    count = getattr(row, QUANTITIES[quantity])
    limit = getattr(LIMITS[row.divergence], quantity)
    text = f"{number(count)} of {limit:g}"
    return text if count <= limit else f"**{text}**"


def _counts(report: Report, target: str) -> list[str]:
    header = [
        "divergence", "instructions", "exp + log", "guarded instructions", "registers", "warps",
        "stack", "accesses below 16 bytes", "barriers in loops", "limits",
    ]  # fmt: skip
    rows = []
    for row in report.trained(target):
        limits = [QUANTITIES[q] for q in QUANTITIES]
        has = row.divergence in LIMITS
        counts = [
            _against_limit(row, q) if has else number(getattr(row, field))
            for q, field in zip(QUANTITIES, limits, strict=True)
        ]
        whose = "–" if not has else "design" if LIMITS[row.divergence].by_design else "reached"
        none_wanted = [f"**{n}**" if n else "0" for n in (row.stack, row.narrow, row.barriers)]
        plain = (str(row.registers), str(row.num_warps), *none_wanted)
        rows.append([row.divergence, *counts, *plain, whose])
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


def _cell(prediction: Prediction | None) -> str:
    if prediction is None:
        return "–"
    return f"{number(prediction.times_copy)}, {prediction.binds}"


def _predictions(report: Report) -> list[str]:
    names = list(dict.fromkeys(p.divergence for p in report.predictions))
    chips = list(dict.fromkeys(p.chip for p in report.predictions))
    rows = [[name, *(_cell(report.predicted(name, chip)) for chip in chips)] for name in names]
    limits = [
        [
            f"what fits into {n_bytes} bytes",
            *(
                f"{limit['instructions']:.0f} / {limit['special']:.1f}"
                for limit in (CHIPS[chip].limits(n_bytes) for chip in chips)
            ),
        ]
        for n_bytes in (6,)
    ]
    return [
        *table(["divergence", *chips], rows), "",
        "Beside it, how many instructions / exp + log an element the chip has time for while it moves "
        "the least possible:", "", *table(["", *chips], limits), "",
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


def _forms(report: Report, target: str) -> list[str]:
    """Instructions and exp + log an element of every form and dtype."""
    rows = [r for r in report.rows if r.kernel == "dense" and r.target == target]
    names = list(dict.fromkeys(r.divergence for r in rows))
    keys = list(dict.fromkeys((r.form, r.dtype, r.made_in) for r in rows))
    found = {(r.divergence, r.form, r.dtype, r.made_in): r for r in rows}

    def cell(name: str, key: tuple) -> str:
        row = found.get((name, *key))
        return "–" if row is None else f"{row.instructions:.1f} / {row.special:.1f}"

    lines = [
        [f"{form}{f' ({made_in} launch)' if made_in else ''}", dtype]
        + [cell(name, (form, dtype, made_in)) for name in names]
        for form, dtype, made_in in keys
    ]
    most = max(row.registers for row in rows)
    stack = max(row.stack for row in rows)
    return [
        f"### {target}", "", *table(["form", "dtype", *names], lines), "",
        f"At most {most} registers; the largest stack of any of them is {stack} bytes.", "",
    ]  # fmt: skip


def _over_tokens(report: Report) -> list[str]:
    rows = [r for r in report.rows if r.kernel != "dense"]
    header = ["kernel", "dtype", "target", "registers", "stack", "shared memory, bytes", "warps"]
    lines = [
        [r.kernel, r.dtype or "–", r.target, *map(str, (r.registers, r.stack, r.shared, r.num_warps))]
        for r in rows
    ]  # fmt: skip
    return [*table(header, lines), ""]


def _peers(report: Report) -> list[str]:
    if not report.peers:
        return ["Not part of this run.", ""]
    header = [
        "package", "kernel", "reads", "bytes", "instructions", "exp + log", "barriers",
        "registers", "stack",
    ]  # fmt: skip
    counted = [r for r in report.peers if r.skipped is None]
    lines = [
        [f"{r.package} {r.version}", f"`{r.kernel}`", r.takes, str(r.bytes_an_element),
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
    facts = report.facts
    versions = ", ".join(f"{name} {facts[name]}" for name in VERSIONS if facts.get(name))
    columns = {name: FORMS[name].n_cols for name in (TRAIN, ODD, EVEN)}
    lines = [
        "# Static roofline",
        "",
        "What the kernels cost, counted in their compiled code, and what follows for GPUs that were",
        "not there. **The times on this page are predictions**; no GPU took part. The page is made by",
        f"`{facts['command']}` ({versions}; commit {facts.get('commit')}, {facts['date'][:10]}).",
        "",
        f"![roofline]({PLOT})",
        "",
        "## Counts and their limits",
        "",
        f"The dense kernel as its launcher launches it: {BF16} logits, {columns[TRAIN]} columns, gradient",
        "made in the forward. Instructions and exp + log an element of one tensor, over the loops of all",
        "sweeps (`exp + log` counts reciprocals too); “guarded” are the loops that a row with infinities",
        "takes after its first sweep. “24 of 34” is a count and its limit: from the design, or, where",
        "that sets none, what was reached and some slack. A miss is in bold. The tests hold all of it on",
        f"{' and '.join(TARGETS_ON)}.",
        "",
    ]  # fmt: skip
    for target in dict.fromkeys(r.target for r in report.rows):
        lines += _counts(report, target)
    lines += [
        *_misses(),
        "On gfx942 the instructions are those of the vector unit, and a packed one serves two columns.",
        "",
        "## Predicted time",
        "",
        "Times a copy of the same bytes (both inputs read, the gradient written, nominal bandwidth), and",
        "what binds: `memory` (bytes of the cache model below), `issue` of instructions, the `exp + log`",
        f"units, or the `float32` units; {BF16}, {columns[TRAIN]} columns, gradient made in the forward.",
        "",
        *_predictions(report),
        "The largest of the four, as if they overlapped perfectly at the highest clock. Left out: the",
        "reductions between sweeps, latency, L2's bandwidth (the bytes that a kernel requests, in the",
        "next table, pass through it), power limits, and that a real copy reaches about nine tenths of",
        "the nominal bandwidth.",
        "",
        "## Predicted device-memory traffic",
        "",
        f"Bytes an element by the cache model (`benchmarks/cache_model.py`), {BF16}, gradient made in the",
        "forward; in brackets its two ends, and before it the programs that the launcher starts. The",
        "least possible is 6; without a cache it would be what the kernel requests.",
        "",
        *_cache(report),
        "## Every form",
        "",
        "Instructions / exp + log an element over the fast loops.",
        f"`{ODD}` has {columns[ODD]} columns and `{EVEN}` {columns[EVEN]}, the others {columns[TRAIN]};",
        f"`{BACKWARD}` is two launches; `{EVAL}` is the loss alone; `{HARD}` adds cross-entropy.",
        "",
    ]  # fmt: skip
    for target in dict.fromkeys(r.target for r in report.rows):
        lines += _forms(report, target)
    lines += [
        "## Kernels over tokens",
        "",
        *_over_tokens(report),
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
