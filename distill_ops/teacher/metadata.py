"""What the files of a store record, as strings: written and, strictly, read."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from ..checks.values import check_temperature

FORMAT, VERSION = "distill_ops.teacher_topk", "2"
LARGEST_ID = 2**31 - 1
LARGEST_COUNT = 2**48 - 1  # of rows: sizes in bytes stay within 64 bits
LONGEST_NAME = 4096  # of a teacher, in characters
SHOWN = 600  # characters of what was found, in a message


def not_ours(file: Path, expected: str, found: object) -> ValueError:
    return ValueError(
        f"{file} is not a teacher top-k store: expected {expected}, found {repr(found)[:SHOWN]}"
    )


def check_teacher(teacher: str) -> None:
    if not isinstance(teacher, str):
        raise TypeError(f"teacher must be a str, its name, got {type(teacher).__name__}")
    if len(teacher) > LONGEST_NAME:
        raise ValueError(f"teacher must have at most {LONGEST_NAME} characters, got {len(teacher)}")
    if any("\ud800" <= character <= "\udfff" for character in teacher):
        raise ValueError(f"teacher must be text that UTF-8 can hold, got {teacher!r}")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"-1|0|[1-9][0-9]{0,17}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be an integer in [{low}, {high}]")
        return int(text)

    return read


def _temperature(text: str) -> float:
    value = check_temperature(float(text))
    if repr(value) != text:
        raise ValueError(f"must be written as {value!r}")
    return value


def _teacher(text: str) -> str:
    check_teacher(text)
    return text


def _digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("must be 64 hexadecimal digits")
    return text


def _rows_per_shard(text: str) -> int | None:
    return None if text == "none" else _whole(1, LARGEST_COUNT)(text)


READERS: dict[str, Callable] = {
    "vocab_size": _whole(1, LARGEST_ID),
    "temperature": _temperature,
    "teacher": _teacher,
    "k": _whole(1, LARGEST_ID),
    "rows_per_shard": _rows_per_shard,
    "store": _digest,
    "shard": _whole(0, LARGEST_COUNT),
    "first_row": _whole(0, LARGEST_COUNT),
    "rows": _whole(0, LARGEST_COUNT),
    "largest_id": _whole(-1, LARGEST_ID),
    "checksum": _digest,
}


@dataclass(frozen=True)
class Settings:
    """What all files of a store have in common."""

    vocab_size: int
    temperature: float
    teacher: str
    k: int
    rows_per_shard: int | None  # None: a store of one file

    @cached_property
    def store(self) -> str:
        """The store's id."""
        text = json.dumps([FORMAT, VERSION, asdict(self)], sort_keys=True)
        return sha256(text.encode()).hexdigest()

    def strings(self) -> dict[str, str]:
        values = {name: str(value) for name, value in asdict(self).items()}
        if self.rows_per_shard is None:
            values["rows_per_shard"] = "none"
        return {"format": FORMAT, "version": VERSION, **values, "store": self.store}

    def check(self, path: Path, asked: dict[str, object]) -> None:
        """Refuse what was asked for, unless it is None, where it is not what is recorded."""
        for name, value in asked.items():
            recorded = getattr(self, name)
            if value not in (None, recorded):
                raise ValueError(
                    f"{name} must be {recorded!r}, which {path} records, got {value!r}"
                )


SETTINGS = tuple(field.name for field in fields(Settings))


def read_value(file: Path, name: str, text: object) -> object:
    try:
        if not isinstance(text, str):
            raise ValueError("must be a string")
        return READERS[name](text)
    except ValueError as error:
        raise not_ours(file, f"a valid {name} ({error})", text) from error


def read_strings(file: Path, found: object, *more: str) -> tuple[Settings, dict]:
    """The settings that a file's strings hold, and the values of the names that it has besides."""
    found = found if isinstance(found, dict) else {}
    if found.get("format") != FORMAT:
        raise not_ours(file, f"format {FORMAT!r} in its metadata", found.get("format"))
    if found.get("version") != VERSION:
        expected = f"version {VERSION!r} (a store of another must be written again)"
        raise not_ours(file, expected, found.get("version"))
    names = (*SETTINGS, "store", *more)
    if found.keys() != {"format", "version", *names}:
        raise not_ours(file, f"format, version, {', '.join(names)} in its metadata", [*found])
    values = {name: read_value(file, name, found[name]) for name in names}
    settings = Settings(**{name: values[name] for name in SETTINGS})
    if values["store"] != settings.store:
        raise not_ours(file, f"store {settings.store!r}, of its settings", values["store"])
    return settings, values


def read_json(file: Path, text: bytes, expected: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name that stands there twice")
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise not_ours(file, expected, str(error)) from error
