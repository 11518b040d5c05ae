"""Checks of what comes with the tokens: labels, masks, parameters, ids; and of the options of a loss."""

import math

import torch

from ..arguments import Counted, LossArguments
from ..divergences.base import Divergence, Domain, as_divergence
from .logits import check_alone, check_logits, check_pair, check_teacher_given
from .values import (
    TokenRows,
    check_share,
    check_temperature,
    constant,
    number,
    of_teacher,
    one_of,
    readable,
)

REDUCTIONS = ("mean", "sum", "none")
INFINITIES = ("drop", "propagate")


def _check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _check_ids(
    name: str, ids: torch.Tensor, rows: TokenRows, n_cols: int, counted: Counted
) -> None:
    """Token ids, one a token; what a token that does not count holds does not matter."""
    rows.check_per_token(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 token ids, got {ids.dtype}")
    if not readable(*counted[:2]):
        return
    outside = ((ids < 0) | (ids >= n_cols)) & counted.kept(ids)
    if outside.any():
        raise ValueError(
            f"{name} must lie in [0, {n_cols}) or equal ignore_index={counted.ignore_index}, "
            f"got {ids[outside].flatten()[0].item()}"
        )


def check_token_ids(
    token_ids: torch.Tensor, rows: TokenRows, n_cols: int, ignore_index: int
) -> Counted:
    """Check one id a row; returns which tokens count."""
    _check_ignore_index(ignore_index)
    counted = Counted(None, token_ids, ignore_index)
    _check_ids("token_ids", token_ids, rows, n_cols, counted)
    return counted


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


def check_normalizer(
    normalizer: float | torch.Tensor | None, reduction: str, rows: TokenRows
) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer replaces the token count of reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(normalizer, torch.Tensor):
        constant("normalizer", normalizer)
        rows.check_device("normalizer", normalizer)
        if normalizer.dim() != 0 or normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise ValueError(
                f"normalizer must be a number or a real 0-d tensor, "
                f"got {normalizer.dtype} of shape {tuple(normalizer.shape)}"
            )
    elif not 0 <= number("normalizer", normalizer, "a number or a 0-d tensor") < math.inf:
        raise ValueError(f"normalizer must be finite and not negative, got {normalizer}")


def check_options(rows: TokenRows, n_cols: int, arguments: LossArguments) -> Divergence:
    """Check the options that every form of the loss takes; returns the routed divergence."""
    loss_mask, labels, ignore_index = arguments.counted
    one_of("reduction", arguments.reduction, REDUCTIONS)
    divergence = as_divergence(arguments.divergence)
    check_temperature(arguments.temperature)
    weight = check_share("hard_label_weight", arguments.hard_label_weight)
    if loss_mask is not None:
        rows.check_per_token("loss_mask", loss_mask)
        constant("loss_mask", loss_mask)
        if loss_mask.is_complex():
            raise TypeError(f"loss_mask must be bool, int or float, got {loss_mask.dtype}")
    _check_ignore_index(ignore_index)
    if labels is not None:
        _check_ids("labels", labels, rows, n_cols, arguments.counted)
    elif weight > 0:
        raise ValueError(f"hard_label_weight={weight} needs labels, got None")
    if weight < 1:
        check_parameters(divergence, rows, arguments.counted)
    check_normalizer(arguments.normalizer, arguments.reduction, rows)
    return divergence


def check_dense(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, arguments: LossArguments
) -> tuple[Divergence, int]:
    """Check the arguments of the dense loss; returns the divergence, routed to the one that it is at
    an end point, and the number of columns used."""
    one_of("infinities", arguments.infinities, INFINITIES)
    if teacher_logits is None:
        n_cols = check_alone("student_logits", student_logits, arguments.vocab_size)
    else:
        n_cols = check_pair(student_logits, teacher_logits, arguments.vocab_size)
    divergence = check_options(TokenRows("student_logits", student_logits), n_cols, arguments)
    check_teacher_given("teacher_logits", teacher_logits, arguments.hard_label_weight)
    return divergence, n_cols


def check_token_log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, ignore_index: int
) -> None:
    check_logits("logits", logits)
    check_temperature(temperature)
    check_token_ids(token_ids, TokenRows("logits", logits), logits.shape[-1], ignore_index)


def _check_pair_and_ids(student_logits, teacher_logits, token_ids, temperature, ignore_index):
    n_cols = check_pair(student_logits, teacher_logits, None)
    check_temperature(temperature)
    rows = TokenRows("student_logits", student_logits)
    return rows, check_token_ids(token_ids, rows, n_cols, ignore_index)


def check_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    divergence: Divergence | str,
    temperature: float,
    ignore_index: int,
) -> Divergence:
    """Check the arguments of ``distillation_statistics``; returns the routed divergence."""
    tokens = _check_pair_and_ids(
        student_logits, teacher_logits, token_ids, temperature, ignore_index
    )
    divergence = as_divergence(divergence)
    check_parameters(divergence, *tokens)
    return divergence


def check_mixture(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_weight: float | torch.Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    """Check the arguments of ``mixture_token_log_probs``."""
    rows, counted = _check_pair_and_ids(
        student_logits, teacher_logits, token_ids, temperature, ignore_index
    )
    if not isinstance(teacher_weight, torch.Tensor):
        check_share("teacher_weight", teacher_weight, "a number in [0, 1] or a tensor of them")
        return
    constant("teacher_weight", teacher_weight)
    if not teacher_weight.is_floating_point():
        raise TypeError(f"teacher_weight must be floating-point, got {teacher_weight.dtype}")
    if teacher_weight.dim():
        rows.check_per_token("teacher_weight", teacher_weight)
    rows.check_device("teacher_weight", teacher_weight)
    if not readable(teacher_weight, *counted[:2]):
        return
    outside = ~((teacher_weight >= 0) & (teacher_weight <= 1))
    if teacher_weight.dim():
        outside = outside & counted.kept(token_ids)
    if outside.any():
        raise ValueError(
            f"teacher_weight must lie in [0, 1], got {teacher_weight[outside][0].item()}"
        )


def check_sampled_log_probs(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check the two models' log-probabilities of the same sampled tokens."""
    for name, tensor in (("student_log_prob", student), ("teacher_log_prob", teacher)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [...], got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_log_prob must have the shape of student_log_prob, {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    TokenRows("student_log_prob", student).check_device("teacher_log_prob", teacher)
    of_teacher("teacher_log_prob", teacher)
