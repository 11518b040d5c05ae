"""The JSON: a list of records, one a measurement, each with the machine and versions."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import Case
from .timing import Times

OK, SKIPPED, FAILED = "ok", "skipped", "failed"
EAGER, COMPILE, OURS = "eager", "compile", "ours"  # providers that the reports name
OURS_BACKWARD, OURS_INPLACE = "ours_backward", "ours_inplace"  # the gradient's other two ways
COPY = "copy"  # the provider of a copy's records
OVERHEAD = "overhead"  # the case of benchmarks/overhead.py


@dataclass(frozen=True)
class Record:
    """A provider on a case in one mode; where it was not measured, ``reason`` says why."""

    case: str
    loss: str
    model: str | None
    tokens: int
    vocab: int
    dtype: str
    provider: str
    label: str
    mode: str  # "train": forward + backward; "eval": forward without a gradient
    status: str = OK
    reason: str | None = None
    median_ms: float | None = None
    low_ms: float | None = None  # 20% and 80% quantiles
    high_ms: float | None = None
    rounds: int | None = None
    times_baseline: float | None = None  # the baseline's median over this one: above 1 is faster
    minimal_bytes: int | None = None  # inputs read once, in training the gradient written once
    gb_per_s: float | None = None  # minimal_bytes over the median
    copy_fraction: float | None = None  # gb_per_s over that of the copy in the same rounds
    peak_bytes: int | None = None  # above the inputs, gradient included
    kept_bytes: int | None = None  # above the inputs, between forward and backward
    value_error: float | None = None  # nats, against float64
    gradient_error: float | None = None  # relative, by norm, against float64
    error_ratio: float | None = None  # gradient_error over the eager baseline's

    @property
    def measured(self) -> bool:
        return self.status == OK


def case_fields(case: Case) -> dict[str, object]:
    return {"case": case.name, "model": case.model, **asdict(case)}


def time_fields(times: Times, baseline: Times | None) -> dict[str, object]:
    ratio = None if baseline is None else baseline.median_ms / times.median_ms
    return {**asdict(times), "times_baseline": ratio}


def find(records: Iterable[Record], **wanted: object) -> Record | None:
    """The first measured record with these fields."""
    for record in records:
        if record.measured and all(getattr(record, k) == v for k, v in wanted.items()):
            return record
    return None


def ours_against(name: str, records: Sequence[Record]) -> float | None:
    """How many times as fast as a provider ours is in training, within one case's records."""
    other, ours = (find(records, provider=p, mode="train") for p in (name, OURS))
    return other.median_ms / ours.median_ms if other and ours else None


def group_by_case(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.case, []).append(record)
    return groups


def save(path: Path, records: Iterable[object], facts: dict[str, object]) -> None:
    """Records of any dataclass, each with the facts of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**asdict(r), **facts} for r in records], indent=1) + "\n")


def load(path: Path, kind: type = Record) -> tuple[list, dict[str, object]]:
    """The records and the facts of the run that made them."""
    rows = json.loads(path.read_text())
    names = kind.__dataclass_fields__
    records = [kind(**{k: v for k, v in row.items() if k in names}) for row in rows]
    return records, {k: v for k, v in rows[0].items() if k not in names}
