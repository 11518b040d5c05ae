"""The layers of the product: imports go down only, one registration, files that say what they hold."""

import ast

import pytest

from tests.support import ROOT

# from the lowest; those of a line do not see each other
LAYERS = (
    ("kernels", "scalars", "results", "rows", "groups"), ("language", "divergences"), ("arguments",), ("problem",),
    ("row_statistics", "support"), ("checks",), ("reference", "cpu", "gpu"), ("gpu_phases", "gpu_topk_phases", "vocab_parallel"), ("heads", "selection"),
    ("operators",), ("api",),
    ("teacher", "analysis"), ("methods",), ("integrations",),
)  # fmt: skip
FORMS = {"dense", "topk", "tokens", "statistics", "metrics"}  # "linear" may use them
FILES = [*ROOT.glob("distill_ops/**/*.py"), *ROOT.glob("kernels/*.py")]


def name_of(file) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "distill_ops" else ("distill_ops", *parts))


MODULES = {name_of(file): file for file in FILES}


def imported(module: str, file) -> set[str]:
    """The modules of the package that one imports, anywhere in its text."""
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = ".".join(part for part in base if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
            known = {name for name in names if {name, f"{name}.__init__"} & set(MODULES)}
            found |= known or {base}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not any(name.startswith("distill_ops") for name in names), "import relatively"
    return found


def layer_of(module: str) -> int:
    name = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "distill_ops.__init__"])
def test_imports_go_down(module):
    _, layer, *rest = module.split(".")
    for other in imported(module, MODULES[module]):
        _, other_layer, *other_rest = other.split(".")
        if layer != other_layer:
            assert layer_of(other) < layer_of(module), f"{module} imports {other}"
        elif layer in ("api", "cpu", "operators") and rest and other_rest:
            across = rest[0] in FORMS and other_rest[0] in FORMS and rest[0] != other_rest[0]
            assert not across, f"{module} imports {other}, another form"
    if layer == "reference":
        sees = {other.split(".")[1] for other in imported(module, MODULES[module])}
        assert sees <= {
            "reference",
            "problem",
            "results",
            "support",
            "arguments",
            "scalars",
            "checks",
            "divergences",
            "groups",
        }


def test_one_registration():
    using = [file.name for file in FILES if "torch.library" in file.read_text()]
    assert using == ["register.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_say_what_they_hold(file):
    text = file.read_text()
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert len(first) > 20, "the first line says what the file holds"
    assert len(text.splitlines()) <= 400


def test_these_tests_can_fail():
    assert "distill_ops.kernels.dense" in imported("distill_ops.gpu", ROOT / "distill_ops/gpu.py")
    assert layer_of("distill_ops.gpu") > layer_of("distill_ops.kernels.dense")
    assert len(MODULES) == len(FILES) > 60
