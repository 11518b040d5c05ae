"""A run of ``python -m benchmarks.static`` as JSON, an item a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .cache_model import Traffic
from .kernels import Row
from .launches import BF16, TRAIN
from .peers import PeerRow
from .roofline import Prediction

DIGITS = 3


@dataclass(frozen=True)
class CacheRow:
    """The cache model for bf16 logits of one vocabulary, gradient made in the forward."""

    divergence: str
    chip: str
    n_cols: int
    programs: int
    memory_bytes: Traffic


@dataclass(frozen=True)
class Report:
    facts: dict[str, object]
    rows: list[Row]
    predictions: list[Prediction]
    cache: list[CacheRow]
    peers: list[PeerRow]

    def targets(self) -> list[str]:
        return list(dict.fromkeys(row.target for row in self.rows))

    def trained(self, target: str) -> list[Row]:
        """The dense kernel, bf16, gradient in the forward: a row for each divergence."""
        wanted = ("dense", TRAIN, BF16, target)
        return [r for r in self.rows if (r.kernel, r.form, r.dtype, r.target) == wanted]

    def predicted(
        self, divergence: str | None, chip: str, kernel: str = "dense", form: str = TRAIN
    ) -> Prediction | None:
        """Of a form of bf16 logits."""
        wanted = (kernel, divergence, chip, form, BF16)
        for p in self.predictions:
            if (p.kernel, p.divergence, p.chip, p.form, p.dtype) == wanted:
                return p
        return None


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _line(item: object) -> str:
    fields = asdict(item)
    if "memory_bytes" in fields:
        fields["memory_bytes"] = item.memory_bytes.numbers()
    return json.dumps(_rounded(fields), separators=(",", ":"))


def _lines(items: Iterable[object]) -> str:
    return ",\n".join(map(_line, items))


def save(path: Path, report: Report) -> None:
    parts = [f'"facts": {json.dumps(report.facts)}']
    for name in ("rows", "predictions", "cache", "peers"):
        parts.append(f'"{name}": [\n{_lines(getattr(report, name))}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def load(path: Path) -> Report:
    read = json.loads(path.read_text(encoding="utf-8"))

    def with_traffic(kind: type, item: dict) -> object:
        return kind(**{**item, "memory_bytes": Traffic(*item["memory_bytes"])})

    return Report(
        read["facts"],
        [Row(**item) for item in read["rows"]],
        [with_traffic(Prediction, item) for item in read["predictions"]],
        [with_traffic(CacheRow, item) for item in read["cache"]],
        [PeerRow(**item) for item in read["peers"]],
    )
