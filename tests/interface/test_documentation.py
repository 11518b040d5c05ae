"""Docstrings are executed: every example of the package, and one of every public name."""

import ast
import doctest
import importlib
import inspect
import pkgutil
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
import distill_ops.divergences

PUBLIC = (
    "distill_ops",
    "distill_ops.analysis",
    "distill_ops.integrations.minillm",
    "distill_ops.language",
    "distill_ops.reference",
)
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
    with mock.patch.dict(distill_ops.divergences.DIVERGENCES):
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


@pytest.mark.parametrize("name", MODULES)
def test_no_statement_stands_outside_of_an_example(name):
    """An import in a docstring is of an example that is executed, not of indented text."""
    for text in docstrings(name):
        executed = "\n".join(programs(text))
        for line in map(str.strip, text.splitlines()):
            if line.startswith(("import ", "from ")) and " import " in f" {line}":
                try:
                    ast.parse(line)
                except SyntaxError:
                    continue  # prose
                assert line in executed, f"{name}: {line}"


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


@pytest.mark.parametrize(("public", "name"), documented_names(), ids=".".join)
def test_every_public_name_has_an_example(public, name):
    module = importlib.import_module(public)
    value = getattr(module, name) if name else module
    if inspect.ismodule(value):  # its own names are looked at where it is public
        assert value.__doc__
        if name:
            return
    text = inspect.getdoc(value) or ""
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        # a device function cannot be called here, nor has a module of Triton's our docstring: the
        # example that uses them is the public module's
        text = inspect.getdoc(module)
        assert any(name in ast.dump(ast.parse(program)) for program in programs(text)), name
    assert examples_in(text), f"{public}.{name} has no example"


@pytest.mark.parametrize(("public", "name"), documented_names(), ids=".".join)
def test_help_opens_with_what_why_and_an_example(public, name):
    """Three lines (what it computes, the formula, what goes in and comes out), then the example,
    and the arguments after it."""
    value = getattr(importlib.import_module(public), name) if name else None
    if not inspect.isfunction(value):
        return
    text = inspect.getdoc(value)
    sections = [line for line in text.splitlines() if line in SECTIONS]
    assert sections[:1] == ["Example:"], f"{public}.{name}: {sections}"
    opening = text.split("Example:")[0].strip().splitlines()
    assert len([line for line in opening if line.strip()]) >= 2
    assert len(opening) <= 6, f"{public}.{name} opens with {len(opening)} lines"


SECTIONS = ("Example:", "Args:", "Returns:", "Raises:", "Indexing:")


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
