"""Checks of a top-k teacher: the slots that hold its log-probabilities and ids."""

import torch

from ..divergences import Divergence
from .logits import check_logits, check_teacher_given, check_vocabulary
from .tokens import check_options
from .values import LOGIT_DTYPES, Counted, Rows, check_integer, of_teacher, one_of

TAILS = ("bucket", "renormalize", "ignore")
MOST_SLOTS = 1024  # of a top-k teacher: a vector of the kernel holds them and the rest


def check_topk(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: str,
    divergence: Divergence | str,
    counted: Counted,
    hard_label_weight: float,
    temperature: float,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    vocab_size: int | None,
) -> tuple[Divergence, int]:
    """Check the arguments of the loss against a top-k teacher; returns as ``check_dense`` does."""
    check_logits("student_logits", student_logits)
    n_cols = check_vocabulary(vocab_size, student_logits.shape[-1])
    rows = Rows("student_logits", student_logits)
    divergence = check_options(
        rows, n_cols, divergence, counted, hard_label_weight, temperature, reduction, normalizer
    )
    check_slots(
        rows, n_cols, teacher_log_probs, teacher_ids, tail, counted, hard_label_weight
    )  # fmt: skip
    return divergence, n_cols


def check_slots(
    rows: Rows,
    n_cols: int,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: str,
    counted: Counted,
    hard_label_weight: float,
) -> None:
    """Check a top-k teacher of the rows; the options passed :func:`check_options`."""
    one_of("tail", tail, TAILS)
    for name, tensor in (("teacher_log_probs", teacher_log_probs), ("teacher_ids", teacher_ids)):
        check_teacher_given(name, tensor, hard_label_weight)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [..., K], got {type(tensor).__name__}")
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [..., K] with at least one slot, got shape {tuple(tensor.shape)}"
            )
        rows.check_leading(name, tensor.shape[:-1])
        rows.check_device(name, tensor)
    if teacher_log_probs is None or teacher_ids is None:
        return
    if teacher_log_probs.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"teacher_log_probs must be float32, bfloat16, float16 or float64, "
            f"got {teacher_log_probs.dtype}"
        )
    if teacher_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher_ids must be int64 or int32 token ids, got {teacher_ids.dtype}")
    if teacher_ids.shape != teacher_log_probs.shape:
        raise ValueError(
            f"teacher_ids must have the shape of teacher_log_probs, "
            f"{tuple(teacher_log_probs.shape)}, got {tuple(teacher_ids.shape)}"
        )
    of_teacher("teacher_log_probs", teacher_log_probs)
    if hard_label_weight == 1:
        return
    check_integer("the number of slots K", teacher_ids.shape[-1], 1, MOST_SLOTS)
    if counted.readable(teacher_ids, teacher_log_probs):
        kept = counted.kept(teacher_ids[..., 0])
        _check_slot_values(teacher_log_probs, teacher_ids, kept[..., None], n_cols)


def _check_slot_values(log_probs, ids, kept, n_cols: int) -> None:
    """Ids and log-probabilities of tokens that count; unused slots hold an id of -1."""
    outside = ((ids < -1) | (ids >= n_cols)) & kept
    if outside.any():
        raise ValueError(
            f"teacher_ids must lie in [0, {n_cols}), or be -1 in unused slots, "
            f"got {ids[outside][0].item()}"
        )
    in_order = ids.sort(-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0) & kept
    if twice.any():
        raise ValueError(
            f"teacher_ids must be unique within a token, got {in_order[..., 1:][twice][0].item()} twice"
        )
    # logits instead of log-probabilities, not the rounding of a subtraction
    positive = (log_probs > 1e-2) & log_probs.isfinite() & (ids >= 0) & kept
    if positive.any():
        raise ValueError(
            f"teacher_log_probs must be logarithms of probabilities, at most 0, got "
            f"{log_probs[positive][0].item():g}: take log_softmax before choosing the K"
        )
