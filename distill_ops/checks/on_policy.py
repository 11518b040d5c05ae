"""Checks of what comes with the tokens of on-policy distillation."""

import math
from typing import NamedTuple

import torch

from ..problem import working_dtype
from .contents import LARGEST_SUM
from .on_policy_options import OnPolicyArguments
from .tokens import check_normalizer, check_token_ids
from .values import WEIGHT_DTYPES, TokenRows, check_float_dtype, constant, of_teacher, readable


class OnPolicyTokens(NamedTuple):
    """What comes with the tokens, checked; numbers float32, or float64 where a model's are."""

    ids: torch.Tensor  # int64; ignore_index where a token does not count
    kept: torch.Tensor  # bool: those that count
    weights: torch.Tensor  # mask * token_weights; 0 where a token does not count
    denominator: torch.Tensor  # 0-d: what their sum is divided by; 1 for "sum" and "none"
    behaviour_log_probs: torch.Tensor | None  # 0 where a token does not count
    teacher_log_probs: torch.Tensor | None  # likewise


def _check_weights(name: str, tensor: torch.Tensor, rows: TokenRows) -> None:
    rows.check_per_token(name, tensor)
    constant(name, tensor)
    if tensor.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{name} must be bool, int or float, got {tensor.dtype}")


def _check_log_probs(name: str, tensor: torch.Tensor, rows: TokenRows) -> None:
    rows.check_per_token(name, tensor)
    check_float_dtype(name, tensor)
    of_teacher(name, tensor) if name == "teacher_log_probs" else constant(name, tensor)


def _look(name: str, tensor: torch.Tensor, bad: torch.Tensor, expected: str) -> None:
    if bad.any():
        raise ValueError(f"{name} must hold {expected}, got {tensor[bad].flatten()[0].item():g}")


def _check_contents(tokens: OnPolicyTokens, mask: torch.Tensor, options: OnPolicyArguments) -> None:
    """What tensors hold where a token counts, which is looked at where it can be read."""
    if mask.dtype != torch.bool:
        numbers = "finite numbers, not negative (1 where a token counts, 0 elsewhere)"
        _look("mask", mask, ~(mask.isfinite() & (mask >= 0)), numbers)
    if options.token_weights is not None:
        _look(
            "token_weights", options.token_weights,
            ~options.token_weights.isfinite() & tokens.kept, "finite numbers",
        )  # fmt: skip
    for name in ("behaviour_log_probs", "teacher_log_probs"):
        values = getattr(tokens, name)
        if values is None:
            continue
        fine, expected = values <= math.log(LARGEST_SUM), "log-probabilities, at most 0"
        if name == "behaviour_log_probs":  # a token of probability 0 would not have been sampled
            fine, expected = fine & (values > -math.inf), f"finite {expected}"
        _look(name, values, ~fine & tokens.kept, expected)
    if options.normalizer is not None and tokens.kept.any():
        over = tokens.denominator.item()
        if not 0 < over < math.inf:
            raise ValueError(f"normalizer must be positive where a token counts, got {over}")


def check_on_policy_tokens(
    rows: TokenRows,
    models: tuple[torch.Tensor | None, ...],
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    options: OnPolicyArguments,
) -> OnPolicyTokens:
    """Check what comes with the tokens; ``models``: the tensors that say in which dtype is computed."""
    ids, _, ignore_index = check_token_ids(
        rows, token_ids, options.temperature, options.ignore_index
    )
    _check_weights("mask", mask, rows)
    if options.importance_level == "prefix" and not token_ids.dim():
        raise ValueError(
            "importance_level='prefix' needs token_ids [..., S], whose last axis is a sequence, got "
            "a single token"
        )
    if options.token_weights is not None:
        _check_weights("token_weights", options.token_weights, rows)
    for name in ("behaviour_log_probs", "teacher_log_probs"):
        if getattr(options, name) is not None:
            _check_log_probs(name, getattr(options, name), rows)
    normalizer, dtype = check_normalizer(options.normalizer, rows), working_dtype(*models)
    kept = (mask != 0) & (ids != ignore_index)
    weights = mask.to(dtype).masked_fill(~kept, 0.0)
    total = weights.new_ones(())
    if isinstance(normalizer, torch.Tensor):
        total = normalizer.to(dtype)
    elif normalizer is not None:
        total = weights.new_full((), normalizer)
    elif options.reduction == "mean":
        total = weights.sum()
    # without a token that counts the sum is 0, and so is the mean
    denominator = torch.where(kept.any(), total, torch.ones_like(total))
    if options.token_weights is not None:
        weights = weights * options.token_weights.to(dtype).masked_fill(~kept, 0.0)
    given = (options.behaviour_log_probs, options.teacher_log_probs)
    given = (x if x is None else x.detach().to(dtype).masked_fill(~kept, 0.0) for x in given)
    tokens = OnPolicyTokens(
        ids.masked_fill(~kept, ignore_index), kept, weights, denominator, *given
    )
    if readable(mask, *given_tensors(options)):
        _check_contents(tokens, mask, options)
    return tokens


def given_tensors(options: OnPolicyArguments) -> list[torch.Tensor]:
    return [x for x in options if isinstance(x, torch.Tensor)]


def check_teacher_of_sampled(
    options: OnPolicyArguments, name: str, teacher: torch.Tensor | None
) -> bool:
    """Whether a teacher is its log-probabilities of the tokens, and not logits or hidden states, ``name``."""
    served = options.objective == "sampled" and options.teacher_log_probs is not None
    if served and teacher is not None:
        raise ValueError(f"{name} must be None where teacher_log_probs is given, got both")
    if options.objective == "sampled" and teacher is None and not served:
        raise ValueError(f"{name} is None, which needs teacher_log_probs, got None")
    return served
