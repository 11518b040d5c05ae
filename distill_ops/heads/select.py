"""Which tokens of a call have their logits formed, and the device and autocast around it."""

import contextlib
import math

import torch

from ..rows import Tokens
from .projection import Selection


def select(
    tokens: Tokens, n_rows: int, backend: str, kept_tokens: int | None
) -> tuple[Tokens, Selection]:
    """The tokens that are computed.

    The CPU path drops those of weight 0. The kernels, whose launches the GPU's values cannot decide,
    compute all, or the first ``kept_tokens`` in an order that puts weight 0 last; were there more,
    all weights are NaN, so that the loss and gradients tell of it."""
    weights = tokens.weights
    if weights is None:
        return tokens, Selection(n_rows, None, None)
    unread = weights == 0
    if backend == "torch":
        if not unread.any():
            return tokens, Selection(n_rows, None, None)
        index = (~unread).nonzero().squeeze(-1)
        return tokens.rows(index), Selection(len(index), index, None)
    bound = kept_tokens
    if bound is None or bound >= n_rows:
        return tokens, Selection(n_rows, None, unread)
    index = unread.to(torch.uint8).argsort(stable=True)[:bound]
    poison = torch.where((~unread).sum() > bound, math.nan, 1.0)
    tokens = tokens.rows(index)
    weights = tokens.weights * poison
    return tokens._replace(weights=weights), Selection(bound, index, weights == 0)


def placed(
    found: torch.Tensor | None, selection: Selection, n_tokens: int, fill: int = 0
) -> torch.Tensor | None:
    """Results ``[..., n]`` of the selected tokens, if there are any, at their places among all; ``fill`` at
    the others'."""
    if selection.index is None or found is None:
        return found
    everywhere = found.new_full((*found.shape[:-1], n_tokens), fill)
    return everywhere.index_copy_(-1, selection.index, found)


def by_teacher_row(tokens: Tokens, selection: Selection) -> tuple[Tokens, Selection]:
    """The tokens that are computed, those that share a row of the teacher's beside each other; values
    decide, for which a GPU would wait."""
    rows = tokens.teacher_rows
    if (rows[1:] >= rows[:-1]).all():
        return tokens, selection
    order = rows.argsort(stable=True)
    index = order if selection.index is None else selection.index[order]
    return tokens.rows(order), selection._replace(index=index)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def on_device(hidden: torch.Tensor):
    """The device of the kernels; without autocast, which would cast the products once more."""
    with contextlib.ExitStack() as stack:
        if hidden.is_cuda:
            stack.enter_context(torch.cuda.device(hidden.device))
        if autocasts(hidden.device):
            stack.enter_context(torch.autocast(hidden.device.type, enabled=False))
        yield
