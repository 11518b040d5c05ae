"""Stages of a run on a GPU: commands, each with a time limit of its own, whose output is kept as it
comes.

``run`` writes ``NAME.log`` (everything printed) and ``NAME.json`` (the stages, rewritten whenever one
begins or ends), so that a run that is killed leaves what it had.
"""

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from ..core.machine import ROOT, describe, machine_line

RUNNING, PASSED, FAILED, TIMED_OUT = "running", "passed", "failed", "timed out"
NOT_RUN, INTERRUPTED = "not run", "interrupted"
GRACE = 5.0  # seconds between the interrupt, on which pytest says what failed so far, and the kill
POLL = 0.5  # seconds; a process may leave children that hold its output open
TAIL_BYTES = 1 << 16  # of the output, in which the line that sums it up is looked for
NO_GPU = 2  # exit status


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take; without a command ``reason`` says why.

    ``summary``: a pattern of the line that sums the output up; else it is the last line."""

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    reason: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    summary: str = r"\S"


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str
    limit: float
    command: str
    seconds: float = 0.0
    exit_status: int | None = None
    note: str = ""

    @property
    def wrong(self) -> bool:
        return self.status in (FAILED, TIMED_OUT, INTERRUPTED)


def chosen(
    parser: argparse.ArgumentParser, stages: Sequence[Stage], only: Sequence[str] | None
) -> list[Stage]:
    """The stages that are asked for, in their order."""
    names = [stage.name for stage in stages]
    if unknown := set(only or names) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [stage for stage in stages if stage.name in (only or names)]


def missing_gpu() -> str | None:
    """Why nothing can be run here, or None."""
    if torch.cuda.is_available():
        return None
    return f"needs a GPU, and PyTorch {torch.__version__} sees none: nothing was run"


def listing(stages: Sequence[Stage]) -> str:
    return "\n".join(
        f"{stage.name} (at most {stage.seconds:.0f} s): "
        f"{' '.join(stage.command) or f'not run, {stage.reason}'}"
        for stage in stages
    )


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """To the process and its children, which are a group of their own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _copy_output(process: subprocess.Popen, outputs: Sequence[BinaryIO], deadline: float) -> bytes:
    """What the process prints until it ends or the deadline passes; the last part of it."""
    tail = b""
    descriptor = process.stdout.fileno()
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([descriptor], [], [], min(left, POLL))
        if not readable:
            if process.poll() is not None:
                break
            continue
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            break
        for output in outputs:
            output.write(chunk)
            output.flush()
        tail = (tail + chunk)[-TAIL_BYTES:]
    return tail


def _summed_up(tail: bytes, pattern: str) -> str:
    lines = tail.decode(errors="replace").splitlines()
    found = [x for x in lines if re.search(pattern, x)] or [x for x in lines if x.strip()]
    return found[-1].strip("= \t") if found else ""


def run_stage(stage: Stage, seconds: float, outputs: Sequence[BinaryIO]) -> Outcome:
    """Run one stage for at most ``seconds``: then it is interrupted, and ``GRACE`` later killed."""
    outcome = Outcome(stage.name, NOT_RUN, seconds, " ".join(stage.command), note=stage.reason)
    if not stage.command:
        return outcome
    began = time.monotonic()
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(stage.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # a group, but no session: who ends this one ends it
    )
    try:
        tail = _copy_output(process, outputs, began + seconds)
        try:  # it may have closed its output first
            process.wait(max(0.0, began + seconds - time.monotonic()))
            status = FAILED if process.returncode else PASSED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
            _signal(process, signal.SIGINT)
            tail += _copy_output(process, outputs, time.monotonic() + GRACE)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return replace(
        outcome,
        status=status,
        seconds=round(time.monotonic() - began, 1),
        exit_status=process.returncode,
        note=_summed_up(tail, stage.summary),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a stage."""
    rows = [("stage", "status", "seconds", "limit", "what it said")]
    rows += [(o.name, o.status, f"{o.seconds:.1f}", f"{o.limit:.0f}", o.note) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(x.ljust(n) for x, n in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def _save(path: Path, facts: Mapping[str, object], outcomes: Sequence[Outcome]) -> None:
    """Whole, or the one before: a run may be killed while it writes."""
    new = path.with_suffix(".new")
    text = json.dumps({"facts": dict(facts), "stages": [asdict(o) for o in outcomes]}, indent=1)
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def run(
    name: str,
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    facts: Mapping[str, object],
    screen: BinaryIO,
) -> int:
    """Run the stages one after the other, within ``seconds`` in all, and print how they ended.

    Returns:
        The exit status: 1 where a stage failed or ran out of time, else 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    before = signal.signal(signal.SIGTERM, _terminated)
    with (folder / f"{name}.log").open("wb") as log:

        def say(text: str) -> None:
            for output in (log, screen):
                output.write(f"{text}\n".encode())
                output.flush()

        try:
            for stage in stages:
                limit = max(0.0, min(stage.seconds, deadline - time.monotonic() - GRACE))
                begun = Outcome(stage.name, RUNNING, limit, " ".join(stage.command))
                say(f"\n=== {listing([replace(stage, seconds=limit)])}")
                _save(path, facts, [*outcomes, begun])
                if limit == 0.0 and stage.command:
                    outcomes.append(replace(begun, status=TIMED_OUT, note="no time was left"))
                    continue
                try:
                    outcomes.append(run_stage(stage, limit, (log, screen)))
                except BaseException:
                    outcomes.append(replace(begun, status=INTERRUPTED))
                    raise
        finally:
            signal.signal(signal.SIGTERM, before)
            _save(path, facts, outcomes)
            say(f"\n{table(outcomes)}\nin {folder}: {name}.log, {name}.json")
    return int(any(outcome.wrong for outcome in outcomes))


def script(
    module: str,
    description: str,
    name: str,
    minutes: float,
    stages_of: Callable[[float, Path], list[Stage]],
    arguments: Sequence[str] | None,
) -> int:
    """What the two scripts are: their arguments, the stages of so many minutes and a folder, the run.

    Returns:
        The exit status: 1 where something failed or ran out of time, 2 without a GPU.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    add = parser.add_argument
    default = Path(os.environ.get("OUT") or "gpu-results")
    add("--out", type=Path, default=default, help="folder of the results ($OUT, or gpu-results)")
    add("--minutes", type=float, default=minutes, help=f"for all stages ({minutes:g})")
    add("--only", nargs="+", metavar="STAGE", help="these stages alone")
    add("--list", action="store_true", help="print the stages and run nothing")
    options = parser.parse_args(arguments)
    wanted = chosen(parser, stages_of(options.minutes, options.out), options.only)
    if options.list:
        print(listing(wanted))
        return 0
    if reason := missing_gpu():
        print(reason, file=sys.stderr)
        return NO_GPU
    facts = describe(torch.device("cuda"), arguments, module)
    print(machine_line(facts), flush=True)
    return run(name, wanted, options.out, 60 * options.minutes, facts, sys.stdout.buffer)
