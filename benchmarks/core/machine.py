"""Where and with what a run was made."""

import argparse
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import distill_ops

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("python", "torch", "triton")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit, marked where the package's own code differs from it."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", "distill_ops", "kernels", "benchmarks/**/*.py")
    return f"{commit} with changes" if commit and changed else commit


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    names = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument(
        "--device",
        type=torch.device,
        choices=[torch.device(name) for name in names],
        default=names[0],
        metavar=f"{{{','.join(names)}}}",
        help="default: the first of these",
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def describe(
    device: torch.device, arguments: Sequence[str], module: str = "benchmarks"
) -> dict[str, object]:
    """The facts that every record carries."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "gpu": device_name(device) if on_gpu else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "distill_ops": distill_ops.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m {module}", *arguments]),
    }


def machine_line(facts: dict[str, object]) -> str:
    """Machine, versions, commit and date of a run, for captions."""
    device = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    versions = ", ".join(f"{name} {facts[name]}" for name in PACKAGES if facts[name])
    commit = f"commit {facts['commit']}, " if facts["commit"] else ""
    return f"{device}; {versions}; {commit}{facts['date'][:10]}"
