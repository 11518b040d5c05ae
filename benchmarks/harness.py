"""One case: check every provider, measure its memory, then time them all interleaved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .cases import MODES, Case, make_inputs
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
from .memory import peak_above_inputs
from .peers import Skipped
from .providers import PROVIDERS, LossFunction, Provider
from .records import COPY, EAGER, FAILED, SKIPPED, Record, case_fields, time_fields
from .timing import Budget, Run, interleaved

BASELINE = PROVIDERS[EAGER]  # the yardstick of errors and times


@dataclass(frozen=True)
class Contender:
    """A provider that passed its check."""

    provider: Provider
    function: LossFunction
    errors: Errors
    peaks: dict[str, int | None]  # bytes, by mode


def with_eager_first(providers: Sequence[Provider]) -> list[Provider]:
    """Eager is always checked, wanted or not: the others are held against its errors."""
    return [BASELINE, *(provider for provider in providers if provider is not BASELINE)]


def stages(providers: Sequence[Provider]) -> int:
    """How often :func:`run_case` calls its ``step``."""
    return len(with_eager_first(providers)) + len(MODES)


def runs_by_mode(
    function: LossFunction, student: torch.Tensor, teacher: torch.Tensor
) -> dict[str, Run]:
    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return function(student, teacher)

    return {"train": lambda: run_once(function, student, teacher), "eval": evaluate}


def enter(
    provider: Provider,
    case: Case,
    inputs: tuple[torch.Tensor, torch.Tensor],
    truth: Truth,
    yardstick: Errors | None,
) -> Contender:
    """Check a provider and measure its memory; what it compiles, it compiles here."""
    student, teacher = inputs
    function = provider.build(case, student.device)
    errors = measure_errors(function, student, teacher, truth)
    require(errors, allowed(truth, provider.native, yardstick))
    peaks = {}
    for mode, run in runs_by_mode(function, student, teacher).items():
        peaks[mode] = peak_above_inputs(run, student.device)
        student.grad = None
    return Contender(provider, function, errors, peaks)


def enter_all(
    case: Case, providers: Sequence[Provider], device: torch.device, step: Callable[[str], None]
) -> tuple[list[Contender], Errors | None, list[Record]]:
    """Who passed, eager's errors (None: it failed), and the records of who did not."""
    inputs = make_inputs(case, device, min(DISTINCT_ROWS, case.tokens))
    truth = make_truth(case, *inputs)
    reserve = torch.empty_like(inputs[1])  # the copy's: who fits beside it fits the timing too
    contenders, refused = [], []
    yardstick = None
    for provider in with_eager_first(providers):
        step(f"checking {provider.label}")
        inputs[0].grad = None
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
    student, teacher = make_inputs(case, device)
    copied = torch.empty_like(teacher)
    runs = {c.provider.name: runs_by_mode(c.function, student, teacher)[mode] for c in contenders}

    def clear_gradient() -> None:
        student.grad = None

    copy = {COPY: lambda: copied.copy_(teacher)}
    times = interleaved(runs | copy, clear_gradient, device, budget)
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
    for mode in MODES:
        step(f"timing {mode}")
        records += time_mode(case, mode, wanted, yardstick, device, budget)
    return records
