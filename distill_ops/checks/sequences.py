"""Checks of what policy losses take of a batch of sequences: a mask of its valid tokens, and numbers of each.

What stands at other tokens is not looked at, and is replaced before anything is computed."""

import math
from typing import NamedTuple

import torch

from ..scalars import number, one_of
from .values import LOGIT_DTYPES, WEIGHT_DTYPES, check_plain, constant, readable

IGNORE_INDEX = -100  # of ids at tokens that are not valid
REDUCTIONS = ("mean", "sum")
INCLUDED = ("current", "next")
PRODUCTS = ("token", "before", "through", "sequence")


class ValidTokens(NamedTuple):
    """Which tokens of ``[..., sequence]`` count."""

    mask: torch.Tensor  # bool

    @classmethod
    def of(cls, mask: torch.Tensor) -> "ValidTokens":
        """Check a mask as users give it: bool, or 0 and 1."""
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask must be a tensor [batch, sequence], got {type(mask).__name__}")
        check_plain("mask", mask)
        constant("mask", mask)
        if mask.dim() == 0:
            raise ValueError("mask must be [batch, sequence], got shape ()")
        if mask.dtype == torch.bool:
            return cls(mask)
        if mask.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"mask must be bool, or 0 and 1, got {mask.dtype}")
        valid = mask != 0
        if readable(mask):
            wrong = valid & (mask != 1)
            if wrong.any():
                raise ValueError(
                    f"mask must hold 0 and 1 (valid), got {mask[wrong][0].item()}: token ids and "
                    f"weights are arguments of their own"
                )
        return cls(valid)

    def check_shape(self, name: str, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{name} must be a tensor [batch, sequence], got {type(tensor).__name__}"
            )
        check_plain(name, tensor)
        if tensor.shape != self.mask.shape:
            raise ValueError(
                f"{name} must have the shape of mask, {tuple(self.mask.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device != self.mask.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but mask on {self.mask.device}: move one of them"
            )

    def numbers(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        fill: float = 0.0,
        finite: bool = False,
        no_gradient: bool = False,
    ) -> torch.Tensor:
        """Numbers of each token, ``fill`` where it is not valid; at least float32."""
        self.check_shape(name, tensor)
        if tensor.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if no_gradient:
            constant(name, tensor)
        if readable(tensor, self.mask):
            given = tensor.detach()[self.mask]
            wrong = ~given.isfinite() if finite else given.isnan()
            if wrong.any():
                expected = "finite numbers" if finite else "numbers"
                raise ValueError(
                    f"{name} must hold {expected} where mask is set, got {given[wrong][0].item()}"
                )
        return tensor.to(working_dtype(tensor)).masked_fill(~self.mask, fill)

    def ids(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 ids, ``IGNORE_INDEX`` where the token is not valid."""
        self.check_shape("token_ids", token_ids)
        if token_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"token_ids must be int64 or int32 token ids, got {token_ids.dtype}")
        if readable(token_ids, self.mask) and (self.mask & (token_ids == IGNORE_INDEX)).any():
            raise ValueError(
                f"token_ids must be ids of the vocabulary where mask is set, got {IGNORE_INDEX}: "
                f"leave that token out of mask"
            )
        return token_ids.long().masked_fill(~self.mask, IGNORE_INDEX)

    def shares(self, reduction: str, dtype: torch.dtype) -> torch.Tensor:
        """What a token's term is multiplied by: 1 ("sum"), or 1 over their number; 0 where it is not valid."""
        valid = self.mask.to(dtype)
        return valid / self.mask.sum().clamp(min=1) if reduction == "mean" else valid


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where one of them is, else float32."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def check_positive(name: str, value: float | None, none: str = "") -> float | None:
    """A positive number, or None where ``none`` says what that means."""
    if value is None and none:
        return None
    expected = f"a positive number{none and f', or None {none}'}"
    value = number(name, value, expected)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_clip(clip: float | None) -> float | None:
    """The half width of the interval around 1 to which a ratio is clipped."""
    return check_positive("clip", clip, "for no clipping")


def check_finite(name: str, value: float) -> float:
    value = number(name, value, "a finite number")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_reduction(reduction: str) -> str:
    hints = {"none": "the terms are of one loss", "batchmean": "'mean' is over the valid tokens"}
    return one_of("reduction", reduction, REDUCTIONS, hints)
