"""The JSONL of a curation: one writer, whole lines, and a resume that refuses other inputs or settings."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...scalars import shown
from ...teacher.files import Writing, naming
from .records import BEGINNING, Record, line_of, read_lines


def described(value: Any) -> Any:
    """What makes a setting itself, in every process: data, and functions by their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): described(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [described(x) for x in value]
    if isinstance(value, functools.partial):
        return ["partial", described(value.func), described(value.args), described(value.keywords)]
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {x.name: described(getattr(value, x.name)) for x in dataclasses.fields(value)}
        return [name, fields]
    if not hasattr(value, "__qualname__"):
        return name
    bound_to = getattr(value, "__self__", None)  # functions, methods and classes
    bound_to = None if isinstance(bound_to, type(os)) else described(bound_to)
    return [getattr(value, "__module__", None), value.__qualname__, bound_to]


_encode = json.JSONEncoder(sort_keys=True, allow_nan=False).encode


def digest(value: Any) -> str:
    return sha256(_encode(value).encode()).hexdigest()[:16]


def input_digest(index: int, value: Any) -> str:
    """Of an input, which must be a string or a mapping of JSON's types."""
    if isinstance(value, Mapping):
        value = dict(value)
    elif not isinstance(value, str):
        raise TypeError(f"input {index} must be a str or a mapping of fields, got {shown(value)}")
    try:
        return digest(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"input {index} must hold what JSON holds ({error}), got {shown(value)}"
        ) from None


class Journal:
    """Lines already there, in order, then new ones behind them."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings
        self._lines: Iterator[tuple[str, Record]] | None = None
        self._file = None

    @contextmanager
    def open(self) -> Iterator["Journal"]:
        """For this writer alone; a line that a killed one did not end is cut off."""
        with Writing.beside(self.path).claimed():
            with naming(self.path):
                self._file = open(self.path, "ab+")
            with self._file:
                _check_beginning(self.path, self._file)
                self._file.truncate(_end_of_whole_lines(self._file))
                self._lines = read_lines(self.path)
                yield self
                os.fsync(self._file.fileno())

    def key(self, index: int, value: Any) -> str:
        return f"{input_digest(index, value)}-{self.settings}"

    def stored(self, index: int, value: Any) -> Record | None:
        """The record of an input that was written before; None from the first that was not.

        Raises:
            ValueError: it is of another input, or of other settings.
        """
        found = next(self._lines, None)
        if found is None:
            return None
        (of_input, _, of_settings), expected = found[0].partition("-"), self.key(index, value)
        if of_settings != self.settings:
            raise ValueError(
                f"path {str(self.path)!r} was written with other settings (method, n, perturbations, "
                f"normalize, min_agreement or settings): resume with those, or choose another path"
            )
        if found[1].index != index or of_input != expected.partition("-")[0]:
            raise ValueError(
                f"path {str(self.path)!r} has another input at index {index}: {shown(found[1].input)}, "
                f"where inputs has {shown(value)}: pass the same inputs in the same order"
            )
        return found[1]._replace(input=value)

    def check_at_end(self, n_inputs: int) -> None:
        if self._lines is not None and next(self._lines, None) is not None:
            raise ValueError(
                f"path {str(self.path)!r} has records beyond the {n_inputs} inputs: pass the same inputs"
            )

    def append(self, record: Record) -> None:
        self._file.write(line_of(record, self.key(record.index, record.input)))
        self._file.flush()


def _check_beginning(path: Path, file) -> None:
    """Before anything is cut off: that the file is a curation's."""
    file.seek(0)
    found = file.read(len(BEGINNING))
    if found != BEGINNING[: len(found)]:
        raise ValueError(
            f"path {str(path)!r} is no file of curate: it begins with {found!r}, where one begins with "
            f"{BEGINNING!r}"
        )


def _end_of_whole_lines(file) -> int:
    """The number of bytes up to and with the last end of a line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
