"""Checks of a top-k teacher and of K tokens a row: the slots that hold log-probabilities and ids, and the
tail; and which slots repeat an id."""

import math

import torch

from ..arguments import NO_TAIL, LossArguments, Tail
from ..divergences.base import Divergence
from ..results import OF_WHOLE_TEACHER, asked
from ..scalars import flag, integer, number, one_of
from .logits import check_teacher_given
from .tokens import check_mask, check_options
from .values import TokenRows, check_float_dtype, check_id_dtype, check_plain, of_teacher

TAILS = ("bucket", "renormalize", "ignore", "restrict", "drop")
FLOORED = ("bucket", "restrict", "drop")  # the tails in which no column outside is an outcome
WITH_MASSES = ("forward_kl", "reverse_kl", "symmetric_kl")
SUPPORTS = ("student", "teacher")
MOST_SLOTS = 1024  # of a top-k teacher: a vector of the kernel holds them and the rest


def check_topk(
    rows: TokenRows,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: Tail,
    arguments: LossArguments,
) -> tuple[LossArguments, Tail]:
    """Check the tensors of a loss, its top-k teacher and its tail; returns its arguments and the tail,
    none where the divergence has no share."""
    arguments = check_options(rows, arguments)
    tail = check_tail(tail, arguments.divergence)
    unknown = asked(OF_WHOLE_TEACHER, arguments.token_outputs)
    if unknown:
        raise ValueError(
            f"token_outputs={unknown} are of the teacher's whole row, of which {rows.name} comes with K "
            f"log-probabilities: leave them out, or pass the teacher's logits to distillation_loss"
        )
    for name, tensor in (("teacher_log_probs", teacher_log_probs), ("teacher_ids", teacher_ids)):
        check_teacher_given(name, tensor, arguments)
        if tensor is None:
            continue
        _check_slots(rows, name, tensor, arguments.teacher_rows)
    if teacher_log_probs is None or teacher_ids is None:
        return arguments, NO_TAIL
    check_float_dtype("teacher_log_probs", teacher_log_probs)
    check_id_dtype("teacher_ids", teacher_ids)
    if teacher_ids.shape != teacher_log_probs.shape:
        raise ValueError(
            f"teacher_ids must have the shape of teacher_log_probs, "
            f"{tuple(teacher_log_probs.shape)}, got {tuple(teacher_ids.shape)}"
        )
    of_teacher("teacher_log_probs", teacher_log_probs)
    if not arguments.soft:
        return arguments, NO_TAIL
    integer("the number of slots K", teacher_ids.shape[-1], 1, MOST_SLOTS)
    return arguments, tail


def check_tail(tail: Tail, divergence: Divergence) -> Tail:
    """The tail as Python's own, if the divergence has such a one."""
    name, mass_terms, floor = tail
    one_of("tail", name, TAILS)
    flag("mass_terms", mass_terms)
    if mass_terms and name != "drop":
        raise ValueError(
            f"mass_terms=True makes up for what tail='drop' leaves out, got tail={name!r}: pass "
            f"tail='drop', or go without mass_terms"
        )
    if mass_terms and divergence.name not in WITH_MASSES:
        raise ValueError(
            f"mass_terms=True makes the generalised KL of 'forward_kl', 'reverse_kl' or "
            f"SymmetricKL(...), got {divergence.name}: choose one of these, or go without mass_terms"
        )
    if floor is not None:
        floor = number("log_prob_floor", floor, "None or a finite negative number")
        if not -math.inf < floor < 0:
            raise ValueError(
                f"log_prob_floor must be finite and negative (nats; verl's is -10), or None, got {floor}"
            )
        if name not in FLOORED:
            raise ValueError(
                f"log_prob_floor={floor:g} needs tail='bucket', 'restrict' or 'drop', got {name!r}, in "
                f"which every column outside the K would get this log-probability"
            )
    return Tail(name, mass_terms, floor)


def without_repeats(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The ids ``[..., K]``, -1 in slots of -inf whose id stands in a slot above -inf too, or in an earlier
    one."""
    zero = log_probs == -math.inf
    # by id, and of one id those above -inf first
    order = zero.to(torch.uint8).argsort(dim=-1, stable=True)
    order = order.gather(-1, ids.gather(-1, order).argsort(dim=-1, stable=True))
    in_order, zero = ids.gather(-1, order), zero.gather(-1, order)
    again = zero[..., 1:] & (in_order[..., 1:] == in_order[..., :-1])
    again = torch.cat([torch.zeros_like(zero[..., :1]), again], -1)
    return in_order.masked_fill(again, -1).gather(-1, order.argsort(dim=-1))


def _check_slots(
    rows: TokenRows, name: str, tensor: torch.Tensor, teacher_rows: torch.Tensor | None = None
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [..., K], got {type(tensor).__name__}")
    check_plain(name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name} must be [..., K] with at least one slot, got shape {tuple(tensor.shape)}"
        )
    rows.check_teacher_leading(name, tensor.shape[:-1], teacher_rows)
    rows.check_device(name, tensor)


def check_gather(rows: TokenRows, ids: torch.Tensor, loss_mask: torch.Tensor | None) -> None:
    """Check K ids a row, and the rows' weights."""
    _check_slots(rows, "ids", ids)
    check_id_dtype("ids", ids)
    integer("the number of slots K", ids.shape[-1], 1, MOST_SLOTS)
    if loss_mask is not None:
        check_mask(loss_mask, rows)


def check_support(support: str, k: int, n_cols: int, arguments: LossArguments) -> int:
    """Check whose ``k`` tokens are a row's outcomes, of ``n_cols``; returns k."""
    one_of("support", support, SUPPORTS)
    whole = OF_WHOLE_TEACHER if support == "teacher" else (*OF_WHOLE_TEACHER, "teacher_argmax")
    unknown = asked(whole, arguments.token_outputs)
    if unknown:
        raise ValueError(
            f"token_outputs={unknown} are of the teacher's whole row, of which support={support!r} takes k "
            f"tokens: leave them out, or pass both models' logits to distillation_loss"
        )
    return integer("k", k, 1, min(n_cols, MOST_SLOTS))
