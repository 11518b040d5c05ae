"""Checks of the statistics of tokens, of logits and of hidden states, and of the coefficients of a loss."""

import math
from typing import NamedTuple

import torch

from ..arguments import LossArguments
from ..divergences.base import Divergence, as_divergence
from ..groups import WHOLE, Split
from ..problem import HeadOptions
from ..results import StatisticsCoefficients
from ..scalars import integer, number, shown
from .heads import check_head, check_heads
from .logits import check_pair, check_parts
from .options import head_options
from .tokens import check_parameters, check_token_ids
from .values import WEIGHT_DTYPES, TokenRows, check_plain, constant

Coefficients = tuple[float | torch.Tensor | None, ...] | None


class CheckedStatistics(NamedTuple):
    """The arguments of a function of statistics."""

    ids: torch.Tensor  # int64
    loss: LossArguments  # the divergence is the routed one
    n_cols: int
    coefficients: tuple[float | torch.Tensor, ...]  # three; empty where there is no loss

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The coefficients, None for those that are tensors."""
        return tuple(None if isinstance(x, torch.Tensor) else x for x in self.coefficients)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The coefficients that are tensors."""
        return [x for x in self.coefficients if isinstance(x, torch.Tensor)]


def _coefficient(name: str, value: float | torch.Tensor | None, rows: TokenRows):
    """A number, 0 for None, or a tensor ``[]`` or ``[...]``."""
    if value is None:
        return 0.0
    if isinstance(value, torch.Tensor):
        constant(name, value)
        check_plain(name, value)
        if value.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"{name} must be a number or a tensor of bool, int or float, got {value.dtype}"
            )
        if value.dim():
            rows.check_per_token(name, value)
        if value.dim() or not value.is_cpu or rows.tensor.is_cpu:
            rows.check_device(name, value)
            return value
        value = value.item()
    value = number(name, value, "a number or a tensor of one a token")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_coefficients(
    coefficients: Coefficients, rows: TokenRows
) -> tuple[float | torch.Tensor, ...]:
    """What a loss multiplies the statistics by; empty where there is none."""
    if coefficients is None:
        return ()
    names = StatisticsCoefficients._fields
    if not isinstance(coefficients, tuple) or len(coefficients) != len(names):
        raise TypeError(
            f"coefficients must be StatisticsCoefficients({', '.join(names)}) or a tuple of these three, "
            f"got {shown(coefficients)}"
        )
    if all(x is None for x in coefficients):
        raise ValueError(
            "coefficients are None, all three: give one of them, or leave coefficients out"
        )
    return tuple(
        _coefficient(f"coefficients.{name}", x, rows)
        for name, x in zip(names, coefficients, strict=True)
    )


def _checked(
    rows: TokenRows, token_ids: torch.Tensor, divergence: Divergence | str, temperature: float,
    ignore_index: int, n_cols: int, coefficients: Coefficients,
) -> CheckedStatistics:  # fmt: skip
    ids, temperature, ignore_index = check_token_ids(rows, token_ids, temperature, ignore_index)
    divergence = as_divergence(divergence)
    check_parameters(divergence, rows)
    arguments = LossArguments(
        divergence, temperature=temperature, reduction="none", ignore_index=ignore_index
    )
    return CheckedStatistics(ids, arguments, n_cols, check_coefficients(coefficients, rows))


def check_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    divergence: Divergence | str,
    temperature: float,
    ignore_index: int,
    coefficients: Coefficients,
    split: Split = WHOLE,
) -> CheckedStatistics:
    """Check the arguments of ``distillation_statistics``."""
    if split.group is None:
        n_cols = check_pair(student_logits, teacher_logits, None)
    else:
        n_cols = check_parts(student_logits, teacher_logits)
    rows = TokenRows("student_logits", student_logits)
    return _checked(rows, token_ids, divergence, temperature, ignore_index, n_cols, coefficients)


def check_linear_statistics(
    student: tuple[torch.Tensor | None, ...],  # hidden states, weight, bias
    teacher: tuple[torch.Tensor | None, ...],
    token_ids: torch.Tensor,
    divergence: Divergence | str,
    temperature: float,
    ignore_index: int,
    vocab_size: int | None,
    coefficients: Coefficients,
    split: Split = WHOLE,
    token_ranks: int = 1,
) -> CheckedStatistics:
    """Check the arguments of ``linear_distillation_statistics`` but those of the heads' logits."""
    if vocab_size is not None:
        vocab_size = integer("vocab_size", vocab_size, 1)
    least = int(split.group is None)
    check_head("student_", *student, least=least)
    check_head("teacher_", *teacher, frozen=True, least=least)
    rows = TokenRows("student_hidden", student[0], token_ranks)
    arguments = LossArguments(vocab_size=vocab_size)
    n_cols = check_heads(rows, student[1], *teacher[:2], arguments, split=split)
    return _checked(rows, token_ids, divergence, temperature, ignore_index, n_cols, coefficients)


def both_heads(
    student_logit_scale: float, student_softcap: float | None, teacher_logit_scale: float,
    teacher_softcap: float | None,
) -> tuple[HeadOptions, HeadOptions]:  # fmt: skip
    """How hidden states become logits, of student and teacher."""
    return (
        head_options("student_", student_logit_scale, student_softcap),
        head_options("teacher_", teacher_logit_scale, teacher_softcap),
    )
