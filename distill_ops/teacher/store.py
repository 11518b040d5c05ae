"""Writing a store: shard by shard, each whole on the disk before the next; ``dataset.py`` reads it."""

import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from ..checks.values import check_temperature
from ..scalars import flag, integer
from .contents import check_path, finished_shards, shard_names, whole_store
from .files import Writing, naming, sync_folder
from .format import INDEX, Index, Rows, Shard, read_shard, shard_name
from .metadata import LARGEST_COUNT, LARGEST_ID, Settings, check_teacher
from .rows import compact
from .topk import TeacherTopK


def _pieces(batches: Iterable, vocab_size: int, size: float, k: int | None) -> Iterator[Rows]:
    """The batches' rows in pieces of ``size`` rows, the last one shorter. Where nothing is stored yet
    (``k`` is None: it is the first batch's), at least one piece, if only of no row."""
    pending, n_pending, any_piece = [], 0, k is not None
    for number, batch in enumerate(batches):
        rows = compact(number, batch, vocab_size, k)
        k = rows.ids.shape[-1]
        pending.append(rows)
        n_pending += len(rows.ids)
        if n_pending >= size:
            rows = _joined(pending)
            whole = n_pending - n_pending % size
            for start in range(0, whole, size):
                yield Rows(*(x[start : start + size] for x in rows))
            any_piece = True
            n_pending -= whole
            pending = [Rows(*(x[whole:].clone() for x in rows))]
    if k is None:
        raise ValueError("batches must hold at least one batch, got none")
    if n_pending or not any_piece:
        yield _joined(pending)


def _joined(pending: list[Rows]) -> Rows:
    return Rows(*map(torch.cat, zip(*pending, strict=True)))


def _write_file(writing: Writing, asked: dict, batches: Iterable) -> None:
    (rows,) = _pieces(batches, asked["vocab_size"], math.inf, None)
    settings = Settings(k=rows.ids.shape[-1], **asked)
    shard = Shard.of(settings, 0, rows)
    writing.write(writing.target, shard.with_rows(rows))


def _write_folder(writing: Writing, asked: dict, batches: Iterable, resume: bool) -> None:
    path, vocab_size, size = writing.target, asked["vocab_size"], asked["rows_per_shard"]
    with naming(path):
        entries = set(os.listdir(path)) - {writing.lock.name}
    names = shard_names(path)
    if entries and not (resume and names):
        unfinished = names and INDEX not in entries
        expected = "a new or empty folder for rows_per_shard"
        advice = "; resume=True completes the store that is there" if unfinished else ""
        raise ValueError(f"path must be {expected}, got {path}{advice}")
    if INDEX in entries:
        whole = whole_store(path)
        whole.settings.check(path, asked)
        if any(len(rows.ids) for rows in _pieces(batches, vocab_size, 1, whole.settings.k)):
            raise ValueError(f"batches must hold no more rows, {path} is whole: {whole.rows} rows")
        return
    shards = finished_shards(path)
    if names:  # a shorter last one tells of its store, too
        read_shard(path / shard_name(0)).settings.check(path, asked)
    settings = shards[0].settings if shards else None
    for rows in _pieces(batches, vocab_size, size, settings.k if settings else None):
        if settings is None:
            settings = Settings(k=rows.ids.shape[-1], **asked)
        shard = Shard.of(settings, len(shards), rows)
        writing.write(path / shard_name(shard.number), shard.with_rows(rows))
        shards.append(shard)
    with naming(path):  # a shorter last one of a writer that had other rows
        (path / shard_name(len(shards))).unlink(missing_ok=True)
    expected = {shard_name(shard.number) for shard in shards}
    if shard_names(path) != expected:
        raise OSError(errno.EIO, "shards came or went while they were written", str(path))
    n_rows = sum(shard.rows for shard in shards)
    index = Index(settings, n_rows, tuple(shard.checksum for shard in shards))
    writing.write(path / INDEX, index.text().encode())


def save_teacher_topk(
    path: str | os.PathLike,
    batches: TeacherTopK | Iterable[TeacherTopK | tuple[torch.Tensor, torch.Tensor]],
    *,
    vocab_size: int,
    temperature: float,
    teacher: str,
    rows_per_shard: int | None = None,
    resume: bool = False,
) -> None:
    """Store a teacher's most likely tokens; :class:`TeacherTopKDataset` reads them back.

    ``top + float16(log_prob - top)`` is what a log-probability reads back as, top the row's largest.
    Batches of :class:`TeacherTopK` ``[..., k]`` go in; a file, or a folder of them, comes out.

    Example:
        >>> import tempfile, torch, distill_ops
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = folder.name + "/teacher.safetensors"
        >>> batches = (distill_ops.teacher_topk(torch.randn(2, 10, 100), 8) for _ in range(3))
        >>> distill_ops.save_teacher_topk(
        ...     path, batches, vocab_size=100, temperature=1.0, teacher="a-teacher"
        ... )
        >>> dataset = distill_ops.TeacherTopKDataset(path, temperature=1.0, vocab_size=100)
        >>> len(dataset), dataset.k, dataset[5:9].log_probs.shape
        (60, 8, torch.Size([4, 8]))

    A row takes 6 bytes a slot and 4 more. The largest is shifted so that the row's probabilities keep
    their sum; how far a log-probability read back may be off: ``docs/teacher-store.md``.

    A file appears when everything is written, in one step: an error in a batch, or in the iterable,
    leaves an older one as it was. A folder's files appear one by one, each whole and on the disk, and
    its index last: after an error, or a kill, ``resume=True`` completes it from row
    :func:`rows_written`, to the same bytes. One writer at a time has a claim on ``path``, which a dead
    one loses. A symbolic link is written through.

    Args:
        path: of the file; a file that is there is replaced. With ``rows_per_shard``, of the folder,
            which must not exist or be empty.
        batches: one :class:`TeacherTopK` or an iterable of them, or of pairs ``(log_probs, ids)``:
            ``[..., k]``, float32, bfloat16, float16 or float64 (nats) and int32 or int64, the same k in
            all. Rows are appended in order. Slots of id -1 are unused, whatever their
            log-probability; a token that the teacher excludes may have -inf.
        vocab_size: of the teacher; ids lie below it.
        temperature: at which the log-probabilities were computed.
        teacher: its name.
        rows_per_shard: write a folder of files of so many rows, and hold no more than one of them
            (and a batch) in memory, and two copies while it is written; None: one file, of which the
            same holds.
        resume: complete the store in the folder, whose settings must be these: ``batches`` begin at
            row ``rows_written(path)``, 0 where nothing is yet.

    Raises:
        ValueError, TypeError: naming the argument or the batch, what came and what was expected;
            those about arguments before the first batch is taken.
        BlockingIOError: another writer is at work on ``path``.
        OSError: a file cannot be written (no space, no permission): named.
    """
    path = Path(os.path.realpath(check_path(path)))
    if path.is_symlink():
        raise ValueError(f"path must not be a loop of symbolic links, got {path}")
    vocab_size = integer("vocab_size", vocab_size, 1, LARGEST_ID)
    temperature = check_temperature(temperature)
    check_teacher(teacher)
    folder = rows_per_shard is not None
    flag("resume", resume)
    if folder:
        rows_per_shard = integer("rows_per_shard", rows_per_shard, 1, LARGEST_COUNT)
        if path.exists() and not path.is_dir():
            raise ValueError(f"path must be a new or empty folder for rows_per_shard, got {path}")
    elif path.is_dir():
        raise ValueError(f"path is a folder, which needs rows_per_shard, got {path}")
    elif resume:
        raise ValueError("resume needs rows_per_shard: a store of one file is written in one step")
    elif path.exists() and not path.is_file():
        raise ValueError(f"path must be a file, new or to be replaced, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {path}")
    if isinstance(batches, TeacherTopK):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, torch.Tensor):
        raise TypeError(
            f"batches must be a TeacherTopK or an iterable of them, got {type(batches).__name__}"
        )
    asked = {
        "vocab_size": vocab_size,
        "temperature": temperature,
        "teacher": teacher,
        "rows_per_shard": rows_per_shard,
    }
    if not folder:
        writing = Writing.beside(path)
        with writing.claimed():
            _write_file(writing, asked, batches)
        return
    writing, created = Writing.into(path), not path.exists()
    try:
        with naming(path):
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)
        with writing.claimed():
            _write_folder(writing, asked, batches, resume)
    except BaseException:
        if created:
            with suppress(OSError):
                path.rmdir()  # if nothing is in it
        raise
