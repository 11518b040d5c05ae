"""What lies at a path: a whole store, or the shards that a writer has finished so far."""

import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path

from .files import naming
from .format import INDEX, Shard, read_index, read_shard, shard_name
from .metadata import Settings, not_ours


def check_path(path: str | os.PathLike) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    with naming(Path(path)):  # the current folder may be gone
        path = Path(path).absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"path must be text that UTF-8 can hold, got {str(path)!r}") from error
    if "\0" in str(path):
        raise ValueError(f"path must hold no null character, got {str(path)!r}")
    return path


@dataclass(frozen=True)
class Contents:
    """A whole store: its files, and what each must say of itself."""

    settings: Settings
    rows: int
    files: list[Path]
    shards: list[Shard]


def shard_names(folder: Path) -> set[str]:
    with naming(folder):
        return set(fnmatch.filter(os.listdir(folder), "shard-*.safetensors"))


def whole_store(path: Path) -> Contents:
    """The store at a path, all of whose headers have been looked at.

    Raises:
        ValueError: a file is missing, foreign, in a wrong place or too many; or there is no index.
    """
    if not path.is_dir():
        shard = read_shard(path)
        if shard.settings.rows_per_shard is not None:
            raise not_ours(path, "a whole store: open its folder", f"shard {shard.number} of one")
        return Contents(shard.settings, shard.rows, [path], [shard])
    if not (path / INDEX).is_file():
        n_rows = sum(shard.rows for shard in finished_shards(path))
        found = f"no {INDEX}, and {n_rows} whole rows, which resume=True completes"
        raise not_ours(path, f"a folder with {INDEX}, which is written last", found)
    names = shard_names(path)  # after the index was seen, which a writer makes last
    index = read_index(path / INDEX, len(names))
    files = [path / shard_name(i) for i in range(len(index.checksums))]
    for file in files:
        if file.name not in names:
            raise not_ours(file, "a safetensors file", "no file")
    for name in sorted(names - {file.name for file in files}):
        raise not_ours(path / name, f"no file but the {len(files)} of {INDEX}", "one more")
    shards = []
    for i, file in enumerate(files):
        shard = read_shard(file)
        shard.check_place(file, index.shard(i))
        shards.append(shard)
    return Contents(index.settings, index.rows, files, shards)


def finished_shards(folder: Path) -> list[Shard]:
    """The full shards of a folder that has no index, from the first; a shorter last one, which a
    writer makes just before the index, is not among them.

    Raises:
        ValueError: one is missing, foreign or in a wrong place.
    """
    found: list[Shard] = []
    n_files = len(shard_names(folder))
    for i in range(n_files):
        file = folder / shard_name(i)
        shard = read_shard(file)
        settings = found[0].settings if found else shard.settings
        size = settings.rows_per_shard
        if size is None:
            raise not_ours(file, "a shard of a folder", "a store of one file")
        full = shard.rows if i == n_files - 1 else size
        shard.check_place(file, Shard(settings, i, full, shard.largest_id, shard.checksum))
        if shard.rows == size:
            found.append(shard)
    return found


def rows_written(path: str | os.PathLike) -> int:
    """How many rows of a store are whole: where the batches must start to complete it.

    ``0 <= rows_written(path) <= rows`` of the store, a multiple of ``rows_per_shard`` until it is whole.
    A path goes in; an int comes out: 0 where nothing is, all rows of a store that is whole.

    Example:
        >>> import tempfile, torch, distill_ops
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = folder.name + "/teacher"
        >>> settings = dict(vocab_size=100, temperature=1.0, teacher="a-teacher", rows_per_shard=4)
        >>> logits = torch.randn(10, 100)
        >>> def run_teacher(first_row, last_row=10):
        ...     for row in range(first_row, last_row):
        ...         yield distill_ops.teacher_topk(logits[row], 8)
        ...     if last_row < 10:
        ...         raise RuntimeError("out of memory")
        >>> distill_ops.save_teacher_topk(path, run_teacher(0, 7), **settings)
        Traceback (most recent call last):
        RuntimeError: out of memory
        >>> distill_ops.rows_written(path)
        4
        >>> distill_ops.save_teacher_topk(path, run_teacher(4), resume=True, **settings)
        >>> distill_ops.rows_written(path)
        10

    It may be asked while a writer is at work.

    Args:
        path: of a store's file or folder, written or not.

    Raises:
        ValueError: a file is foreign, in a wrong place, or missing between others: named, with what
            was expected.
        OSError: a file cannot be read.
        TypeError: of the argument's type.
    """
    path = check_path(path)
    if not path.exists():
        return 0
    if path.is_dir() and not (path / INDEX).exists():
        return sum(shard.rows for shard in finished_shards(path))
    return whole_store(path).rows
