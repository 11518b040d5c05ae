"""``python -m benchmarks.gpu.check``: is it right on this GPU? The GPU's tests, the kernels' tests as
many as there is time for, then compute-sanitizer over small ones. Six minutes at most.

Output goes to a folder as it comes: ``checks.log`` and ``checks.json``.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from distill_ops.analysis.aot import KERNELS

from . import stages
from .stages import Stage

MINUTES = 6.0
# seconds of each stage at MINUTES; the rest is for starting and ending
LIMITS = {"gpu": 95, "kernels": 90, "memcheck": 50, "racecheck": 45, "initcheck": 40}
MARGIN = 15  # seconds that pytest gets to begin and to finish the test that it is at
WORKERS = {"gpu": 3, "kernels": 8}  # with pytest-xdist: most of the time is the compiler's
SANITIZED = (
    "tests/losses/test_dense.py",
    "tests/losses/test_topk.py",
    "tests/losses/test_tokens.py",
    "tests/interface/test_inplace.py",
)
# what tests PyTorch's machinery more than a kernel, or compiles for long
NOT_SANITIZED = "not compile and not opcheck and not checkpoint and not transforms"
SANITIZER = "compute-sanitizer"
SANITIZER_FOUND = 99  # its exit status where it found an error
TOOLS = ("memcheck", "racecheck", "initcheck")


def pytest_command(seconds: float, *arguments: str) -> tuple[str, ...]:
    """pytest for so many seconds, a line a test."""
    return (
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider",
        "-p", "benchmarks.gpu.budget", "--budget", f"{max(1.0, seconds - MARGIN):.0f}", *arguments,
    )  # fmt: skip


def parallel(stage: str) -> tuple[str, ...]:
    return ("-n", str(WORKERS[stage])) if find_spec("xdist") else ()


def sanitizer_places() -> Iterator[Path]:
    """Where it may lie besides PATH: CUDA's folders, and those of CUDA's wheels."""
    homes = [os.environ[x] for x in ("CUDA_HOME", "CUDA_PATH") if x in os.environ]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for home in map(Path, homes):
        yield home / "bin" / SANITIZER
        yield home / SANITIZER / SANITIZER
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        yield from sorted(Path(folder).rglob(SANITIZER))


def find_sanitizer() -> str | None:
    """The program, or None."""
    places = (str(x) for x in sanitizer_places() if x.is_file() and os.access(x, os.X_OK))
    return shutil.which(SANITIZER) or next(places, None)


def _filters(program: str) -> list[str]:
    """Our kernels alone, where the tool can be told so: the others' are many, and no concern here."""
    asked = subprocess.run([program, "--help"], capture_output=True, text=True)
    if "--kernel-name" not in asked.stdout + asked.stderr:
        return []
    return [x for _, name in KERNELS for x in ("--kernel-name", f"kernel_substring={name}")]


def sanitizer_stage(tool: str, program: str | None, seconds: float) -> Stage:
    """One tool over the small tests; without the program a stage that says so."""
    if program is None:
        reason = f"{SANITIZER} is neither on PATH nor in a folder or wheel of CUDA's"
        return Stage(tool, seconds, reason=reason)
    arguments = ("-m", "interpreter", "-k", NOT_SANITIZED, *SANITIZED)
    command = (
        program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--print-limit", "20",
        *([] if tool == "memcheck" else _filters(program)), *pytest_command(seconds, *arguments),
    )  # fmt: skip
    # an allocation each, or a tensor's end would be followed by the cache's own memory
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, seconds, command, environment=environment, summary=r"SUMMARY|not supported")


def all_stages(minutes: float, folder: Path) -> list[Stage]:
    limits = {name: seconds * minutes / MINUTES for name, seconds in LIMITS.items()}
    program = find_sanitizer()
    return [
        *(
            Stage(
                name, limits[name],
                pytest_command(limits[name], *parallel(name), "-m", mark, "tests"),
                summary=r"\b(passed|failed|error|no tests ran)\b.* in ",
            )
            for name, mark in (("gpu", "gpu"), ("kernels", "interpreter and not gpu"))
        ),
        *(sanitizer_stage(tool, program, limits[tool]) for tool in TOOLS),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return stages.script("benchmarks.gpu.check", __doc__, "checks", MINUTES, all_stages, arguments)


if __name__ == "__main__":
    sys.exit(main())
