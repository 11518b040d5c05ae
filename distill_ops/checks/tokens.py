"""Checks of the tensors that come with the tokens: labels, masks, parameters, ids, normalizer; what they
hold is looked at where a call computes (``contents.py``)."""

from typing import NamedTuple

import torch

from ..arguments import LossArguments
from ..divergences.base import Divergence
from ..groups import WHOLE, Split
from ..results import OF_TEACHER, asked
from .logits import check_alone, check_logits, check_pair, check_parts, check_teacher_given
from .options import check_splittable, checked_normalizer
from .values import (
    LOGIT_DTYPES,
    WEIGHT_DTYPES,
    TokenRows,
    check_id_dtype,
    check_ignore_index,
    check_plain,
    check_share,
    check_temperature,
    constant,
    of_teacher,
    readable,
)


class CheckedTokens(NamedTuple):
    """The arguments of a function of one id a token."""

    ids: torch.Tensor  # int64
    temperature: float
    ignore_index: int


def _check_ids(
    name: str, ids: torch.Tensor, rows: TokenRows, what: str = "token ids"
) -> torch.Tensor:
    """Token ids or indices, one a token, as int64."""
    rows.check_per_token(name, ids)
    check_id_dtype(name, ids, what)
    return ids if ids.dtype == torch.int64 else ids.long()


def check_token_ids(
    rows: TokenRows, token_ids: torch.Tensor, temperature: float, ignore_index: int
) -> CheckedTokens:
    return CheckedTokens(
        _check_ids("token_ids", token_ids, rows),
        check_temperature(temperature),
        check_ignore_index(ignore_index),
    )


def check_parameters(divergence: Divergence, rows: TokenRows) -> None:
    """Parameters given as tensors."""
    for name, value in zip(divergence.__match_args__, divergence.parameters, strict=True):
        if isinstance(value, torch.Tensor):
            title = f"{name} of {divergence.name}"
            check_plain(title, value)
            if value.dim():
                rows.check_per_token(title, value)
            rows.check_device(title, value)


def check_mask(loss_mask: torch.Tensor, rows: TokenRows) -> None:
    rows.check_per_token("loss_mask", loss_mask)
    constant("loss_mask", loss_mask)
    if loss_mask.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"loss_mask must be bool, int or float, got {loss_mask.dtype}")


def check_normalizer(
    normalizer: float | torch.Tensor | None, rows: TokenRows
) -> float | torch.Tensor | None:
    """The normalizer: a number, for one that lies on a CPU beside logits elsewhere."""
    if not isinstance(normalizer, torch.Tensor):
        return normalizer
    constant("normalizer", normalizer)
    check_plain("normalizer", normalizer)
    unfit = normalizer.dtype not in WEIGHT_DTYPES or normalizer.dtype == torch.bool
    if normalizer.dim() or unfit:
        raise ValueError(
            f"normalizer must be a number or a real 0-d tensor, "
            f"got {normalizer.dtype} of shape {tuple(normalizer.shape)}"
        )
    if normalizer.is_cpu and not rows.tensor.is_cpu:
        return checked_normalizer(normalizer.item())
    rows.check_device("normalizer", normalizer)
    return normalizer


def check_options(rows: TokenRows, arguments: LossArguments) -> LossArguments:
    """Check the tensors among the options that every form of the loss takes, and what they need of the
    others, which :func:`given_options` checked; labels and indices are int64 then."""
    labels, teacher_rows = arguments.labels, arguments.teacher_rows
    if arguments.loss_mask is not None:
        check_mask(arguments.loss_mask, rows)
    if labels is not None:
        labels = _check_ids("labels", labels, rows)
    elif arguments.hard:
        raise ValueError(f"hard_label_weight={arguments.hard_label_weight} needs labels, got None")
    if arguments.soft:
        check_parameters(arguments.divergence, rows)
    if teacher_rows is not None:
        what = "indices of the teacher's rows"
        teacher_rows = _check_ids("teacher_rows", teacher_rows, rows, what)
    normalizer = check_normalizer(arguments.normalizer, rows)
    ids = _check_outputs(rows, arguments)
    return arguments._replace(
        labels=labels, normalizer=normalizer, token_ids=ids, teacher_rows=teacher_rows
    )


def _check_outputs(rows: TokenRows, arguments: LossArguments) -> torch.Tensor | None:
    """What the token outputs need; returns the ids as int64."""
    given, ids = arguments.token_outputs, arguments.token_ids
    of_teacher = asked(OF_TEACHER, given)
    if of_teacher and not arguments.soft:
        raise ValueError(
            f"token_outputs={of_teacher} are of the teacher, who is not read where the divergence has no "
            f"weight: leave them out, or call distillation_metrics"
        )
    if ids is not None:
        if "log_prob" not in given:
            raise ValueError(
                f"token_ids are what token_outputs=('log_prob',) is of, got token_outputs={given}: add "
                f"it, or leave token_ids out"
            )
        return _check_ids("token_ids", ids, rows)
    if "log_prob" in given and arguments.labels is None:
        raise ValueError(
            "token_outputs=('log_prob',) needs labels= or token_ids=, whose log-probability it is"
        )
    return None


def check_dense(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    arguments: LossArguments,
    split: Split = WHOLE,
) -> tuple[LossArguments, int]:
    """Check the tensors of the dense loss; returns its arguments and the number of columns used, of a split
    vocabulary all that this rank has."""
    if split.group is not None:
        check_splittable(arguments.infinities, arguments.token_outputs)
        n_cols = check_parts(student_logits, teacher_logits, arguments.teacher_rows)
    elif teacher_logits is None:
        n_cols = check_alone("student_logits", student_logits, arguments.vocab_size)
    else:
        n_cols = check_pair(
            student_logits, teacher_logits, arguments.vocab_size, arguments.teacher_rows
        )
    arguments = check_options(TokenRows("student_logits", student_logits), arguments)
    check_teacher_given("teacher_logits", teacher_logits, arguments)
    return arguments, n_cols


def check_token_log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, ignore_index: int,
    split: Split = WHOLE,
) -> CheckedTokens:  # fmt: skip
    check_logits("logits", logits, 1 if split.group is None else 0)
    return check_token_ids(TokenRows("logits", logits), token_ids, temperature, ignore_index)


def check_mixture(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_weight: float | torch.Tensor,
    temperature: float,
    ignore_index: int,
) -> tuple[CheckedTokens, float | torch.Tensor]:
    """Check the arguments of ``mixture_token_log_probs``; returns them and the weight."""
    rows = TokenRows("student_logits", student_logits)
    check_pair(student_logits, teacher_logits, None)
    checked = check_token_ids(rows, token_ids, temperature, ignore_index)
    if not isinstance(teacher_weight, torch.Tensor):
        expected = "a number in [0, 1] or a tensor of them"
        return checked, check_share("teacher_weight", teacher_weight, expected)
    constant("teacher_weight", teacher_weight)
    check_plain("teacher_weight", teacher_weight)
    if teacher_weight.dtype not in LOGIT_DTYPES:
        raise TypeError(f"teacher_weight must be floating-point, got {teacher_weight.dtype}")
    if teacher_weight.dim():
        rows.check_per_token("teacher_weight", teacher_weight)
    rows.check_device("teacher_weight", teacher_weight)
    if readable(teacher_weight, checked.ids):
        outside = ~((teacher_weight >= 0) & (teacher_weight <= 1))
        if teacher_weight.dim():
            outside = outside & (checked.ids != checked.ignore_index)
        if outside.any():
            raise ValueError(
                f"teacher_weight must lie in [0, 1], got {teacher_weight[outside][0].item()}"
            )
    return checked, teacher_weight


def check_sampled_log_probs(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check the two models' log-probabilities of the same sampled tokens."""
    for name, tensor in (("student_log_prob", student), ("teacher_log_prob", teacher)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [...], got {type(tensor).__name__}")
        check_plain(name, tensor)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_log_prob must have the shape of student_log_prob, {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    TokenRows("student_log_prob", student).check_device("teacher_log_prob", teacher)
    of_teacher("teacher_log_prob", teacher)
