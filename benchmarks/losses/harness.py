"""One case: check every provider, measure its memory, then time them all interleaved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..core.memory import kept_above_inputs, peak_above_inputs
from ..core.records import EAGER, FAILED, SKIPPED
from ..core.timing import Budget, Run, interleaved
from .cases import MODES, Case, Inputs, make_inputs
from .check import (
    DISTINCT_ROWS,
    Errors,
    Truth,
    allowed,
    make_truth,
    measure_errors,
    require,
    run_once,
)
from .peers import Skipped
from .providers import PROVIDERS, LossFunction, Provider
from .records import COPY, Record, case_fields, time_fields

BASELINE = PROVIDERS[EAGER]  # the yardstick of errors and times


@dataclass(frozen=True)
class Contender:
    """A provider that passed its check."""

    provider: Provider
    function: LossFunction
    errors: Errors
    peaks: dict[str, int | None]  # bytes, by mode
    kept: int | None  # bytes, between forward and backward


def with_eager_first(providers: Sequence[Provider]) -> list[Provider]:
    """Eager is always checked, wanted or not: the others are held against its errors."""
    return [BASELINE, *(provider for provider in providers if provider is not BASELINE)]


def stages(providers: Sequence[Provider]) -> int:
    """How often :func:`run_case` calls its ``step``."""
    return len(with_eager_first(providers)) + len(MODES)


def runs_by_mode(provider: Provider, function: LossFunction, inputs: Inputs) -> dict[str, Run]:
    def train() -> torch.Tensor:
        return run_once(function, inputs.student_for(provider.inplace), inputs.teacher)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return function(inputs.student, inputs.teacher)

    runs = {"train": train, "eval": evaluate}
    return {mode: runs[mode] for mode in provider.modes}


def enter(
    provider: Provider,
    case: Case,
    inputs: Inputs,
    truth: Truth,
    yardstick: Errors | None,
) -> Contender:
    """Check a provider and measure its memory; what it compiles, it compiles here."""
    device = inputs.teacher.device
    function = provider.build(case, device)
    errors = measure_errors(function, inputs, truth, provider.inplace)
    require(errors, allowed(truth, provider.native, yardstick))
    peaks = {}
    for mode, run in runs_by_mode(provider, function, inputs).items():
        inputs.reset()
        peaks[mode] = peak_above_inputs(run, device)
    inputs.reset()
    kept = kept_above_inputs(
        lambda: function(inputs.student_for(provider.inplace), inputs.teacher), device
    )
    return Contender(provider, function, errors, peaks, kept)


def enter_all(
    case: Case, providers: Sequence[Provider], device: torch.device, step: Callable[[str], None]
) -> tuple[list[Contender], Errors | None, list[Record]]:
    """Who passed, eager's errors (None: it failed), and the records of who did not."""
    student, teacher = make_inputs(case, device, min(DISTINCT_ROWS, case.tokens))
    inputs = Inputs(student, teacher, any(provider.inplace for provider in providers))
    truth = make_truth(case, student, teacher)
    reserve = torch.empty_like(teacher)  # the copy's: who fits beside it fits the timing too
    contenders, refused = [], []
    yardstick = None
    for provider in with_eager_first(providers):
        step(f"checking {provider.label}")
        inputs.reset()
        try:
            contender = enter(provider, case, inputs, truth, yardstick)
        except Exception as error:  # a rival may fail in any way, which is a result too
            skipped = isinstance(error, Skipped)
            reason = str(error) if skipped else f"{type(error).__name__}: {error}"
            refused.append(
                Record(
                    **case_fields(case),
                    provider=provider.name,
                    label=provider.label,
                    mode="train",
                    status=SKIPPED if skipped else FAILED,
                    reason=reason.partition("\n")[0],
                )
            )
        else:
            contenders.append(contender)
            if provider is BASELINE:
                yardstick = contender.errors
    del reserve
    return contenders, yardstick, refused


def time_mode(
    case: Case,
    mode: str,
    contenders: Sequence[Contender],
    yardstick: Errors | None,
    device: torch.device,
    budget: Budget,
) -> list[Record]:
    """The records of one mode, and of a copy timed in the same rounds."""
    contenders = [c for c in contenders if mode in c.provider.modes]
    inputs = Inputs(*make_inputs(case, device), any(c.provider.inplace for c in contenders))
    copied = torch.empty_like(inputs.teacher)
    runs = {c.provider.name: runs_by_mode(c.provider, c.function, inputs)[mode] for c in contenders}
    copy = {COPY: lambda: copied.copy_(inputs.teacher)}
    times = interleaved(runs | copy, inputs.reset, device, budget)
    baseline = times.get(EAGER)

    def record(name: str, label: str, minimal_bytes: int, **fields: object) -> Record:
        gb_per_s = minimal_bytes / times[name].median_ms / 1e6
        return Record(
            **case_fields(case),
            **time_fields(times[name], baseline),
            provider=name,
            label=label,
            mode=mode,
            minimal_bytes=minimal_bytes,
            gb_per_s=gb_per_s,
            copy_fraction=gb_per_s / copy_gb_per_s,
            **fields,
        )

    copy_bytes = 2 * case.logits_bytes  # read and written
    copy_gb_per_s = copy_bytes / times[COPY].median_ms / 1e6
    return [
        record(
            c.provider.name,
            c.provider.label,
            case.minimal_bytes(mode),
            peak_bytes=c.peaks[mode],
            kept_bytes=c.kept if mode == "train" else None,
            value_error=c.errors.value,
            gradient_error=c.errors.gradient,
            error_ratio=c.errors.gradient / yardstick.gradient if yardstick else None,
        )
        for c in contenders
    ] + [record(COPY, "copy", copy_bytes)]


def run_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    budget: Budget,
    step: Callable[[str], None],
) -> list[Record]:
    """Every provider's records on a case; one that fails its check is not timed."""
    contenders, yardstick, records = enter_all(case, providers, device, step)
    wanted = [c for c in contenders if c.provider in providers]
    # what a trainer waits for gets more time than the forward alone
    for mode, its_budget in zip(MODES, (budget, budget.half()), strict=True):
        step(f"timing {mode}")
        records += time_mode(case, mode, wanted, yardstick, device, its_budget)
    return records
