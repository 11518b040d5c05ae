"""The files of a store: rows behind a header, and the index; ``docs/teacher-store.md`` describes them."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch

from .files import naming
from .metadata import (
    LARGEST_COUNT,
    LARGEST_HEADER,
    Settings,
    not_ours,
    read_json,
    read_strings,
    read_value,
)

INDEX = "index.json"


def shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


class Rows(NamedTuple):
    """Rows as they lie in a file, in this order, which is safetensors' own."""

    top: torch.Tensor  # [rows] float32
    ids: torch.Tensor  # [rows, k] int32
    differences: torch.Tensor  # [rows, k] float16

    def parts(self) -> Iterator[bytes]:
        """Their bytes, without a copy."""
        return (x.reshape(-1).view(torch.uint8).numpy() for x in self)

    def checksum(self) -> str:
        digest = sha256()
        for part in self.parts():
            digest.update(part)
        return digest.hexdigest()


class Part(NamedTuple):
    name: str
    dtype: str  # as safetensors says it
    kind: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def _parts(rows: int, k: int) -> list[Part]:
    found, end = [], 0
    for name, dtype, kind, shape in (
        ("top", "F32", torch.float32, (rows,)),
        ("ids", "I32", torch.int32, (rows, k)),
        ("differences", "F16", torch.float16, (rows, k)),
    ):
        start, end = end, end + kind.itemsize * math.prod(shape)
        found.append(Part(name, dtype, kind, shape, (start, end)))
    return found


@dataclass(frozen=True)
class Shard:
    """What a file says of itself."""

    settings: Settings
    number: int
    rows: int
    largest_id: int  # -1 where no slot is used
    checksum: str  # of the bytes behind the header

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

    def header(self) -> bytes:
        """As safetensors has it. Written here, since its order of the metadata varies from process
        to process."""
        content: dict = {"__metadata__": self.place() | {"largest_id": str(self.largest_id)}}
        content |= self.layout()
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # rows begin where 8 divides
        return len(text).to_bytes(8, "little") + text

    def layout(self) -> dict[str, dict]:
        return {
            part.name: {
                "dtype": part.dtype, "shape": [*part.shape], "data_offsets": [*part.offsets]
            }
            for part in _parts(self.rows, self.settings.k)
        }  # fmt: skip

    def check_place(self, file: Path, expected: "Shard") -> None:
        found = self.place()
        for name, value in expected.place().items():
            if found[name] != value:
                raise not_ours(file, f"{name} {value!r} in its place", found[name])


def _canonical(content: object) -> str:
    return json.dumps(content, sort_keys=True)  # 1, 1.0 and true differ


def read_shard(file: Path) -> tuple[Shard, int]:
    """What a file says of itself, and where its rows begin.

    Raises:
        ValueError: the file is missing, truncated or something else.
    """
    if not file.is_file():
        raise not_ours(file, "a safetensors file", "no file")
    complete = "a complete safetensors file"
    with naming(file), file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if not 8 + length <= size or length > LARGEST_HEADER:
            raise not_ours(file, complete, f"{size} bytes, and a header that claims {length}")
        text = opened.read(length)
    content = read_json(file, text, complete)
    content = content if isinstance(content, dict) else {}
    settings, values = read_strings(
        file, content.pop("__metadata__", None), "shard", "first_row", "rows", "largest_id",
        "checksum",
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
    if _canonical(content) != _canonical(shard.layout()):
        raise not_ours(file, f"tensors {shard.layout()}", content)
    begin, n_bytes = 8 + length, _parts(shard.rows, settings.k)[-1].offsets[1]
    if size != begin + n_bytes or begin % 8:
        raise not_ours(file, f"{complete}, of {begin + n_bytes} bytes", size)
    return shard, begin


def map_rows(file: Path, shard: Shard, begin: int) -> Rows:
    """The rows of a file, which stay on the disk until they are read."""
    parts = _parts(shard.rows, shard.settings.k)
    n_bytes = begin + parts[-1].offsets[1]
    try:
        mapped = torch.from_file(
            str(file), shared=False, size=n_bytes, dtype=torch.uint8, device="cpu"
        )
    except RuntimeError as error:
        raise OSError(f"{file} cannot be mapped into memory: {error}") from error
    found = (
        mapped[begin + part.offsets[0] : begin + part.offsets[1]].view(part.kind).view(part.shape)
        for part in parts
    )
    return Rows(*found)


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
    largest = LARGEST_HEADER + 128 * n_files
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
