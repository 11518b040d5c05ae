"""Pages are executed, and what they and the sources cite exists: pages, sections, anchors, files."""

import re
import runpy
import tokenize
from pathlib import Path
from unittest import mock

import pytest

from distill_ops.divergences.base import DIVERGENCES
from distill_ops.divergences.built_in import BUILT_IN
from tests.support import ROOT
from tests.support.recipes import READERS_OWN

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SOURCES = [
    path
    for folder in ("distill_ops", "kernels", "benchmarks", "tests", "examples")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]

FENCE = re.compile(r"(?:<!-- (?P<marker>[^>]*) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def in_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """A page's Python that runs here, and what it marks: by marker, ``needs NAME`` or
    ``not run: REASON``."""
    plain, marked = [], {}
    for found in FENCE.finditer(text):
        if found["marker"] is None:
            plain.append(found["code"])
        else:
            marked.setdefault(found["marker"].strip(), []).append(found["code"])
    return plain, marked


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text())[0]], ids=in_page
)
def test_code_runs(page, tmp_path):
    """The blocks of a page in order, as one program: what it shows first, later blocks may use."""
    code, _ = blocks(page.read_text())
    file = tmp_path / "page.py"  # a file, as Triton reads functions there
    file.write_text("\n\n".join(code))
    with mock.patch.dict(DIVERGENCES, BUILT_IN, clear=True):  # forgets what the page declares
        runpy.run_path(str(file), READERS_OWN.get(in_page(page), dict)())


@pytest.mark.parametrize("page", PAGES, ids=in_page)
def test_every_block_is_marked_as_what_it_is(page):
    text = page.read_text()
    plain, marked = blocks(text)
    assert len(plain) + sum(map(len, marked.values())) == len(
        re.findall("^ *```python", text, re.M)
    )
    for marker in marked:  # what trl needs is run by test_trl.py
        assert marker == "needs trl" or re.fullmatch(r"not run: .{10,}", marker), marker


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


def broken_links(page: Path) -> list[str]:
    broken = []
    for target, anchor in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=in_page)
def test_links(page):
    assert broken_links(page) == []


FILES = {path.name for path in SOURCES} | {"finetune.py"}  # the last is MiniLLM's
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)*)([\w-]+\.py)\b")
NAMED_FOLDER = re.compile(r"`((?:benchmarks|distill_ops|docs|examples|kernels|tests)/[\w./-]*)`")


def missing_files(text: str) -> list[str]:
    """Source files and folders between backticks that are not there: by their path from the root or
    from the package, or by name alone."""
    places = (ROOT, ROOT / "distill_ops", ROOT / "tests", ROOT / "benchmarks")
    missing = [path for path in NAMED_FOLDER.findall(text) if not (ROOT / path).exists()]
    for folder, name in NAMED_FILE.findall(text):
        found = (
            any((place / folder / name).is_file() for place in places) if folder else name in FILES
        )
        missing += [] if found else [folder + name]
    return sorted(set(missing))


def test_files_that_are_named():
    paths = [path for path in [*PAGES, *SOURCES] if path != Path(__file__)]
    missing = {in_page(path): missing_files(prose(path)) for path in paths}
    assert {page: names for page, names in missing.items() if names} == {}


SECTIONS = set(re.findall(r"^## (\d+)\.", (ROOT / "docs/semantics.md").read_text(), re.MULTILINE))
CITED = re.compile(r"semantics\.md,? +(?:sections? +)?(\d+)(?:(?:,| and| to) +(\d+)\b)?")
NAMED = re.compile(r"(?<![\w/.{}-])((?:docs/)?[\w-]+\.md)\b")


def prose(path: Path) -> str:
    """A page, or a source's comments and strings but those that are other files' names alone."""
    if path.suffix == ".md":
        return path.read_text()
    with tokenize.open(path) as file:
        kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None))
        found = [
            token.string for token in tokenize.generate_tokens(file.readline) if token.type in kinds
        ]
    return "\n".join(text for text in found if " " in text or "docs/" in text)


def broken_citations(text: str) -> list[str]:
    """Pages that a text names and the repository has not, and sections that the page has not."""
    unwrapped = re.sub(r"\s*\n[\s#*]*", " ", text)
    places = (ROOT, ROOT / "docs")
    broken = [
        name for name in NAMED.findall(unwrapped) if not any((p / name).is_file() for p in places)
    ]
    cited = [number for numbers in CITED.findall(unwrapped) for number in numbers if number]
    return broken + [f"semantics.md, {number}" for number in cited if number not in SECTIONS]


CITING = [
    path
    for path in [*SOURCES, *PAGES]
    if ".md" in path.read_text() and path != Path(__file__)  # which names what is not there
]


@pytest.mark.parametrize("path", CITING, ids=in_page)
def test_citations(path):
    assert broken_citations(prose(path)) == []


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {target for target, _ in LINK.findall(index) if "/" not in target} == pages


def test_what_is_broken_is_found(tmp_path):
    assert broken_citations("see semantics.md, section 13, and docs/kernels.md") == []
    assert broken_citations("see semantics.md, section\n    99") == ["semantics.md, 99"]
    assert broken_citations("(semantics.md, sections 2 and 77)") == ["semantics.md, 77"]
    assert broken_citations("as docs/nowhere.md and elsewhere.md say") == [
        "docs/nowhere.md",
        "elsewhere.md",
    ]
    assert missing_files("`kernels/sweeps.py: UNROLL`, `sweeps.py` and `kernels/`") == []
    assert missing_files("`kernels/nowhere.py`, `nowhere.py`, `tests/nowhere/`") == [
        "kernels/nowhere.py",
        "nowhere.py",
        "tests/nowhere/",
    ]
    page = tmp_path / "page.md"
    page.write_text("# A page, `named`\n[a](page.md#a-page-named) [b](other.md) [c](#no)\n")
    assert broken_links(page) == ["other.md", "#no"]
    plain, marked = blocks("```python\na\n```\n<!-- not run: why -->\n```python\nb\n```\n")
    assert (plain, marked) == (["a\n"], {"not run: why": ["b\n"]})
