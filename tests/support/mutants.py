"""Do the tests notice a mistake? Makes the mistakes of ``mutations.py``, one by one, and asks.

    python -m tests.support.mutants [--only NAME ...] [--jobs N] [--write]

Each mutation is applied to a copy of the tree in a temporary folder, where the test that is expected
to kill it must fail; without a mutation the same tests must pass. A test that cannot run (a mutation
that breaks the import, an unknown test) has killed nothing. Exit status 1 if a mutation survives.

``docs/mutants.md`` lists them; it is written by a run of all, or by ``--write``, which runs nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.support import FULL_VARIABLE, ROOT

PAGE = ROOT / "docs" / "mutants.md"
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
PATIENCE = 600  # seconds for one run of pytest
TESTS_PASSED, TESTS_FAILED = 0, 1  # pytest's exit status; others say that it did not come so far


class Mutation(NamedTuple):
    """``old``, which occurs once in ``file``, becomes ``new``; ``test`` must then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str  # a pytest node id
    kernels: bool = False  # the test is one of kernels, though its id does not say "triton"

    @property
    def interpreter(self) -> bool:
        """Whether the test runs under TRITON_INTERPRET=1."""
        return self.kernels or "[triton" in self.test

    def mistake(self, tree: Path) -> str | None:
        """Why the mutation does not fit the sources, or None."""
        file = tree / self.file
        count = file.read_text().count(self.old) if file.exists() else 0
        if count != 1:
            others = [
                str(other.relative_to(tree))
                for folder in ("distill_ops", "kernels") for other in (tree / folder).rglob("*.py")
                if other != file and other.read_text().count(self.old) == 1
            ]  # fmt: skip
            elsewhere = f"; once in {', '.join(sorted(others))}" if others else ""
            return f"{self.name}: its old text occurs {count} times in {self.file}, not once{elsewhere}"
        return f"{self.name}: changes nothing" if self.old == self.new else None

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


class Outcome(NamedTuple):
    status: int  # of pytest
    output: str

    def killed(self) -> bool:
        return self.status == TESTS_FAILED

    def summary(self) -> str:
        """The line that says what failed first, else the last one."""
        lines = self.output.strip().splitlines() or ["no output"]
        reasons = [line for line in lines if re.match(r"E  |FAILED|ERROR", line)]
        return re.sub(r"\s+", " ", (reasons or lines[-1:])[0]).removeprefix("E ")


def copy_tree(folder: str) -> Path:
    """A copy whose ``distill_ops.kernels`` is its own: setup.py's mapping, as a link."""
    tree = Path(folder) / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    (tree / "distill_ops" / "kernels").symlink_to("../kernels")
    return tree


def environment(interpreter: bool) -> dict[str, str]:
    """Of a process in which the tests under the interpreter run, or the others."""
    left = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", FULL_VARIABLE)}
    return left | ({"TRITON_INTERPRET": "1"} if interpreter else {})


PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def uncollected(tests: set[str], interpreter: bool) -> set[str]:
    """Those of these node ids that `make test` does not collect in that process."""
    files = sorted({test.split("::")[0] for test in tests})
    process = subprocess.run(
        [*PYTEST, "-q", "--collect-only", "--no-header", "-W", "ignore", *files], cwd=ROOT,
        env=environment(interpreter), stdout=subprocess.PIPE, text=True, timeout=PATIENCE,
    )  # fmt: skip
    return tests - set(process.stdout.splitlines())


def run_tests(tree: Path, tests: list[str], interpreter: bool, *more: str) -> Outcome:
    """Run tests in the tree, with this module as a plugin that checks what is imported."""
    of_the_tree = {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # its date cannot tell two mutations of one second apart
    }
    command = [*PYTEST, "-q", "--tb=short", "-p", "tests.support.mutants", *more, *tests]
    try:
        process = subprocess.run(
            command, cwd=tree, env=environment(interpreter) | of_the_tree, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(-1, f"no end after {PATIENCE} s")
    return Outcome(process.returncode, process.stdout)


def pytest_sessionstart(session) -> None:
    """In the copy: refuse to test another copy's code, such as the installed package."""
    from distill_ops.kernels import launch

    import distill_ops

    here = session.config.rootpath.resolve()
    for module in (distill_ops, launch):
        if not Path(module.__file__).resolve().is_relative_to(here):
            raise RuntimeError(f"{module.__name__} came from {module.__file__}, not from {here}")


def try_mutation(mutation: Mutation) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder)
        mutation.apply(tree)
        return run_tests(tree, [mutation.test], mutation.interpreter, "-x")


def without_mutation(mutations: list[Mutation]) -> list[str]:
    """The tests that fail without a mutation, or cannot run."""
    complaints = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder)
        for interpreter in (False, True):
            tests = sorted({m.test for m in mutations if m.interpreter == interpreter})
            if tests:
                outcome = run_tests(tree, tests, interpreter)
                if outcome.status != TESTS_PASSED:
                    complaints.append(f"without a mutation: {outcome.output[-2000:]}")
    return complaints


def excerpt(text: str) -> str:
    """Code as one line of a table."""
    return re.sub(r"\s+", " ", text.strip()).replace("|", "\\|") or "(nothing)"


def page(mutations: list[Mutation]) -> str:
    lines = [
        "# Mutants",
        "",
        "Written by `python -m tests.support.mutants` from `tests/support/mutations.py`; not edited by",
        "hand. Each is a mistake in the sources that the test beside it must notice: `make mutants` makes",
        "them one by one in a copy of the tree and fails if a test does not.",
        "",
        "| mutation | file | code | becomes | killed by |",
        "|---|---|---|---|---|",
    ]
    for m in mutations:
        test = m.test + (" (interpreter)" if m.interpreter else "")
        code = [f"`` {excerpt(text)} ``" for text in (m.old, m.new)]
        lines.append(f"| {m.name} | `{m.file}` | {' | '.join(code)} | `{excerpt(test)}` |")
    return "\n".join(lines) + "\n"


def write_page(mutations: list[Mutation]) -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(mutations))


def main() -> int:
    from tests.support.mutations import MUTATIONS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these mutations alone")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md and do no more")
    options = parser.parse_args()
    if options.write:
        write_page(MUTATIONS)
        return 0
    unknown = set(options.only or []) - {m.name for m in MUTATIONS}
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not options.only or m.name in options.only]
    complaints = [mistake for m in chosen if (mistake := m.mistake(ROOT))]
    complaints = complaints or without_mutation(chosen)
    if complaints:
        print(*complaints, sep="\n")
        return 1
    width = max(len(m.name) for m in chosen)
    n_killed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, outcome in zip(chosen, pool.map(try_mutation, chosen), strict=True):
            n_killed += outcome.killed()
            verdict = {TESTS_FAILED: "killed", TESTS_PASSED: "SURVIVES"}.get(
                outcome.status, "DID NOT RUN"
            )
            print(f"{mutation.name:{width}}  {verdict:11}  {outcome.summary()[:110]}", flush=True)
            if not outcome.killed():
                print(f"    {mutation.file}, expected to be killed by {mutation.test}")
    print(f"{n_killed} of {len(chosen)} mutations killed")
    if n_killed == len(MUTATIONS):
        write_page(MUTATIONS)
    return int(n_killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
