"""The teacher's most likely tokens: computed once and stored; ``dataset.py`` reads them.

``docs/teacher-store.md`` describes the format.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from ..checks.logits import check_alone
from ..checks.values import check_integer, check_temperature, of_teacher
from ..cpu.rows import row_blocks
from ..problem import working_dtype

NEG_INF = float("-inf")
# of the float32 copy of some rows, whatever the vocabulary: 8 MiB stay near a CPU's caches, and 64
# keep a GPU busy
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 21, 1 << 24

FORMAT, VERSION = "distill_ops.teacher_topk", "1"
INDEX = "index.json"
LARGEST_ID = 2**31 - 1
LOWEST_DIFFERENCE = torch.finfo(torch.float16).min
# log-probabilities are at most 0 but for rounding; what is far above it is something else
LARGEST_LOG_PROB = 1e-3


class TeacherTopK(NamedTuple):
    """The teacher's probabilities of ``K`` tokens, in the order that the top-k losses take.

    A slot whose id is -1 is unused; its log-probability is -inf.

    Example:
        >>> import torch, distill_ops
        >>> found = distill_ops.teacher_topk(torch.tensor([[0.0, 2.0, 1.0]]), 2)
        >>> type(found).__name__, found.ids.tolist()
        ('TeacherTopK', [[1, 2]])
    """

    log_probs: torch.Tensor  # [..., K] float32, nats
    ids: torch.Tensor  # [..., K] int64


def teacher_topk(
    logits: torch.Tensor, k: int, *, temperature: float = 1.0, vocab_size: int | None = None
) -> TeacherTopK:
    """The teacher's ``k`` most likely tokens and their log-probabilities, in nats.

    ``log_softmax(logits / temperature)`` over the whole vocabulary, of the largest ``k``.
    Logits ``[..., V]`` go in; :class:`TeacherTopK` of ``[..., k]`` comes out, detached.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> log_probs, ids = distill_ops.teacher_topk(logits, 2)
        >>> ids, [round(x, 4) for x in log_probs[0].tolist()]
        (tensor([[4, 1]]), [-0.7164, -1.2164])

    It runs some rows at a time: beside the results it takes one float32 copy of them: 8 MiB, on a GPU
    64, or one row if that is more.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64; rows may be strided.
        k: tokens a row, in [1, V]. Of equally likely tokens any may be kept.
        temperature: of the softmax, positive: the one of the loss, as log-probabilities of some
            tokens cannot be brought to another.
        vocab_size: use the first columns (a head padded beyond its vocabulary).

    Returns:
        :class:`TeacherTopK` ``[..., k]``, in descending order; detached. Columns whose logit is
        -inf become unused slots: id -1, log-probability -inf. The used slots of a row that holds
        NaN or +inf are NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    n_cols = check_alone("logits", logits, vocab_size)
    of_teacher("logits", logits)
    check_integer("k", k, 1, n_cols)
    temperature = check_temperature(temperature)
    leading = logits.shape[:-1]
    log_probs = logits.new_empty((math.prod(leading), k), dtype=torch.float32)
    ids = logits.new_empty((math.prod(leading), k), dtype=torch.int64)
    on_cpu = logits.device.type == "cpu"
    size = max(1, (CPU_CHUNK_ELEMENTS if on_cpu else GPU_CHUNK_ELEMENTS) // n_cols)
    first = 0
    for (block,) in row_blocks(logits, size=size, copies=True):
        for rows in block[:, :n_cols].split(size):
            out = slice(first, first + len(rows))
            log_probs[out], ids[out] = _topk_rows(rows, k, temperature)
            first += len(rows)
    return TeacherTopK(log_probs.view(*leading, k), ids.view(*leading, k))


def _topk_rows(rows: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = working_dtype(rows)
    values, ids = rows.topk(k)  # NaN counts as the largest
    top = values[:, :1].to(dtype)
    # the maximum goes first: the division could overflow
    weights = rows.to(dtype, copy=True).sub_(top).div_(temperature).exp_()
    log_probs = (values.to(dtype) - top) / temperature - weights.sum(-1, keepdim=True).log()
    unused = values == NEG_INF  # a row of -inf, which is NaN by now, is unused throughout
    return log_probs.masked_fill(unused, NEG_INF).float(), ids.masked_fill(unused, -1)


@dataclass(frozen=True)
class Header:
    """What a file says of itself, as strings in its metadata; a folder's index, of all its files."""

    vocab_size: int
    temperature: float
    teacher: str
    k: int
    rows: int

    def strings(self) -> dict[str, str]:
        values = {name: str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, "version": VERSION} | values

    @classmethod
    def parse(cls, file: Path, strings: object) -> "Header":
        strings = strings if isinstance(strings, dict) else {}
        if strings.get("format") != FORMAT:
            raise not_ours(file, f"format {FORMAT!r} in its metadata", strings.get("format"))
        if strings.get("version") != VERSION:
            raise not_ours(file, f"version {VERSION!r}", strings.get("version"))
        try:
            return cls(**{field.name: field.type(strings[field.name]) for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise not_ours(file, f"{names} in its metadata", strings) from error


def not_ours(file: Path, expected: str, found: object) -> ValueError:
    return ValueError(f"{file} is not a teacher top-k store: expected {expected}, found {found!r}")


def shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


def _compact(number: int, batch: object, vocab_size: int, k: int | None) -> dict[str, torch.Tensor]:
    """Check a batch (its ``number`` is for messages) and bring its rows to the file's form."""
    title = f"batch {number}"
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not all(isinstance(x, torch.Tensor) for x in batch):
        raise TypeError(
            f"{title} must be a TeacherTopK or a pair (log_probs, ids) of tensors, "
            f"got {type(batch).__name__}"
        )
    log_probs, ids = batch
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs of {title} must be floating-point, got {log_probs.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids of {title} must be int32 or int64, got {ids.dtype}")
    if log_probs.shape != ids.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(
            f"log_probs and ids of {title} must both be [..., k] with at least one slot, "
            f"got {tuple(log_probs.shape)} and {tuple(ids.shape)}"
        )
    if k is not None and ids.shape[-1] != k:
        raise ValueError(f"{title} must have k={k} slots a row as before, got {ids.shape[-1]}")
    if log_probs.device != ids.device:
        raise ValueError(f"log_probs of {title} are on {log_probs.device}, ids on {ids.device}")
    k = ids.shape[-1]
    log_probs, ids = log_probs.detach().reshape(-1, k).float(), ids.reshape(-1, k)
    used = ids != -1
    _refuse((ids < -1) | (ids >= vocab_size), ids, title, f"ids in [0, {vocab_size}), or -1")
    in_order = ids.sort(-1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != -1)
    _refuse(twice, in_order[:, 1:], title, "ids unique within a row, but for -1")
    _refuse(used & (log_probs > LARGEST_LOG_PROB), log_probs, title, "log-probabilities <= 0")
    differences, top = _differences(log_probs.masked_fill(~used, NEG_INF))
    return {
        "ids": ids.to("cpu", torch.int32, copy=True),  # the caller may refill its tensors
        "differences": differences.cpu(),
        "top": top.cpu(),
    }


def _differences(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 differences ``[rows, k]`` from the row's top, and the top ``[rows]``, shifted.

    The shift keeps the sum of the row's probabilities: a loss takes the rest of the vocabulary from
    it, and of a confident teacher the rest is less than what rounding does to the sum."""
    finite = log_probs.isfinite()
    top = log_probs.masked_fill(~finite, NEG_INF).amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)  # nothing finite: what is there is left as it is
    exact = log_probs - top
    rounded = torch.where(finite, exact.clamp(min=LOWEST_DIFFERENCE), exact).half()
    before, after = (x.double().exp().where(finite, 0.0).sum(-1) for x in (exact, rounded))
    shift = torch.where(after > 0, before / after, 1.0).log()
    return rounded, (top.squeeze(-1).double() + shift).float()


def _refuse(bad: torch.Tensor, values: torch.Tensor, title: str, expected: str) -> None:
    if bad.any():
        row = bad.nonzero()[0, 0].item()
        raise ValueError(f"{title} must hold {expected}, got {values[bad][0].item()} in row {row}")


def _pieces(batches, vocab_size: int, size: float) -> Iterator[dict[str, torch.Tensor]]:
    """The batches' rows in pieces of ``size`` rows, the last one shorter."""
    pending, n_pending, k, any_piece = [], 0, None, False
    for number, batch in enumerate(batches):
        rows = _compact(number, batch, vocab_size, k)
        k = rows["ids"].shape[-1]
        pending.append(rows)
        n_pending += len(rows["ids"])
        if n_pending >= size:
            rows = _joined(pending)
            whole = n_pending - n_pending % size
            for start in range(0, whole, size):
                yield {name: x[start : start + size] for name, x in rows.items()}
            any_piece = True
            n_pending -= whole
            pending = [{name: x[whole:].clone() for name, x in rows.items()}]
    if k is None:
        raise ValueError("batches must hold at least one batch, got none")
    if n_pending or not any_piece:
        yield _joined(pending)


def _joined(pending: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rows[name] for rows in pending]) for name in pending[0]}


@contextmanager
def _at_once(path: Path, folder: bool):
    """A temporary file or folder beside ``path``, which takes its place in one step at the end."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    (temporary.mkdir if folder else temporary.touch)()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _write(file: Path, rows: dict[str, torch.Tensor], header: Header) -> Header:
    header = replace(header, k=rows["ids"].shape[-1], rows=len(rows["ids"]))
    file.touch()
    mode = file.stat().st_mode
    save_file(rows, file, metadata=header.strings())
    file.chmod(mode)  # safetensors leaves it to its owner alone
    _flush(file)
    return header


def _flush(file: Path) -> None:
    """To the disk: a file must not take its name before its bytes are there."""
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def save_teacher_topk(
    path: str | os.PathLike,
    batches: TeacherTopK | Iterable[TeacherTopK | tuple[torch.Tensor, torch.Tensor]],
    *,
    vocab_size: int,
    temperature: float,
    teacher: str,
    rows_per_shard: int | None = None,
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

    ``path`` appears when everything is written, in one step: an error in a batch, or in the iterable,
    leaves nothing behind and an older file as it was.

    Args:
        path: of the file; a file that is there is replaced. With ``rows_per_shard``, of the folder,
            which must not exist or be empty.
        batches: one :class:`TeacherTopK` or an iterable of them, or of pairs ``(log_probs, ids)``:
            ``[..., k]``, floating-point (nats) and int32 or int64, the same k in all. Rows are
            appended in order. Slots of id -1 are unused, whatever their log-probability.
        vocab_size: of the teacher; ids lie below it.
        temperature: at which the log-probabilities were computed.
        teacher: its name.
        rows_per_shard: write a folder of files of so many rows, and hold no more than one of them
            (and a batch) in memory; None: one file, all of whose rows are held.

    Raises:
        ValueError, TypeError: naming the argument or the batch, what came and what was expected;
            those about arguments before the first batch is taken.
    """
    path = check_path(path)
    check_integer("vocab_size", vocab_size, 1, LARGEST_ID)
    temperature = check_temperature(temperature)
    check_teacher(teacher)
    folder = rows_per_shard is not None
    if folder:
        check_integer("rows_per_shard", rows_per_shard, 1)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"path must be a new or empty folder for rows_per_shard, got {path}")
    elif path.is_dir():
        raise ValueError(f"path is a folder, which needs rows_per_shard, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {path}")
    if isinstance(batches, TeacherTopK):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, torch.Tensor):
        raise TypeError(
            f"batches must be a TeacherTopK or an iterable of them, got {type(batches).__name__}"
        )
    header = Header(vocab_size, temperature, teacher, k=0, rows=0)
    with _at_once(path, folder) as temporary:
        pieces = _pieces(batches, vocab_size, rows_per_shard if folder else math.inf)
        if not folder:
            (rows,) = pieces
            _write(temporary, rows, header)
            return
        n_rows = 0
        for i, rows in enumerate(pieces):
            written = _write(temporary / shard_name(i), rows, header)
            n_rows += written.rows
        index = replace(written, rows=n_rows).strings() | {"rows_per_shard": str(rows_per_shard)}
        (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        _flush(temporary / INDEX)


def check_path(path: str | os.PathLike) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    return Path(path).absolute()


def check_teacher(teacher: str) -> None:
    if not isinstance(teacher, str):
        raise TypeError(f"teacher must be a str, its name, got {type(teacher).__name__}")
