"""Reads what :func:`distill_ops.save_teacher_topk` wrote, row by row or in batches."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checks.values import check_integer, check_temperature
from .store import INDEX, Header, TeacherTopK, check_path, check_teacher, not_ours, shard_name

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _map_file(file: Path) -> tuple[Header, dict[str, torch.Tensor]]:
    """A file's header and its tensors, which stay on the disk until they are indexed.

    Raises:
        ValueError: the file is missing, truncated or something else.
    """
    if not file.is_file():
        raise not_ours(file, "a safetensors file", "no file")
    try:
        with safe_open(file, framework="pt") as opened:
            header = Header.parse(file, opened.metadata())
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise not_ours(file, "a complete safetensors file", str(error)) from error
    expected = {
        "differences": (torch.float16, (header.rows, header.k)),
        "ids": (torch.int32, (header.rows, header.k)),
        "top": (torch.float32, (header.rows,)),
    }
    found = {name: (x.dtype, tuple(x.shape)) for name, x in sorted(tensors.items())}
    if found != expected:
        raise not_ours(file, f"tensors {expected}", found)
    return header, tensors


def _read_index(file: Path) -> tuple[Header, int]:
    """A folder's header and its rows per shard."""
    if not file.is_file():
        raise not_ours(file.parent, f"a folder with {INDEX}, which is written last", "none")
    try:
        strings = json.loads(file.read_text())
    except ValueError as error:
        raise not_ours(file, "JSON", str(error)) from error
    header = Header.parse(file, strings)
    size = strings.get("rows_per_shard")
    if not (isinstance(size, str) and size.isdecimal() and int(size) > 0):
        raise not_ours(file, "rows_per_shard, a positive number", size)
    return header, int(size)


def _recorded(name: str, doc: str) -> Any:
    """A property: what the header has under this name."""
    return property(lambda self: getattr(self._header, name), doc=doc)


class TeacherTopKDataset(torch.utils.data.Dataset):
    """A teacher's most likely tokens as :func:`distill_ops.save_teacher_topk` stored them.

    Map-style: a row is a token. Files are mapped into memory, so that rows are read from the disk
    as they are asked for; a copy in a ``DataLoader`` worker maps them on its own.

    Args:
        path: of the file or folder.
        temperature, vocab_size, teacher: what the store must have recorded; None takes any. The
            temperature is the one of the loss.

    Indexing:
        An int gives one row, ``[k]``; a slice, list or integer tensor ``[...]`` gives ``[..., k]``;
        negative ones count from the end. Each is a :class:`TeacherTopK` of float32 log-probabilities
        and int64 ids.
        ``DataLoader`` reads the rows of a batch together, and its collation gives a TeacherTopK
        ``[batch, k]``.

    Raises:
        ValueError: the store disagrees with what was asked for; or a file is missing, truncated or
            foreign: named, with what was expected. All files are looked at here, but not read.
        FileNotFoundError: there is nothing at ``path``.
        IndexError, TypeError: of an index, or of an argument's type.

    Example:
        >>> import math, tempfile, torch, distill_ops
        >>> folder = tempfile.TemporaryDirectory()
        >>> rows = distill_ops.TeacherTopK(
        ...     torch.tensor([[-0.5, -2.0], [-0.25, -math.inf]]), torch.tensor([[7, 2], [3, -1]])
        ... )
        >>> path = folder.name + "/teacher.safetensors"
        >>> distill_ops.save_teacher_topk(
        ...     path, rows, vocab_size=10, temperature=2.0, teacher="a-teacher"
        ... )
        >>> dataset = distill_ops.TeacherTopKDataset(path, temperature=2.0)
        >>> dataset[1].ids, dataset[:].log_probs.tolist()
        (tensor([ 3, -1]), [[-0.5, -2.0], [-0.25, -inf]])
        >>> next(iter(torch.utils.data.DataLoader(dataset, batch_size=2))).ids.tolist()
        [[7, 2], [3, -1]]
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        temperature: float | None = None,
        vocab_size: int | None = None,
        teacher: str | None = None,
    ):
        path = check_path(path)
        if temperature is not None:
            temperature = check_temperature(temperature)
        if vocab_size is not None:
            check_integer("vocab_size", vocab_size, 1)
        if teacher is not None:
            check_teacher(teacher)
        if not path.exists():
            raise FileNotFoundError(f"path must be a teacher top-k store, nothing is at {path}")
        self._mapped: dict[int, dict[str, torch.Tensor]] = {}
        if path.is_dir():
            self._header, self._size = _read_index(path / INDEX)
            self._files = []
            for i in range(max(1, -(-self._header.rows // self._size))):
                self._files.append(path / shard_name(i))
                self._map_shard(i)  # at once: an index may name billions of rows
        else:
            self._header, _ = _map_file(path)
            self._files, self._size = [path], max(1, self._header.rows)
            self._map_shard(0)
        asked = {"temperature": temperature, "vocab_size": vocab_size, "teacher": teacher}
        for name, value in asked.items():
            recorded = getattr(self._header, name)
            if value not in (None, recorded):
                raise ValueError(
                    f"{name} must be {recorded!r}, which {path} records, got {value!r}"
                )

    temperature: float = _recorded(
        "temperature", "Of the softmax whose log-probabilities are stored."
    )
    vocab_size: int = _recorded("vocab_size", "Of the teacher: ids lie below it.")
    k: int = _recorded("k", "Slots a row.")
    teacher: str = _recorded("teacher", "The teacher's name.")

    def __len__(self) -> int:
        return self._header.rows

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> TeacherTopK:
        places = self._places(index)
        rows = places.reshape(-1)
        # not of the default dtype, nor on the default device
        log_probs = torch.empty(len(rows), self.k, dtype=torch.float32, device="cpu")
        ids = torch.empty(len(rows), self.k, dtype=torch.int64, device="cpu")
        shard_of_row = rows // self._size
        for shard in shard_of_row.unique().tolist():
            here = (shard_of_row == shard).nonzero().squeeze(-1)
            tensors, local = self._shard(shard), rows[here] - shard * self._size
            ids[here] = tensors["ids"][local].long()
            differences = tensors["differences"][local].float()
            log_probs[here] = tensors["top"][local].unsqueeze(-1) + differences
        shape = (*places.shape, self.k)
        return TeacherTopK(log_probs.view(shape), ids.view(shape))

    def __getitems__(self, indices: list[int]) -> list[TeacherTopK]:
        """The rows of a batch, read together: what ``DataLoader`` calls and then collates."""
        return [TeacherTopK(*row) for row in zip(*self[indices], strict=True)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": {}}

    def _map_shard(self, i: int) -> dict[str, torch.Tensor]:
        """A file's tensors.

        Raises:
            ValueError: it is not, or no longer, the file that this store had in this place.
        """
        header, tensors = _map_file(self._files[i])
        n_rows = min(self._size, self._header.rows - i * self._size)
        expected = replace(self._header, rows=n_rows)
        if header != expected:
            raise not_ours(self._files[i], f"{expected} in its place", header)
        return tensors

    def _shard(self, i: int) -> dict[str, torch.Tensor]:
        if i not in self._mapped:
            self._mapped[i] = self._map_shard(i)
        return self._mapped[i]

    def _places(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Row numbers, of the index's shape, in [0, rows)."""
        n_rows = len(self)
        if isinstance(index, slice):
            chosen = range(*index.indices(n_rows))
            return chosen.start + chosen.step * torch.arange(len(chosen), device="cpu")
        try:
            places = torch.as_tensor(index, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            places = None
        if isinstance(index, (list, tuple)) and len(index) == 0:
            places = places.long()
        if places is None or places.dtype not in INDEX_DTYPES:
            found = type(index).__name__ if places is None else places.dtype
            raise TypeError(f"index must be ints: an int, slice, list or tensor, got {found}")
        places = places.long()
        outside = (places < -n_rows) | (places >= n_rows)
        if outside.any():
            raise IndexError(f"row {places[outside][0].item()} of a store of {n_rows} rows")
        return torch.where(places < 0, places + n_rows, places)
