"""The files of a store: rows in safetensors, and the index; ``docs/teacher-store.md`` describes them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import naming
from .metadata import (
    FORMAT,
    LARGEST_COUNT,
    Settings,
    not_ours,
    read_json,
    read_strings,
    read_value,
)

INDEX = "index.json"
LARGEST_SETTINGS = 1 << 20  # bytes; the longest name and all the rest stay below


def shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


class Rows(NamedTuple):
    """Rows as a file holds them; their checksum takes them in this order."""

    top: torch.Tensor  # [rows] float32
    ids: torch.Tensor  # [rows, k] int32
    differences: torch.Tensor  # [rows, k] float16

    def checksum(self) -> str:
        digest = sha256()
        for x in self:
            digest.update(x.reshape(-1).view(torch.uint8).numpy())  # no copy
        return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """What a file says of itself."""

    settings: Settings
    number: int
    rows: int
    largest_id: int  # -1 where no slot is used
    checksum: str  # of the rows

    @classmethod
    def of(cls, settings: Settings, number: int, rows: Rows) -> "Shard":
        largest_id = int(rows.ids.max()) if rows.ids.numel() else -1
        return cls(settings, number, len(rows.ids), largest_id, rows.checksum())

    def place(self) -> dict[str, str]:
        """What is known of it without its rows: of the index, in one of its files."""
        return self.settings.strings() | {
            "shard": str(self.number),
            "first_row": str(self.number * (self.settings.rows_per_shard or 0)),
            "rows": str(self.rows),
            "checksum": self.checksum,
        }

    def text(self) -> str:
        content = self.place() | {"largest_id": str(self.largest_id)}
        return json.dumps(content, sort_keys=True)

    def with_rows(self, rows: Rows) -> bytes:
        """The file. Its metadata has one name: safetensors' order of several varies from process to
        process."""
        return save(rows._asdict(), metadata={FORMAT: self.text()})

    def layout(self) -> dict[str, tuple[str, list[int]]]:
        """Dtype and shape of each tensor, as safetensors has them."""
        rows, k = self.rows, self.settings.k
        return {
            "top": ("F32", [rows]),
            "ids": ("I32", [rows, k]),
            "differences": ("F16", [rows, k]),
        }

    def check_place(self, file: Path, expected: "Shard") -> None:
        found = self.place()
        for name, value in expected.place().items():
            if found[name] != value:
                raise not_ours(file, f"{name} {value!r} in its place", found[name])


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Shard, safe_open]]:
    """What a file says of itself, and the file.

    Raises:
        ValueError: the file is missing, truncated or something else.
    """
    if not file.is_file():
        raise not_ours(file, "a safetensors file", "no file")
    try:
        with naming(file):
            file.open("rb").close()  # whose errors say more than the library's
            with safe_open(file, framework="pt") as opened:
                yield _described(file, opened), opened
    except SafetensorError as error:
        raise not_ours(file, "a complete safetensors file", str(error)) from error
    except (RuntimeError, MemoryError) as error:
        raise OSError(f"{file} cannot be mapped into memory: {error}") from error


def _described(file: Path, opened: safe_open) -> Shard:
    text = (opened.metadata() or {}).get(FORMAT, "null")
    settings, values = read_strings(
        file, read_json(file, text.encode(), "JSON in its metadata"),
        "shard", "first_row", "rows", "largest_id", "checksum",
    )  # fmt: skip
    shard = Shard(
        settings, values["shard"], values["rows"], values["largest_id"], values["checksum"]
    )
    first_row = shard.place()["first_row"]
    if str(values["first_row"]) != first_row:
        raise not_ours(file, f"first_row {first_row!r} of its shard", str(values["first_row"]))
    if shard.rows > (settings.rows_per_shard or LARGEST_COUNT):
        raise not_ours(
            file, f"at most {settings.rows_per_shard} rows, its rows_per_shard", shard.rows
        )
    if shard.largest_id >= settings.vocab_size:
        raise not_ours(file, f"largest_id below {settings.vocab_size}", shard.largest_id)
    tensors = {name: opened.get_slice(name) for name in opened.keys()}
    layout = {name: (x.get_dtype(), x.get_shape()) for name, x in tensors.items()}
    if layout != shard.layout():
        raise not_ours(file, f"tensors {shard.layout()}", layout)
    return shard


def read_shard(file: Path) -> Shard:
    with _opened(file) as (shard, _):
        return shard


def map_rows(file: Path, expected: Shard) -> Rows:
    """The rows of a file, which stay on the disk until they are read.

    Raises:
        ValueError: it is not the file that was expected in this place.
    """
    with _opened(file) as (shard, opened):
        shard.check_place(file, expected)
        return Rows(*map(opened.get_tensor, Rows._fields))


@dataclass(frozen=True)
class Index:
    """What a folder says of all its files."""

    settings: Settings
    rows: int
    checksums: tuple[str, ...]

    def text(self) -> str:
        content = self.settings.strings() | {"rows": str(self.rows), "checksums": self.checksums}
        return json.dumps(content, indent=1) + "\n"

    def shard(self, i: int) -> Shard:
        """What a file must say of itself; its largest id is its own to know."""
        size = self.settings.rows_per_shard or self.rows
        n_rows = min(size, self.rows - i * size)
        return Shard(self.settings, i, n_rows, -1, self.checksums[i])


def read_index(file: Path, n_files: int) -> Index:
    """A folder's index, of about so many files."""
    largest = LARGEST_SETTINGS + 128 * n_files
    with naming(file), file.open("rb") as opened:
        text = opened.read(largest + 1)
    if len(text) > largest:
        raise not_ours(file, f"at most {largest} bytes for {n_files} shards", "more")
    content = read_json(file, text, "JSON")
    content = content if isinstance(content, dict) else {}
    checksums = content.pop("checksums", None)
    settings, values = read_strings(file, content, "rows")
    if settings.rows_per_shard is None:
        raise not_ours(file, "rows_per_shard, a number", "none")
    if not isinstance(checksums, list):
        raise not_ours(file, "checksums, a list", checksums)
    n_shards = max(1, -(-values["rows"] // settings.rows_per_shard))
    if len(checksums) != n_shards:
        expected = f"{n_shards} checksums of {values['rows']} rows by {settings.rows_per_shard}"
        raise not_ours(file, expected, len(checksums))
    for checksum in checksums:
        read_value(file, "checksum", checksum)
    return Index(settings, values["rows"], tuple(checksums))
