"""Checks of a top-k teacher: the slots that hold its log-probabilities and ids."""

import torch

from ..arguments import LossArguments
from ..scalars import integer, one_of
from .logits import check_teacher_given
from .tokens import check_options
from .values import TokenRows, check_float_dtype, check_id_dtype, check_plain, of_teacher

TAILS = ("bucket", "renormalize", "ignore")
MOST_SLOTS = 1024  # of a top-k teacher: a vector of the kernel holds them and the rest


def check_topk(
    rows: TokenRows,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: str,
    arguments: LossArguments,
) -> LossArguments:
    """Check the tensors of a loss and its top-k teacher; returns its arguments."""
    arguments = check_options(rows, arguments)
    one_of("tail", tail, TAILS)
    for name, tensor in (("teacher_log_probs", teacher_log_probs), ("teacher_ids", teacher_ids)):
        check_teacher_given(name, tensor, arguments)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [..., K], got {type(tensor).__name__}")
        check_plain(name, tensor)
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [..., K] with at least one slot, got shape {tuple(tensor.shape)}"
            )
        rows.check_teacher_leading(name, tensor.shape[:-1], arguments.teacher_rows)
        rows.check_device(name, tensor)
    if teacher_log_probs is None or teacher_ids is None:
        return arguments
    check_float_dtype("teacher_log_probs", teacher_log_probs)
    check_id_dtype("teacher_ids", teacher_ids)
    if teacher_ids.shape != teacher_log_probs.shape:
        raise ValueError(
            f"teacher_ids must have the shape of teacher_log_probs, "
            f"{tuple(teacher_log_probs.shape)}, got {tuple(teacher_ids.shape)}"
        )
    of_teacher("teacher_log_probs", teacher_log_probs)
    if arguments.soft:
        integer("the number of slots K", teacher_ids.shape[-1], 1, MOST_SLOTS)
    return arguments
