"""Rows of a teacher's top k: what their values must be, and the form in which a file holds them."""

import math

import torch

from ..checks.contents import LARGEST_SUM, repeated
from ..checks.values import check_float_dtype, check_plain
from .format import Rows
from .topk import NEG_INF

LOWEST_DIFFERENCE = torch.finfo(torch.float16).min


def check_rows(
    title: str,
    log_probs: torch.Tensor,
    ids: torch.Tensor,
    vocab_size: int,
    first_row: int = 0,
    largest_sum: float = LARGEST_SUM,
) -> None:
    """Refuse ``[rows, k]`` of ids and log-probabilities that no teacher can have, in any dtype."""

    def refuse(bad: torch.Tensor, values: torch.Tensor, expected: str) -> None:
        if bad.any():
            row = bad.nonzero()[0, 0].item()
            raise ValueError(
                f"{title} must hold {expected}, got {values[bad][0].item()} in row {first_row + row}"
            )

    used = ids != -1
    refuse((ids < -1) | (ids >= vocab_size), ids, f"ids in [0, {vocab_size}), or -1")
    refuse(*repeated(ids), "ids unique within a row, but for -1")
    values = log_probs.double().masked_fill(~used, NEG_INF)
    # NaN is not either
    refuse(~(values <= math.log(largest_sum)), values, "log-probabilities <= 0")
    sums = values.exp().sum(-1)
    refuse(sums > largest_sum, sums, "probabilities that add up to at most 1")


def compact(number: int, batch: object, vocab_size: int, k: int | None) -> Rows:
    """Check a batch (its ``number`` is for messages) and bring its rows to the file's form."""
    title = f"batch {number}"
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not all(isinstance(x, torch.Tensor) for x in batch):
        raise TypeError(
            f"{title} must be a TeacherTopK or a pair (log_probs, ids) of tensors, "
            f"got {type(batch).__name__}"
        )
    log_probs, ids = batch
    for name, tensor in (("log_probs", log_probs), ("ids", ids)):
        check_plain(f"{name} of {title}", tensor)
        if tensor.is_meta:
            raise TypeError(f"{name} of {title} hold no values: they are on meta")
    check_float_dtype(f"log_probs of {title}", log_probs)
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
    log_probs, ids = log_probs.detach().reshape(-1, k), ids.reshape(-1, k)
    check_rows(title, log_probs, ids, vocab_size)
    if log_probs.dtype == torch.float64:  # what float32 cannot hold stays possible
        least = log_probs.clamp(min=torch.finfo(torch.float32).min)
        log_probs = torch.where(log_probs.isfinite(), least, log_probs)
    differences, top = _differences(log_probs.float().masked_fill(ids == -1, NEG_INF))
    ids = ids.to("cpu", torch.int32, copy=True)  # the caller may refill its tensors
    return Rows(top.cpu(), ids, differences.cpu())


def _differences(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 differences ``[rows, k]`` from the row's top, and the top ``[rows]``, shifted.

    The shift keeps the sum of the row's probabilities: a loss takes the rest of the vocabulary from
    it, and of a confident teacher the rest is less than what rounding does to the sum."""
    finite = log_probs.isfinite()
    top = log_probs.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)  # nothing finite: what is there is left as it is
    exact = log_probs - top
    rounded = torch.where(finite, exact.clamp(min=LOWEST_DIFFERENCE), exact).half()
    before, after = (x.double().exp().where(finite, 0.0).sum(-1) for x in (exact, rounded))
    shift = torch.where(after > 0, before / after, 1.0).log()
    return rounded, (top.squeeze(-1).double() + shift).float()


def check_stored(title: str, rows: Rows, vocab_size: int, first_row: int) -> None:
    """Refuse rows of a file that :func:`compact` cannot have given."""
    log_probs = rows.top.unsqueeze(-1) + rows.differences.float()
    # rounded to float16 since, the sum shifted to what it was
    check_rows(title, log_probs, rows.ids, vocab_size, first_row, LARGEST_SUM * (1 + 1e-5))
    stray = (rows.ids == -1) & (log_probs != NEG_INF)
    if stray.any():
        row = first_row + stray.nonzero()[0, 0].item()
        raise ValueError(
            f"{title} must hold -inf in unused slots, got {log_probs[stray][0]} in row {row}"
        )
