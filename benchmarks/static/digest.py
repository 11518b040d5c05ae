"""To which kernels a file of counts belongs: a digest of their code, and the compilers' versions."""

import ast
import hashlib
import json
from importlib.metadata import version

from triton import knobs

from ..core.machine import ROOT

KERNELS = ROOT / "kernels"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_text and isinstance(first.value.value, str) else body


def _code(node: object) -> object:
    """A syntax tree as nested lists: no comments, docstrings or places, and nothing that one
    version of Python has and another has not."""
    if isinstance(node, list):
        return [_code(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
        fields["body"] = _without_docstring(fields["body"])
    kept = {name: value for name, value in fields.items() if value is not None and value != []}
    return [type(node).__name__, {name: _code(value) for name, value in kept.items()}]


def code_digest(sources: dict[str, str]) -> str:
    """SHA-256 of modules' code, by file name; comments, docstrings and formatting do not count."""
    trees = {name: _code(ast.parse(text)) for name, text in sorted(sources.items())}
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()


def kernels_digest() -> str:
    """Of today's ``kernels/``."""
    files = KERNELS.rglob("*.py")
    return code_digest({f.relative_to(KERNELS).as_posix(): f.read_text("utf-8") for f in files})


def toolchain() -> dict[str, str]:
    """Triton's version and its assemblers', ptxas for sm_80 and sm_90 and another for sm_100."""
    found = {"triton": version("triton")}
    for name in ("ptxas", "ptxas_blackwell"):
        if tool := getattr(knobs.nvidia, name, None):
            found[name] = tool.version
    return found
