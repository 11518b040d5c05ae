"""Reads what :func:`distill_ops.save_teacher_topk` wrote, row by row or in batches."""

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from ..checks.values import check_temperature
from ..scalars import integer
from .contents import check_path, whole_store
from .format import Rows, Shard, map_rows
from .metadata import check_teacher, not_ours
from .rows import check_stored
from .topk import TeacherTopK

# workers made there take 0.37 s of the cores for 520,000 rows of k = 64, and 0.45 s where they are
# copied there; what is small is not worth a file of its own
SHARED_BYTES = 1 << 20
VERIFIED_ROWS = 1 << 14  # at a time: their float64 values stay small
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _new(n_rows: int, k: int, for_others: bool = False) -> TeacherTopK:
    """Rows to be filled, not of the default dtype, nor on the default device. What a worker makes for
    the process that started it lies in shared memory at once, which saves a copy."""

    def empty(dtype: torch.dtype) -> torch.Tensor:
        n_bytes = n_rows * k * dtype.itemsize
        if not for_others or n_bytes < SHARED_BYTES or get_worker_info() is None:
            return torch.empty(n_rows, k, dtype=dtype, device="cpu")
        storage = torch.UntypedStorage._new_shared(n_bytes, device="cpu")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (n_rows, k))

    return TeacherTopK(empty(torch.float32), empty(torch.int64))


def _recorded(name: str, doc: str) -> Any:
    """A property: what the store records under this name."""
    return property(lambda self: getattr(self._contents.settings, name), doc=doc)


class TeacherTopKDataset(Dataset):
    """A teacher's most likely tokens as :func:`distill_ops.save_teacher_topk` stored them.

    Map-style: a row is a token. Files are mapped into memory, so that rows are read from the disk
    as they are asked for; a copy in a ``DataLoader`` worker maps them on its own.

    Args:
        path: of the file or folder.
        temperature, vocab_size, teacher: what the store must have recorded; None takes any. The
            temperature is the one of the loss.

    Indexing:
        An int gives one row, ``[k]``; a slice, range, list or integer tensor ``[...]`` gives
        ``[..., k]``; negative ones count from the end. Each is a :class:`TeacherTopK` of float32
        log-probabilities and int64 ids, a copy.
        ``DataLoader`` reads the rows of a batch together, and its collation gives a TeacherTopK
        ``[batch, k]``; with a :class:`BlockSampler` it reads neighbouring rows, many times as fast.

    Raises:
        ValueError: the store disagrees with what was asked for; or a file is missing, truncated,
            foreign, in another's place or too many: named, with what was expected. All headers are
            looked at here, but no row is read: :meth:`verify` does that.
        FileNotFoundError: there is nothing at ``path``; OSError: a file cannot be read.
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
            vocab_size = integer("vocab_size", vocab_size, 1)
        if teacher is not None:
            check_teacher(teacher)
        if not path.exists():
            raise FileNotFoundError(f"path must be a teacher top-k store, nothing is at {path}")
        self._contents = whole_store(path)
        self._mapped: dict[int, Rows] = {}
        self._size = self._contents.settings.rows_per_shard or max(1, self._contents.rows)
        asked = {"temperature": temperature, "vocab_size": vocab_size, "teacher": teacher}
        self._contents.settings.check(path, asked)

    temperature: float = _recorded(
        "temperature", "Of the softmax whose log-probabilities are stored."
    )
    vocab_size: int = _recorded("vocab_size", "Of the teacher: ids lie below it.")
    k: int = _recorded("k", "Slots a row.")
    teacher: str = _recorded("teacher", "The teacher's name.")

    def __len__(self) -> int:
        return self._contents.rows

    def __getitem__(self, index: int | slice | range | Sequence[int] | torch.Tensor) -> TeacherTopK:
        if type(index) is int:
            return self._row(index)
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        if isinstance(index, range) and index.step == 1 and len(index) and index.start >= 0:
            return self._run(index.start, index.stop)
        places = self._places(index)
        if places.dim() == 0:
            return self._row(places.item())
        log_probs, ids = self._gathered(places.reshape(-1))
        shape = (*places.shape, self.k)
        return TeacherTopK(log_probs.view(shape), ids.view(shape))

    def _row(self, row: int) -> TeacherTopK:
        shard, local = divmod(self._inside(row), self._size)
        rows = self._shard(shard)
        log_probs = rows.differences[local].float().add_(rows.top[local])
        return TeacherTopK(log_probs, rows.ids[local].long())

    def _inside(self, row: int) -> int:
        n_rows = len(self)
        if not -n_rows <= row < n_rows:
            raise IndexError(f"row {row} of a store of {n_rows} rows")
        return row if row >= 0 else row + n_rows

    def _run(self, start: int, stop: int) -> TeacherTopK:
        """The rows from start to stop."""
        self._inside(stop - 1)
        found = _new(stop - start, self.k, for_others=True)
        size = self._size
        for shard in range(start // size, (stop - 1) // size + 1):
            first = shard * size
            low, high = max(start, first), min(stop, first + size)
            here, local = slice(low - start, high - start), slice(low - first, high - first)
            self._read(shard, local, TeacherTopK(found.log_probs[here], found.ids[here]))
        return found

    def _read(self, shard: int, local: slice | torch.Tensor, out: TeacherTopK) -> None:
        rows = self._shard(shard)
        torch.add(rows.differences[local], rows.top[local].unsqueeze(-1), out=out.log_probs)
        out.ids.copy_(rows.ids[local])

    def _gathered(self, places: torch.Tensor) -> TeacherTopK:
        """The rows at ``[n]`` places, shard by shard."""
        in_order, order = places.sort()
        found = _new(len(places), self.k)
        shards, counts = (in_order // self._size).unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        for shard, start, stop in zip(shards.tolist(), [0, *ends], ends, strict=False):
            part = _new(stop - start, self.k)
            self._read(shard, in_order[start:stop] - shard * self._size, part)
            here = order[start:stop]
            found.log_probs[here], found.ids[here] = part
        return found

    def verify(self) -> None:
        """Read the whole store and check its rows: the checksums, and the values.

        Ids lie in the vocabulary and are unique within a row; log-probabilities are numbers at most 0,
        -inf where the teacher excludes a token; a row's probabilities add up to at most 1, or what
        bfloat16 may leave of it (1.25). Opening a store looks at headers alone.

        Raises:
            ValueError: naming the file, and the row of the store, what it holds and what was expected.
            OSError: a file cannot be read.
        """
        settings = self._contents.settings
        for i, (file, shard) in enumerate(
            zip(self._contents.files, self._contents.shards, strict=True)
        ):
            rows = self._shard(i)
            found = Shard.of(settings, i, rows)
            if found.checksum != shard.checksum:
                raise not_ours(file, f"rows of checksum {shard.checksum!r}", found.checksum)
            if found.largest_id != shard.largest_id:
                raise not_ours(file, f"rows of largest_id {shard.largest_id}", found.largest_id)
            for start in range(0, shard.rows, VERIFIED_ROWS):
                some = Rows(*(x[start : start + VERIFIED_ROWS] for x in rows))
                check_stored(str(file), some, settings.vocab_size, i * self._size + start)

    def __getitems__(self, indices: list[int]) -> list[TeacherTopK]:
        """The rows of a batch, read together: what ``DataLoader`` calls and then collates."""
        return [TeacherTopK(*row) for row in zip(*self[indices], strict=True)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": {}}

    def _shard(self, i: int) -> Rows:
        rows = self._mapped.get(i)
        if rows is None:
            contents = self._contents
            rows = self._mapped[i] = map_rows(contents.files[i], contents.shards[i])
        return rows

    def _places(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Row numbers, of the index's shape, in [0, rows)."""
        n_rows = len(self)
        if isinstance(index, Integral) and not isinstance(index, bool):
            index = int(index)  # NumPy's unsigned ones too
        try:
            places = torch.as_tensor(index, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            places = None
        if isinstance(index, (list, tuple)) and any(isinstance(x, bool) for x in index):
            places = None  # beside ints they would count as 0 and 1
        if isinstance(index, (list, tuple, range)) and len(index) == 0:
            places = places.long()
        if places is None or places.dtype not in INDEX_DTYPES:
            found = type(index).__name__ if places is None else places.dtype
            raise TypeError(f"index must be ints: an int, slice, list or tensor, got {found}")
        places = places.long()
        outside = (places < -n_rows) | (places >= n_rows)
        if outside.any():
            raise IndexError(f"row {places[outside][0].item()} of a store of {n_rows} rows")
        return torch.where(places < 0, places + n_rows, places)
