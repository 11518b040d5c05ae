"""Checks of the tensors that come with the tokens: labels, masks, parameters, ids, normalizer."""

import math
from typing import NamedTuple

import torch

from ..arguments import Counted, LossArguments
from ..divergences.base import Divergence, Domain, as_divergence
from .logits import check_alone, check_logits, check_pair, check_teacher_given
from .values import (
    LOGIT_DTYPES,
    WEIGHT_DTYPES,
    TokenRows,
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
    name: str, ids: torch.Tensor, rows: TokenRows, n_cols: int | None, counted: Counted
) -> torch.Tensor:
    """Token ids, one a token, as int64; what a token that does not count holds does not matter.
    ``n_cols`` is None where they only say which tokens count."""
    rows.check_per_token(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32 token ids, got {ids.dtype}")
    if n_cols is not None and readable(ids, *counted[:2]):
        outside = ((ids < 0) | (ids >= n_cols)) & counted.kept(ids)
        if outside.any():
            raise ValueError(
                f"{name} must lie in [0, {n_cols}) or equal ignore_index={counted.ignore_index}, "
                f"got {ids[outside].flatten()[0].item()}"
            )
    return ids.long()


def check_token_ids(
    rows: TokenRows, n_cols: int, token_ids: torch.Tensor, temperature: float, ignore_index: int
) -> CheckedTokens:
    temperature, ignore_index = check_temperature(temperature), check_ignore_index(ignore_index)
    counted = Counted(None, token_ids, ignore_index)
    ids = _check_ids("token_ids", token_ids, rows, n_cols, counted)
    return CheckedTokens(ids, temperature, ignore_index)


def _outside(value: torch.Tensor, domain: Domain) -> torch.Tensor:
    if domain.tensor_ends:
        return ~((value >= domain.low) & (value <= domain.high))
    return ~((value > domain.low) & (value < domain.high))


def check_parameters(divergence: Divergence, rows: TokenRows, counted: Counted) -> None:
    """Parameters given as tensors; of a token that does not count any value will do."""
    for name, value in zip(divergence.__match_args__, divergence.parameters, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        title = f"{name} of {divergence.name}"
        check_plain(title, value)
        if value.dim():
            rows.check_per_token(title, value)
        rows.check_device(title, value)
        if not readable(value, *counted[:2]):
            continue
        domain = divergence.domain(name)
        outside = _outside(value, domain)
        if value.dim():
            outside = outside & counted.kept(outside)
        if outside.any():
            raise ValueError(
                f"{title}, a tensor, must hold values {domain.text(domain.tensor_ends)}, "
                f"got {value[outside].flatten()[0].item()}"
            )


def _check_weights(rows: TokenRows, counted: Counted) -> None:
    loss_mask, _, ignore_index = counted
    rows.check_per_token("loss_mask", loss_mask)
    constant("loss_mask", loss_mask)
    if loss_mask.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"loss_mask must be bool, int or float, got {loss_mask.dtype}")
    if loss_mask.dtype == torch.bool or not readable(loss_mask):
        return
    if loss_mask.is_floating_point():
        if math.isfinite(loss_mask.sum(dtype=torch.float64).item()):
            return
        bad = ~loss_mask.isfinite()
        if bad.any():
            raise ValueError(f"loss_mask must hold finite weights, got {loss_mask[bad][0].item()}")
        return
    weights = loss_mask.long()
    ids = weights < -1  # policy gradients have integer weights of -1
    if ignore_index not in (0, 1):
        ids = ids | (weights == ignore_index)
    if ids.any():
        raise ValueError(
            f"loss_mask must hold weights, got {loss_mask[ids][0].item()}, as token ids have it: pass "
            f"labels=, or loss_mask=labels != {ignore_index}"
        )


def _check_normalizer(arguments: LossArguments, rows: TokenRows) -> None:
    """A tensor's shape; of a tensor or number that it is positive where a token counts."""
    normalizer, counted = arguments.normalizer, arguments.counted
    tensor = isinstance(normalizer, torch.Tensor)
    if tensor:
        constant("normalizer", normalizer)
        check_plain("normalizer", normalizer)
        rows.check_device("normalizer", normalizer)
        if (
            normalizer.dim()
            or normalizer.dtype not in WEIGHT_DTYPES
            or normalizer.dtype == torch.bool
        ):
            raise ValueError(
                f"normalizer must be a number or a real 0-d tensor, "
                f"got {normalizer.dtype} of shape {tuple(normalizer.shape)}"
            )
    given = (normalizer, *counted[:2]) if tensor else counted[:2]
    if (not tensor and normalizer > 0) or not readable(rows.tensor, *given):
        return
    value = normalizer.item() if tensor else normalizer
    if 0 < value < math.inf or not counted.kept(rows.tensor[..., 0]).any():
        return
    raise ValueError(
        f"normalizer must be positive and finite where a token counts (it is what the sum is divided "
        f"by), got {value}"
    )


def check_options(rows: TokenRows, n_cols: int, arguments: LossArguments) -> LossArguments:
    """Check the tensors among the options that every form of the loss takes, and what they need of the
    others, which :func:`given_options` checked; labels are int64 then."""
    labels, weight = arguments.labels, arguments.hard_label_weight
    if arguments.loss_mask is not None:
        _check_weights(rows, arguments.counted)
    if labels is not None:
        labels = _check_ids(
            "labels", labels, rows, n_cols if weight > 0 else None, arguments.counted
        )
        arguments = arguments._replace(labels=labels)
    elif weight > 0:
        raise ValueError(f"hard_label_weight={weight} needs labels, got None")
    if weight < 1:
        check_parameters(arguments.divergence, rows, arguments.counted)
    if arguments.normalizer is not None:
        _check_normalizer(arguments, rows)
    return arguments


def check_dense(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, arguments: LossArguments
) -> tuple[LossArguments, int]:
    """Check the tensors of the dense loss; returns its arguments and the number of columns used."""
    if teacher_logits is None:
        n_cols = check_alone("student_logits", student_logits, arguments.vocab_size)
    else:
        n_cols = check_pair(student_logits, teacher_logits, arguments.vocab_size)
    arguments = check_options(TokenRows("student_logits", student_logits), n_cols, arguments)
    check_teacher_given("teacher_logits", teacher_logits, arguments.hard_label_weight)
    return arguments, n_cols


def check_token_log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, ignore_index: int
) -> CheckedTokens:
    check_logits("logits", logits)
    rows = TokenRows("logits", logits)
    return check_token_ids(rows, logits.shape[-1], token_ids, temperature, ignore_index)


def check_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    divergence: Divergence | str,
    temperature: float,
    ignore_index: int,
) -> tuple[CheckedTokens, Divergence]:
    """Check the arguments of ``distillation_statistics``; the divergence is the routed one."""
    rows = TokenRows("student_logits", student_logits)
    n_cols = check_pair(student_logits, teacher_logits, None)
    checked = check_token_ids(rows, n_cols, token_ids, temperature, ignore_index)
    divergence = as_divergence(divergence)
    check_parameters(divergence, rows, Counted(None, checked.ids, checked.ignore_index))
    return checked, divergence


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
    n_cols = check_pair(student_logits, teacher_logits, None)
    checked = check_token_ids(rows, n_cols, token_ids, temperature, ignore_index)
    if not isinstance(teacher_weight, torch.Tensor):
        expected = "a number in [0, 1] or a tensor of them"
        return checked, check_share("teacher_weight", teacher_weight, expected)
    constant("teacher_weight", teacher_weight)
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
