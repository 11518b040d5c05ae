"""Docstrings are executed: every example of the package, and one of every public name."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

import distill_ops.kernels
import pytest

import distill_ops
import distill_ops.divergences.base
from distill_ops.divergences.built_in import BUILT_IN

PUBLIC = (
    "distill_ops",
    "distill_ops.analysis",
    "distill_ops.integrations.minillm",
    "distill_ops.language",
    "distill_ops.methods.minillm",
    "distill_ops.methods.on_policy",
    "distill_ops.methods.tokenizers",
    "distill_ops.methods.system2",
    "distill_ops.reference",
)
SECTIONS = ("Example:", "Args:", "Returns:", "Raises:", "Indexing:")
IMPORT = re.compile(r"(from [\w.]+ )?import [\w., ()]+")
STATEMENTS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def walk() -> list[str]:
    """The names of all modules; ``kernels`` may lie in a folder of its own."""
    found = ["distill_ops", "distill_ops.kernels"]
    for package in (distill_ops, distill_ops.kernels):
        prefix = f"{package.__name__}."
        found += [module.name for module in pkgutil.walk_packages(package.__path__, prefix)]
    return sorted(set(found))


MODULES = walk()


@cache
def docstrings(name: str) -> list[str]:
    """All docstrings in a module's text, whatever becomes of what they belong to."""
    nodes = ast.walk(ast.parse(Path(find_spec(name).origin).read_text()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return [text for text in found if text]


def literal_blocks(docstring: str) -> list[str]:
    """What follows ``::``, dedented."""
    blocks, lines = [], docstring.splitlines()
    for i, line in enumerate(lines):
        if not line.rstrip().endswith("::"):
            continue
        indent = len(line) - len(line.lstrip())
        block = []
        for later in lines[i + 1 :]:
            if later.strip() and len(later) - len(later.lstrip()) <= indent:
                break
            block.append(later)
        blocks.append(textwrap.dedent("\n".join(block)).strip())
    return blocks


def programs(docstring: str) -> list[str]:
    """The literal blocks that are programs; the others are formulas."""
    found = []
    for block in literal_blocks(docstring):
        try:
            statements = ast.parse(block).body
        except SyntaxError:
            continue
        if any(isinstance(statement, STATEMENTS) for statement in statements):
            found.append(block)
    return found


def examples_in(docstring: str) -> int:
    return len(doctest.DocTestParser().get_examples(docstring)) + len(programs(docstring))


def run_program(text: str, folder: Path) -> None:
    """In a file, as Triton reads the functions' text there; what it declares is forgotten again."""
    file = folder / "example.py"
    file.write_text(text)
    with mock.patch.dict(distill_ops.divergences.base.DIVERGENCES, BUILT_IN, clear=True):
        runpy.run_path(str(file))


@pytest.mark.parametrize(
    "name", [name for name in MODULES if any(map(examples_in, docstrings(name)))]
)
def test_examples(name, tmp_path):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    # none is hidden from doctest by a decorator
    prompts = [len(doctest.DocTestParser().get_examples(text)) for text in docstrings(name)]
    assert runner.tries == sum(prompts)
    for text in docstrings(name):
        for program in programs(text):
            run_program(program, tmp_path)


def test_no_import_stands_outside_of_an_example():
    """What a docstring imports is of an example that is executed, not of indented text."""
    for name in MODULES:
        for text in docstrings(name):
            executed = "\n".join(programs(text))
            for line in map(str.strip, text.splitlines()):
                assert not IMPORT.fullmatch(line) or line in executed, f"{name}: {line}"


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what a module without it defines: functions and classes."""
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def documented_names() -> list[tuple[str, str]]:
    """Public modules and names: (module, name), the name empty for the module itself."""
    found = []
    for public in PUBLIC:
        names = public_names(importlib.import_module(public))
        found += [(public, name) for name in names] or [(public, "")]
    return found


def is_module(public: str, name: str) -> bool:
    return bool(name) and inspect.ismodule(getattr(importlib.import_module(public), name))


def is_function(public: str, name: str) -> bool:
    return inspect.isfunction(getattr(importlib.import_module(public), name, None))


NAMES = documented_names()


def parametrized(names: list[tuple[str, str]]):
    ids = [f"{public}.{name}".rstrip(".") for public, name in names]
    return pytest.mark.parametrize(("public", "name"), names, ids=ids)


@parametrized([(public, name) for public, name in NAMES if not is_module(public, name)])
def test_every_public_name_has_an_example(public, name):
    module = importlib.import_module(public)
    value = getattr(module, name) if name else module
    text = inspect.getdoc(value) or ""
    if name and not (inspect.isfunction(value) or inspect.isclass(value)):
        # a device function: none of its own can run here, the public module's uses it
        text = inspect.getdoc(module)
        assert any(f"id='{name}'" in ast.dump(ast.parse(program)) for program in programs(text))
    assert examples_in(text), f"{public}.{name} has no example"


@parametrized([(public, name) for public, name in NAMES if is_function(public, name)])
def test_help_opens_with_three_lines_and_an_example(public, name):
    """What it computes, the formula, what goes in and comes out; arguments come later."""
    text = inspect.getdoc(getattr(importlib.import_module(public), name))
    sections = [line for line in text.splitlines() if line in SECTIONS]
    assert sections[:1] == ["Example:"], sections
    opening = [line for line in text.split("Example:")[0].splitlines() if line]
    assert len(opening) == 3, opening
    assert "``" in opening[1]  # the formula


WRONG = '''"""Module.

Example:
    >>> 1 + 1
    3
"""'''


def test_a_false_example_fails():
    test = doctest.DocTestParser().get_doctest(ast.literal_eval(WRONG), {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1


def test_a_false_program_fails(tmp_path):
    text = "Declare it in a file::\n\n    from math import pi\n\n    assert pi == 3\n\nand call it."
    assert programs(text) == ["from math import pi\n\nassert pi == 3"]
    with pytest.raises(AssertionError):
        run_program(*programs(text), tmp_path)


def test_formulas_are_no_programs():
    assert literal_blocks("per token::\n\n    loss = (1 - w) * d + w * c\n") == [
        "loss = (1 - w) * d + w * c"
    ]
    assert programs("per token::\n\n    loss = (1 - w) * d + w * c\n") == []
