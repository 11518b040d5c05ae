"""CONTRIBUTING.md's list for a new divergence, followed in a copy: it suffices, and nothing is to spare."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

# file -> (what it is put before, what is put there); the triangular discrimination
STEPS = {
    "distill_ops/divergences/built_in.py": [
        (
            "BUILT_IN = dict(",
            '''\
@declare_divergence
def triangular(log_q, log_p, q, p):
    """``sum((q - p)**2 / (q + p))``, the triangular discrimination.

    Example:
        >>> import distill_ops
        >>> distill_ops.triangular().name
        'triangular'
    """
    ratio = share(q - p, q + p)
    return (q - p) * ratio, q * ratio * share(q + 3 * p, q + p)


''',
        ),
        (
            "from .base",
            "from ..kernels.math import share\nfrom .declared import declare_divergence\n",
        ),
    ],
    "distill_ops/__init__.py": [
        ("    TotalVariation,", "    triangular,\n"),
        ('    "TotalVariation",', '    "triangular",\n'),
    ],
    "tests/support/formulas.py": [
        (
            '    assert name == "alpha_beta"',
            """\
    if name == "triangular":
        return (q - p) ** 2 / (q + p), q * (q - p) * (q + 3 * p) / (q + p) ** 2
""",
        ),
        (
            "    return ZERO\n\n\ndef _at_teacher_zero",
            '    if name == "triangular":\n        return p\n',
        ),
        (
            "    return ZERO, ZERO",
            '    if name == "triangular":\n        return q, q\n',
        ),
    ],
    "docs/semantics.md": [
        (
            "\n- `soft_cross_entropy`, the default",
            "| `triangular` | `triangular()` | `(q - p)**2 / (q + p)` "
            "| `q * (q - p) * (q + 3 * p) / (q + p)**2` | |\n",
        ),
        (
            "\nThe log-probability of token 1",
            "| `triangular()` |  | S, Q | 0.473830967011 | [.0421476559, .1145692071, -.0362602413, "
            ".0558869012, -.1763435228] |\n",
        ),
    ],
    "README.md": [
        ("| a function of your own", '| `"triangular"` | `sum((q - p)^2 / (q + p))` | |\n')
    ],
    "benchmarks/losses/eager.py": [
        (
            "FORMULAS =",
            """\
def triangular(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    q = F.softmax(student, dim=-1, dtype=dtype)
    p = F.softmax(teacher, dim=-1, dtype=dtype)
    return ((q - p) ** 2 / (q + p)).sum(-1).mean()


""",
        )
    ],
}
USE = """
import torch
from benchmarks.accuracy.numeric_rule import DIVERGENCES as SWEPT
from benchmarks.losses.cases import select_cases
from benchmarks.losses.eager import FORMULAS
from distill_ops import check_divergence, distillation_loss, reference, triangular
from tests.support.cases import DIVERGENCES

assert distillation_loss.__code__.co_filename.startswith(ROOT)
print(check_divergence("triangular"))
student, teacher = torch.randn(2, 3, 40, dtype=torch.float64)
loss = distillation_loss(student, teacher, divergence="triangular")
truth = reference.distillation_loss(student, teacher, divergence=triangular())
eager = FORMULAS["triangular"](student, teacher, None)
torch.testing.assert_close(loss, truth)
torch.testing.assert_close(loss, eager)
assert [divergence.name for divergence in DIVERGENCES].count("triangular") == 1
assert SWEPT["triangular"] == triangular()
assert "triangular" in {case.loss for case in select_cases("cpu", quick=True)}
"""
# tests that must pass with the new name among their cases, by what they hold
SUITE = (
    "tests/oracle/test_dense.py",
    "tests/oracle/test_tokens.py",
    "tests/oracle/test_topk.py",
    "tests/losses/test_dense.py",
    "tests/losses/test_topk.py",
    "tests/interface/test_semantics_page.py",
    "tests/interface/test_documentation.py",
    "tests/tools/test_benchmarks.py",
)


def listed() -> set[str]:
    """The files that the numbered steps of CONTRIBUTING.md name."""
    text = re.search(
        r"## A new divergence\n(.*?)\nNothing else",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.DOTALL,
    )[1]
    steps = re.findall(r"^\d\. (.*?)(?=\n\n|\n\d\. |\Z)", text, re.MULTILINE | re.DOTALL)
    return {path for step in steps for path in re.findall(r"`([\w./]+\.(?:py|md))`", step)}


def test_the_list_names_what_is_touched():
    assert listed() == set(STEPS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, and a function that follows steps in it and restores the others."""
    copy = tmp_path_factory.mktemp("clone")
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("distill_ops", "benchmarks", "tests", "docs", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    shutil.copytree(ROOT / "kernels", copy / "distill_ops/kernels", ignore=skip)
    (copy / "kernels").symlink_to("distill_ops/kernels")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)

    def follow(files):
        for file, edits in STEPS.items():
            text = (ROOT / file).read_text()
            for before, addition in edits if file in files else ():
                assert text.count(before) >= 1, f"{file} has no {before!r}"
                text = text.replace(before, addition + before, 1)
            (copy / file).write_text(text)
        return copy

    return follow


def run(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
    )  # fmt: skip


def pytest_in(folder, *arguments, **environment):
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line")
    return run(folder, *command, *arguments, **environment)


def test_the_list_suffices_to_use_it(clone):
    folder = clone(STEPS)
    found = run(folder, "-c", f"ROOT = {str(folder)!r}\n{USE}")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("triangular: slope right")


@pytest.mark.full
def test_the_list_suffices_for_the_suite(clone):
    found = pytest_in(clone(STEPS), "-k", "triangular or page or listed", *SUITE)
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) > 100


@pytest.mark.full
def test_the_list_suffices_for_the_kernels(clone):
    """Under the interpreter."""
    arguments = ("-k", "triangular and test_options", "tests/losses/test_dense.py")
    found = pytest_in(clone(STEPS), *arguments, TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 20


# what fails where a step is forgotten
FORGOTTEN = {
    "distill_ops/__init__.py": "tests/interface/test_semantics_page.py",
    "tests/support/formulas.py": "tests/oracle/test_topk.py",
    "docs/semantics.md": "tests/interface/test_semantics_page.py",
    "README.md": "tests/interface/test_semantics_page.py",
    "benchmarks/losses/eager.py": "tests/tools/test_benchmarks.py",
}


@pytest.mark.full
@pytest.mark.parametrize("file", FORGOTTEN)
def test_a_forgotten_step_fails(clone, file):
    folder = clone(STEPS.keys() - {file})
    found = pytest_in(folder, "-x", FORGOTTEN[file])
    assert found.returncode != 0
    assert "triangular" in found.stdout  # and not for another reason
