"""The JSONL of a curation: one writer, whole lines, and a resume that refuses other inputs or settings."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...scalars import shown
from ...teacher.files import Writing, naming, sync_folder
from .digests import input_digest
from .records import BEGINNING, FAILED, Record, line_of, read_lines


class Journal:
    """Lines already there, in order, then new ones behind them."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings
        self._writing = Writing.beside(Path(os.path.realpath(path)))
        self._file = None
        self._n_appended = 0

    @contextmanager
    def open(self) -> Iterator["Journal"]:
        """For this writer alone; a line that a killed one did not end is cut off."""
        with self._writing.claimed():
            with naming(self.path):
                self._file = open(self.path, "ab+")
            try:
                _check_beginning(self.path, self._file)
                self._file.truncate(_end_of_whole_lines(self._file))
                yield self
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def key(self, index: int, value: Any) -> str:
        return f"{input_digest(index, value)}-{self.settings}"

    def stored(self, inputs: Iterator[tuple[int, Any]]) -> Iterator[Record]:
        """The records that are there; so many inputs are taken.

        Raises:
            ValueError: one is of another input, or of other settings.
        """
        for n_read, (key, record) in enumerate(read_lines(self.path)):
            found = next(inputs, None)
            if found is None:
                raise ValueError(
                    f"path {str(self.path)!r} has records beyond the {n_read} inputs: pass the same inputs"
                )
            index, value = found
            (of_input, _, of_settings), expected = key.partition("-"), self.key(index, value)
            if of_settings != self.settings:
                raise ValueError(
                    f"path {str(self.path)!r} was written with other settings (method, n, perturbations, "
                    f"normalize, min_agreement or settings): resume with those, or choose another path"
                )
            if record.index != index or of_input != expected.partition("-")[0]:
                raise ValueError(
                    f"path {str(self.path)!r} has another input at index {index}: {shown(record.input)}, "
                    f"where inputs has {shown(value)}: pass the same inputs in the same order"
                )
            yield record._replace(input=value)

    def append(self, record: Record) -> None:
        self._file.write(line_of(record, self.key(record.index, record.input)))
        self._file.flush()
        self._n_appended += 1

    def has_failed(self) -> bool:
        return any(record.reason == FAILED for _, record in read_lines(self.path))

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        """What is appended meanwhile takes the places of the first lines; then the file changes at once.

        Whatever ends it, the lines that were not reached stay as they are.
        """
        old, temporary, self._n_appended = self._file, self._writing.temporary, 0
        with naming(self.path):
            self._file = open(temporary, "wb")
        try:
            yield
        finally:
            with naming(self.path), old, self._file:
                old.seek(0)
                for _ in range(self._n_appended):
                    old.readline()
                shutil.copyfileobj(old, self._file)
                self._file.flush()
                os.fsync(self._file.fileno())
                shutil.copymode(self.path, temporary)
                os.replace(temporary, self._writing.target)
                sync_folder(self._writing.target.parent)
            self._file = open(self.path, "ab+")


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
