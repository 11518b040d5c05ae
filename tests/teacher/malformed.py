"""Stores that are not what they should be: each with what is wrong and what the error must say.

A store of 25 rows in shards of 10, k = 8 and a vocabulary of 50, is broken in one place.
"""

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save

from distill_ops import save_teacher_topk
from tests.support.stored_teachers import FACTS, make_topk

FIRST, SECOND, LAST = (f"shard-0000{i}.safetensors" for i in range(3))
INDEX = "index.json"
METADATA, FORMAT = "__metadata__", "distill_ops.teacher_topk"
ROWS, SIZE = 25, 10
SETTINGS = ("vocab_size", "temperature", "teacher", "k", "rows_per_shard")


class Case(NamedTuple):
    name: str
    spoil: Callable[[Path], object]  # of the store's folder
    message: str  # a pattern
    file: str = SECOND  # that the error names
    verify: bool = False  # opens, and is noticed by verify()


def write_store(path: Path, seed: int = 0, **facts: object) -> None:
    save_teacher_topk(path, make_topk(ROWS, seed=seed), rows_per_shard=SIZE, **FACTS | facts)


def split(file: Path) -> tuple[dict, bytes]:
    """A file's header and its rows."""
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), raw[begin:]


def join(file: Path, header: object, rows: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + rows)


def named(strings: dict) -> dict:
    """Metadata whose store id is that of its settings."""
    kinds = {"temperature": float, "teacher": str}
    settings = {name: kinds.get(name, int)(strings[name]) for name in SETTINGS}
    text = json.dumps([FORMAT, "2", settings], sort_keys=True)
    return strings | {"store": sha256(text.encode()).hexdigest()}


def changed(strings: dict, change: dict, renamed: bool) -> dict:
    """None takes a name away."""
    found = {k: v for k, v in (strings | change).items() if v is not None}
    return named(found) if renamed else found


def raw(change: Callable[[bytes], bytes], name: str = SECOND) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def header(change: Callable[[dict], object], name: str = SECOND) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        found, rows = split(path / name)
        join(path / name, change(found), rows)

    return spoil


def metadata(change: Callable[[str], str], name: str = SECOND) -> Callable[[Path], object]:
    """Another text for what a file says of itself."""
    return header(lambda x: x | {METADATA: {FORMAT: change(x[METADATA][FORMAT])}}, name)


def says(renamed: bool = False, name: str = SECOND, **change: object) -> Callable[[Path], object]:
    """Other strings in it, with another store id to go with them or not."""
    return metadata(lambda text: json.dumps(changed(json.loads(text), change, renamed)), name)


def described(**change: dict) -> Callable[[Path], object]:
    """The same bytes as other tensors."""
    return header(lambda x: x | {name: x[name] | change[name] for name in change})


def tensors(**change: torch.Tensor | None) -> Callable[[Path], object]:
    """Others, of which the file is whole; None takes one away."""

    def spoil(path: Path) -> None:
        with safe_open(path / SECOND, framework="pt") as opened:
            strings = opened.metadata()
            found = {name: opened.get_tensor(name).clone() for name in opened.keys()} | change
        found = {name: x for name, x in found.items() if x is not None}
        (path / SECOND).write_bytes(save(found, strings))

    return spoil


def index(renamed: bool = False, **change: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        found = json.loads((path / INDEX).read_text())
        (path / INDEX).write_text(json.dumps(changed(found, change, renamed)))

    return spoil


def listed(change: Callable[[list], object]) -> Callable[[Path], object]:
    """Other checksums in the index."""
    return lambda path: index(
        checksums=change(json.loads((path / INDEX).read_text())["checksums"])
    )(path)


def everywhere(**change: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        for name in (FIRST, SECOND, LAST):
            says(renamed=True, name=name, **change)(path)
        index(renamed=True, **change)(path)

    return spoil


def values(largest_id: str | None = None, **at: tuple) -> Callable[[Path], object]:
    """Other values in the second shard, its checksum as it should be, and the index's."""

    def spoil(path: Path) -> None:
        content, rows = split(path / SECOND)
        layout = {"ids": torch.int32, "top": torch.float32, "differences": torch.float16}
        rows = bytearray(rows)
        for name, (place, value) in at.items():
            start, end = content[name]["data_offsets"]
            tensor = torch.frombuffer(memoryview(rows)[start:end], dtype=layout[name])
            tensor.view(content[name]["shape"])[place] = value
        join(path / SECOND, content, rows)
        says(
            checksum=sha256(rows).hexdigest(),
            **({} if largest_id is None else {"largest_id": largest_id}),
        )(path)
        listed(lambda sums: [sums[0], sha256(rows).hexdigest(), sums[2]])(path)

    return spoil


def swap(path: Path) -> None:
    first, second = (path / FIRST).read_bytes(), (path / SECOND).read_bytes()
    (path / FIRST).write_bytes(second)
    (path / SECOND).write_bytes(first)


def copy(source: str, target: str, path: Path) -> None:
    (path / target).write_bytes((path / source).read_bytes())


def from_another_store(path: Path, **facts: object) -> None:
    other = path.parent / "other"
    write_store(other, seed=1, **facts)
    (path / SECOND).write_bytes((other / SECOND).read_bytes())


def one_file(path: Path) -> None:
    save_teacher_topk(path / SECOND, make_topk(SIZE), **FACTS)


def folder_instead(path: Path) -> None:
    (path / SECOND).unlink()
    (path / SECOND).mkdir()


COMPLETE = "expected a complete safetensors file"
NOT_ITS = "in its place, found"

FILES = [
    Case("nothing in it", raw(lambda x: b""), COMPLETE),
    Case("seven bytes", raw(lambda x: x[:7]), COMPLETE),
    Case("half a header", raw(lambda x: x[:200]), COMPLETE),
    Case("a header without rows", raw(lambda x: x[: 8 + x[0] + 256 * x[1]]), COMPLETE),
    Case("a row cut", raw(lambda x: x[:-1]), COMPLETE),
    Case("a byte more", raw(lambda x: x + b"\0"), COMPLETE),
    Case("zeros alone", raw(lambda x: bytes(len(x))), COMPLETE),
    Case("a header of 2**63 bytes", raw(lambda x: b"\0" * 7 + b"\x80" + x[8:]), COMPLETE),
    Case("a header of 2**64 - 1 bytes", raw(lambda x: b"\xff" * 8 + x[8:]), COMPLETE),
    Case("a header of 200 MB", raw(lambda x: (2 * 10**8).to_bytes(8, "little") + x[8:]), COMPLETE),
    Case("a header that is no JSON", header(lambda x: b"{" * 64), COMPLETE),
    Case("a header that is no text", header(lambda x: b"\xff" * 64), COMPLETE),
    Case("a header as deep as long", header(lambda x: b"[" * 200_000), COMPLETE),
    Case("a list for a header", header(lambda x: [x]), COMPLETE),
    Case("no metadata", header(lambda x: x | {METADATA: {}}), "expected format .*found None"),
    Case("another's metadata", header(lambda x: x | {METADATA: {"format": "pt"}}), "found None"),
    Case("a list for metadata", header(lambda x: x | {METADATA: []}), COMPLETE),
    Case("metadata of numbers", header(lambda x: x | {METADATA: {FORMAT: 2}}), COMPLETE),
    Case("metadata twice", header(lambda x: (json.dumps(x)[:-1] + f', "{METADATA}": {{}}}}').encode()),
         COMPLETE),
    Case("metadata of half a character", header(lambda x: x | {METADATA: {FORMAT: "\ud800"}}), COMPLETE),
    Case("metadata that are no JSON", metadata(lambda x: x[:-1]), "expected JSON in its metadata"),
    Case("metadata as deep as long", metadata(lambda x: "[" * 200_000), "expected JSON in its meta"),
    Case("metadata that are a list", metadata(lambda x: f"[{x}]"), "expected format .*found None"),
    Case("a number of 5000 digits", metadata(lambda x: "5" * 5000), "expected JSON in its metadata"),
    Case("a name twice", metadata(lambda x: '{"k": "8",' + x[1:]), "a name that stands there twice"),
    Case("a name more", says(colour="blue"), "expected format, version, .* in its metadata"),
    *(
        Case(f"no {name}", says(**{name: None}), f"expected .*{name}")
        for name in ("format", "version", "teacher", "temperature", "checksum", "largest_id")
    ),
    Case("another format", says(format="gguf"), "expected format .*found 'gguf'"),
    Case("version 1", says(version="1"), r"expected version '2' \(a store .* written again\), found '1'"),
    Case("version 3", says(version="3"), "expected version '2' .*found '3'"),
    *(
        Case(f"a temperature of {text}", says(temperature=text), "expected a valid temperature")
        for text in ("nan", "inf", "-inf", "0.0", "-2.0", "1e400", "1e-300", "2", "0x2p0", "true", "")
    ),
    Case("a temperature that is a number", says(temperature=2.0), "temperature .*found 2.0"),
    *(
        Case(f"a vocabulary of {text[:12]}", says(vocab_size=text), "expected a valid vocab_size")
        for text in ("0", "-5", "-1", "050", "50.0", "5e1", " 50", "5_0", "٥٠", str(2**31), "9" * 9999)
    ),
    Case("a vocabulary that is a bool", says(vocab_size=True), "valid vocab_size .*found True"),
    Case("k of 0", says(k="0"), "expected a valid k"),
    Case("k not its tensors'", says(renamed=True, k="9"), "expected tensors .*10, 9.*found"),
    Case("a name of half a character", says(teacher="\ud800"), "expected a valid teacher"),
    Case("a name of 5000 characters", says(teacher="x" * 5000), "expected a valid teacher"),
    Case("a store id that is none", says(store="z" * 64), "expected a valid store"),
    Case("a temperature changed by hand", says(temperature="3.0"), "expected store .* its settings"),
    Case(
        "another temperature", says(renamed=True, temperature="3.0"),
        f"expected temperature '2.0' {NOT_ITS} '3.0'",
    ),
    Case("a first row of another", says(first_row="0"), "expected first_row '10'"),
    Case("another number", says(shard="2", first_row="20"), f"expected shard '1' {NOT_ITS} '2'"),
    Case("more rows than tensors", says(rows="9"), "expected tensors"),
    Case("more rows than a shard has", says(rows="11"), "expected at most 10 rows"),
    Case("rows beyond any file", says(rows=str(2**63)), "expected a valid rows"),
    Case("rows that nothing holds", says(True, rows_per_shard=str(2**40), rows=str(2**40),
         first_row=str(2**40)), "expected tensors"),
    Case("an id beyond the vocabulary", says(largest_id="50"), "expected largest_id below 50"),
    Case("another checksum", says(checksum="0" * 64), f"expected checksum .* {NOT_ITS} '0000"),
    Case("a tensor missing", tensors(top=None), "expected tensors"),
    Case("a tensor more", tensors(more=torch.zeros(3)), "expected tensors"),
    Case("an empty tensor more", tensors(more=torch.zeros(0)), "expected tensors"),
    Case("a tensor that is not described", header(lambda x: x | {"top": {}}), COMPLETE),
    Case("bytes of no tensor", header(lambda x: {n: x[n] for n in x if n != "top"}), COMPLETE),
    Case("another dtype", described(ids={"dtype": "F32"}), "expected tensors .*found .*F32"),
    Case("another shape", described(ids={"shape": [8, 10]}), "expected tensors"),
    Case("a wider dtype", tensors(differences=torch.zeros(10, 8)), "expected tensors .*found .*F32"),
    Case("fewer rows than it says", tensors(top=torch.zeros(9)), "expected tensors"),
    Case("a shape of floats", described(top={"shape": [10.0]}), COMPLETE),
    Case("a shape of 2**64 - 1", described(top={"shape": [2**64 - 1]}), COMPLETE),
    Case("a shape beyond 64 bits", described(ids={"shape": [2**40, 2**40]}), COMPLETE),
    Case("tensors that overlap", described(ids={"data_offsets": [0, 320]}), COMPLETE),
    Case("offsets beyond the file", described(top={"data_offsets": [2**62, 2**63]}), COMPLETE),
]  # fmt: skip

FOLDERS = [
    Case("exchanged", swap, f"expected shard '0' {NOT_ITS} '1'", FIRST),
    Case("twice", partial(copy, FIRST, SECOND), f"expected shard '1' {NOT_ITS} '0'"),
    Case("the last in another's place", partial(copy, LAST, SECOND), NOT_ITS),
    *(
        Case(f"{name} missing", lambda path, name=name: (path / name).unlink(), "no file", name)
        for name in (FIRST, SECOND, LAST)
    ),
    Case("one more", partial(copy, SECOND, "shard-00003.safetensors"), "one more", "shard-00003"),
    Case("one of no number", partial(copy, SECOND, "shard-x.safetensors"), "one more", "shard-x"),
    Case("of another store", from_another_store, f"expected checksum .* {NOT_ITS}"),
    Case(
        "of another teacher", partial(from_another_store, teacher="another"),
        f"expected teacher 'a teacher' {NOT_ITS} 'another'",
    ),
    Case("a store of one file", one_file, f"expected rows_per_shard '10' {NOT_ITS} 'none'"),
    Case("a folder for a file", folder_instead, "expected a safetensors file, found 'no file'"),
    Case(
        "a vocabulary below an id", everywhere(vocab_size="20"), "expected largest_id below 20", FIRST
    ),
    Case("no index", lambda path: (path / INDEX).unlink(), "no index.json, and 20 whole rows", "store"),
]  # fmt: skip

INDICES = [
    Case(name, spoil, message, INDEX)
    for name, spoil, message in (
        ("nothing", raw(lambda x: b"", INDEX), "expected JSON"),
        ("no JSON", raw(lambda x: x[:-3], INDEX), "expected JSON"),
        ("no text", raw(lambda x: b"\xff" + x, INDEX), "expected JSON"),
        ("as deep as long", raw(lambda x: b"[" * 200_000, INDEX), "expected JSON"),
        ("longer than its folder", raw(lambda x: x + b" " * 2**21, INDEX), "expected at most"),
        ("a list", raw(lambda x: b"[]", INDEX), "expected format"),
        ("a name twice", raw(lambda x: x.replace(b"{", b'{"k": "8",', 1), INDEX), "twice"),
        ("another format", index(format="other"), "expected format"),
        ("version 1", index(version="1"), "expected version '2'"),
        ("NaN", index(temperature=float("nan")), "expected a valid temperature .*nan"),
        ("a number of 5000 digits", raw(lambda x: x.replace(b'"50"', b"5" * 5000), INDEX), "JSON|vocab"),
        ("a teacher that is none", index(teacher=["a"]), "expected a valid teacher"),
        ("no rows_per_shard", index(rows_per_shard=None), "expected .*rows_per_shard"),
        ("rows_per_shard of 0", index(rows_per_shard="0"), "expected a valid rows_per_shard"),
        ("another store id", index(store="0" * 64), "expected store"),
        ("negative rows", index(rows="-1"), "expected a valid rows"),
        ("more rows than files", index(rows="31"), "expected 4 checksums of 31 rows by 10, found 3"),
        ("fewer rows than files", index(rows="20"), "expected 2 checksums"),
        ("billions of rows", index(rows="99999999999"), "expected 10000000000 checksums"),
        ("no checksums", index(checksums=None), "expected checksums, a list"),
        ("one checksum", index(checksums="0" * 64), "expected checksums, a list"),
        ("checksums that are numbers", listed(lambda x: [0, 1, 2]), "expected a valid checksum"),
    )
] + [
    Case("rows between two files' ends", index(rows="26"), f"expected rows '6' {NOT_ITS} '5'", LAST),
    Case("other checksums", listed(lambda x: x[::-1]), f"checksum .* {NOT_ITS}", FIRST),
    Case("a file more", lambda path: (listed(lambda x: [*x, x[0]])(path), index(rows="31")(path)),
         "no file", "shard-00003"),
]  # fmt: skip

VALUES = [
    Case(name, spoil, message, verify=True)
    for name, spoil, message in (
        ("a bit in the ids", raw(lambda x: x[:-250] + bytes([x[-250] ^ 1]) + x[-249:]), "checksum"),
        ("the last bit", raw(lambda x: x[:-1] + bytes([x[-1] ^ 1])), "expected rows of checksum"),
        ("another largest id", says(largest_id="20"), "expected rows of largest_id 20"),
        ("an id of -2", values(ids=((3, 0), -2)), r"ids in \[0, 50\), or -1, got -2 in row 13"),
        (
            "an id of 50", values(ids=((3, 0), 50), largest_id="49"),
            "expected rows of largest_id 49, found 50",
        ),
        ("an id twice", values(ids=((9, slice(0, 2)), 3)), "ids unique .* got 3 in row 19"),
        ("a top of NaN", values(top=(4, float("nan"))), "log-probabilities <= 0, got nan in row 14"),
        ("a top of inf", values(top=(4, float("inf"))), "log-probabilities <= 0, got inf in row 14"),
        ("a top above 0", values(top=(0, 1.0)), "log-probabilities <= 0, got 1.0 in row 10"),
        ("a difference of NaN", values(differences=((0, 1), float("nan"))), "got nan in row 10"),
        ("a difference above 0", values(differences=((0, 1), 9.0)), "log-prob.* in row 10"),
        (
            "probabilities of 4", values(top=(5, -0.7), differences=((5, slice(0, 8)), 0.0)),
            "probabilities that add up to at most 1, got 3.97.* in row 15",
        ),
        ("a value in an unused slot", values(ids=((6, 7), -1)), "-inf in unused slots, .* row 16"),
    )
]  # fmt: skip

CASES = [*FILES, *FOLDERS, *INDICES, *VALUES]
