"""The record of a dense loss, and the providers that its reports name."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..core.records import OURS, Measured, find
from ..core.timing import Times
from .cases import Case

COMPILE = "compile"
OURS_BACKWARD, OURS_INPLACE = "ours_backward", "ours_inplace"  # the gradient's other two ways
WAYS = {OURS: "forward", OURS_BACKWARD: "backward", OURS_INPLACE: "in place"}  # ours, as labels
COPY = "copy"  # the provider of a copy's records
OVERHEAD = "overhead"  # the case of overhead.py


@dataclass(frozen=True, kw_only=True)
class Record(Measured):
    """A provider on a case in one mode."""

    model: str | None
    mode: str  # "train": forward + backward; "eval": forward without a gradient
    times_baseline: float | None = None  # the baseline's median over this one: above 1 is faster
    minimal_bytes: int | None = None  # inputs read once, in training the gradient written once
    gb_per_s: float | None = None  # minimal_bytes over the median
    copy_fraction: float | None = None  # gb_per_s over that of the copy in the same rounds
    kept_bytes: int | None = None  # above the inputs, between forward and backward
    value_error: float | None = None  # nats, against float64
    gradient_error: float | None = None  # relative, by norm, against float64
    error_ratio: float | None = None  # gradient_error over the eager baseline's


def case_fields(case: Case) -> dict[str, object]:
    return {"case": case.name, "model": case.model, **asdict(case)}


def time_fields(times: Times, baseline: Times | None) -> dict[str, object]:
    ratio = None if baseline is None else baseline.median_ms / times.median_ms
    return {**asdict(times), "times_baseline": ratio}


def ours_against(name: str, records: Sequence[Record]) -> float | None:
    """How many times as fast as a provider ours is in training, within one case's records."""
    other, ours = (find(records, provider=p, mode="train") for p in (name, OURS))
    return other.median_ms / ours.median_ms if other and ours else None


def timed_training(records: Sequence[Record]) -> list[Record]:
    """Forward + backward of the losses themselves: no copy, no overhead of a tiny tensor."""
    return [
        r
        for r in records
        if r.measured and r.mode == "train" and r.provider != COPY and r.case != OVERHEAD
    ]
