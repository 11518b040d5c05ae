"""Checks of a top-k teacher: the slots that hold its log-probabilities and ids."""

import math

import torch

from ..arguments import LossArguments
from ..scalars import integer, one_of
from .logits import check_teacher_given
from .tokens import check_options
from .values import LOGIT_DTYPES, TokenRows, check_plain, of_teacher, readable

TAILS = ("bucket", "renormalize", "ignore")
# logits instead of log-probabilities are far above, the rounding of a subtraction is not
LARGEST_LOG_PROB = 1e-2
SUM_TOLERANCE = (
    1e-3  # of a float32 softmax over a large vocabulary, and of log-probabilities in decimals
)
MOST_SLOTS = 1024  # of a top-k teacher: a vector of the kernel holds them and the rest


def check_topk(
    rows: TokenRows,
    n_cols: int,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: str,
    arguments: LossArguments,
) -> LossArguments:
    """Check the tensors of a loss and its top-k teacher; returns its arguments."""
    arguments = check_options(rows, n_cols, arguments)
    weight = arguments.hard_label_weight
    one_of("tail", tail, TAILS)
    for name, tensor in (("teacher_log_probs", teacher_log_probs), ("teacher_ids", teacher_ids)):
        check_teacher_given(name, tensor, weight)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [..., K], got {type(tensor).__name__}")
        check_plain(name, tensor)
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [..., K] with at least one slot, got shape {tuple(tensor.shape)}"
            )
        rows.check_leading(name, tensor.shape[:-1])
        rows.check_device(name, tensor)
    if teacher_log_probs is None or teacher_ids is None:
        return arguments
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
    if weight < 1:
        integer("the number of slots K", teacher_ids.shape[-1], 1, MOST_SLOTS)
        counted = arguments.counted
        if readable(teacher_ids, teacher_log_probs, *counted[:2]):
            kept = counted.kept(teacher_ids[..., 0])
            _check_slot_values(teacher_log_probs, teacher_ids, kept[..., None], n_cols)
    return arguments


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
    held = (ids >= 0) & kept
    positive = (log_probs > LARGEST_LOG_PROB) & log_probs.isfinite() & held
    if positive.any():
        raise ValueError(
            f"teacher_log_probs must be logarithms of probabilities, at most 0, got "
            f"{log_probs[positive][0].item():g}: take log_softmax before choosing the K"
        )
    finite = log_probs.masked_fill(~(held & log_probs.isfinite()), -math.inf)
    sums, largest = sums_of(finite.double(), torch.finfo(log_probs.dtype).eps)
    above = sums > largest
    if above.any():
        raise ValueError(
            f"teacher_log_probs of a token must be of probabilities that add up to at most 1, got "
            f"{sums[above][0].item():.4g}: take log_softmax over the whole vocabulary, at the loss's "
            f"temperature"
        )


def sums_of(log_probs: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows ``[..., K]``, without NaN: the sums of their probabilities, and the largest that rounding
    in a dtype of this eps leaves of a sum of 1.

    A log-probability l is off by eps |l|, so its probability p by p eps |l|, and the whole row by eps
    where the normaliser was rounded too."""
    probs = log_probs.exp()
    weighted = -torch.special.xlogy(probs, probs).sum(-1)  # sum(p |log p|), 0 where p is
    return probs.sum(-1), 1 + eps * (1 + weighted.clamp(min=0)) + SUM_TOLERANCE
