"""Records of measurements, and the JSON that holds them: a list, each with the machine and versions."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

OK, SKIPPED, FAILED = "ok", "skipped", "failed"
EAGER, OURS = "eager", "ours"  # providers that every report names


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A provider on a case; where it was not measured, ``reason`` says why."""

    case: str
    loss: str
    tokens: int
    vocab: int
    dtype: str
    provider: str
    label: str
    status: str = OK
    reason: str | None = None
    median_ms: float | None = None
    low_ms: float | None = None  # 20% and 80% quantiles
    high_ms: float | None = None
    rounds: int | None = None
    peak_bytes: int | None = None  # above the inputs, gradients included

    @property
    def measured(self) -> bool:
        return self.status == OK

    @property
    def shape(self) -> str:
        """Sizes and dtype, as tables name a case."""
        return f"[{self.tokens}, {self.vocab}] {self.dtype}"


def find(records: Iterable[Measured], **wanted: object) -> Measured | None:
    """The first measured record with these fields."""
    for record in records:
        if record.measured and all(getattr(record, k) == v for k, v in wanted.items()):
            return record
    return None


def group_by_case(records: Iterable[Measured]) -> dict[str, list]:
    groups: dict[str, list] = {}
    for record in records:
        groups.setdefault(record.case, []).append(record)
    return groups


def save(path: Path, records: Iterable[object], facts: dict[str, object]) -> None:
    """Records of any dataclass, each with the facts of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**asdict(r), **facts} for r in records], indent=1) + "\n")


def load(path: Path, kind: type) -> tuple[list, dict[str, object]]:
    """The records, of a dataclass, and the facts of the run that made them."""
    rows = json.loads(path.read_text())
    names = kind.__dataclass_fields__
    records = [kind(**{k: v for k, v in row.items() if k in names}) for row in rows]
    return records, {k: v for k, v in rows[0].items() if k not in names}
