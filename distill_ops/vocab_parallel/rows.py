"""The phases of a loss of rows whose columns ranks split, in their order, and what is exchanged between.

    normalise     RowStatistics of this rank's columns
      all-gather  of 8 numbers a row, 12 with a hard label; combined in rank order
    reduce        L and D of this rank's columns, for a divergence whose sums the statistics do not give
      all-gather  of 3 numbers a row; added in rank order
    differentiate the gradient of this rank's columns, from what is kept of the rows

A path (CPU, GPU) has the three, this module what lies between them, which is ``[n]`` tensors alone.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, Protocol

import torch

from ..divergences.base import Divergence
from ..groups import Place
from ..problem import Options
from ..row_statistics import CLOSED, RowStatistics
from ..rows import Tokens, mixed


class Phases(Protocol):
    """What a path computes of this rank's columns. Labels count from the first of them."""

    def fills(self, options: Options, student, gradient: torch.Tensor, n_cols: int) -> bool:
        """Whether :meth:`normalise` has a use for the memory of such a gradient, which is made after it."""

    def normalise(
        self, options: Options, tokens: Tokens, student, teacher, n_cols: int, room=None
    ):  # fmt: skip
        """RowStatistics, packed ``[8 or 12, n]``; of the empty part where a weight is 0. In ``room``, memory
        for which :meth:`fills` said yes, it leaves what :meth:`differentiate` takes from there."""

    KEPT: int  # numbers that are kept of a row

    def kept_rows(self, options: Options, row: RowStatistics, slope, scale, parts) -> torch.Tensor:
        """``[n, KEPT]`` as :meth:`reduce` and :meth:`differentiate` take them, of rows' statistics, their D
        and factor of the gradient, and what :meth:`normalise` gave: whatever of these the path needs."""

    combined: Callable | None
    """``(options, tokens, parts, sums) -> (losses, components, kept)`` at once, of gathered ``[ranks, 8 or 12,
    n]`` and ``[ranks, 3, n]`` (None: not known yet, or not needed). None: by PyTorch's operations, here."""

    def reduce(self, options: Options, tokens: Tokens, student, teacher, n_cols: int, kept):
        """``[3, n]``: sums of value and slope, and whether the columns have no infinity."""

    def differentiate(
        self, options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, upstream, out,
        filled: bool = False,
    ) -> None:  # fmt: skip
        """Fill the gradient ``out``, that of the reduced loss times ``upstream``, ``[]`` or ``[n]``; ``filled``:
        it was ``room``."""


class RowLosses(NamedTuple):
    """What the collectives give, the same on every rank."""

    losses: torch.Tensor  # [n], weighted
    components: torch.Tensor | None  # [2, n]
    kept: torch.Tensor  # [n, KEPT]


def local(tokens: Tokens, place: Place) -> Tokens:
    """The tokens with labels counted from this rank's first column."""
    if tokens.labels is None:
        return tokens
    return tokens._replace(labels=tokens.labels - place.offset)


def row_losses(
    phases: Phases, options: Options, tokens: Tokens, student, teacher, place: Place, room=None
) -> RowLosses:
    """Losses of rows ``[..., width]`` of this rank's columns; the tokens are :func:`local`."""
    parts = phases.normalise(options, tokens, student, teacher, place.n_cols, room)
    gathered = place.group.all_gather(parts)
    return losses_of(phases, options, tokens, student, teacher, place, gathered, parts)


def losses_of(
    phases: Phases, options: Options, tokens: Tokens, student, teacher, place: Place,
    gathered: torch.Tensor, parts: torch.Tensor,
) -> RowLosses:  # fmt: skip
    """The same from what :meth:`Phases.normalise` gave, on every rank and on this one."""
    kind, weights, columns = options.kind(), tokens.weights, (student, teacher, place.n_cols)
    if phases.combined is not None:
        found = RowLosses(*phases.combined(options, tokens, gathered, None))
        if kind is not None and kind.moment not in CLOSED:
            sums = place.group.all_gather(phases.reduce(options, tokens, *columns, found.kept))
            found = RowLosses(*phases.combined(options, tokens, gathered, sums))
        if options.hard and gathered.is_cpu:
            refuse_labels(gathered[:, -1].sum(0) != 1, tokens.weights)
        return found
    row = RowStatistics.combine(
        [RowStatistics.unpack(part) for part in gathered], kind or Divergence, options.temperature
    )
    loss, slope = None, torch.zeros_like(row.student_sum)
    scale = scale_of(tokens, slope)
    if kind is not None and kind.moment in CLOSED:
        loss, slope = row.loss_and_slope(kind)
    elif kind is not None:
        kept = phases.kept_rows(options, row, slope, scale, parts)
        sums = place.group.all_gather(phases.reduce(options, tokens, *columns, kept))
        loss, slope, _ = reduce(torch.add, sums.unbind(0))
        row = row._replace(fast=torch.minimum(row.fast, sums[:, 2].amin(0)))
        alive = (row.student_sum > 0) & (row.teacher_sum > 0)
        loss, slope = (torch.where(alive, x, torch.nan) for x in (loss, slope))
    hard = hard_label_loss(row, weights) if options.hard else None
    losses, components = mixed(
        loss,
        hard,
        weights,
        options.divergence_scale,
        options.soft_weight,
        options.hard_label_weight,
    )
    return RowLosses(losses, components, phases.kept_rows(options, row, slope, scale, parts))


def differentiate(
    phases: Phases, options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, upstream,
    out, filled: bool = False,
) -> None:  # fmt: skip
    """Fill ``out``, the gradient of this rank's columns."""
    phases.differentiate(options, tokens, student, teacher, n_cols, kept, upstream, out, filled)


def scale_of(tokens: Tokens, like: torch.Tensor) -> torch.Tensor:
    """``[n]``: the factor of a row's gradient by its weight and the reduction."""
    scale = torch.ones_like(like) if tokens.weights is None else tokens.weights
    return torch.where(scale == 0, 0.0, scale / tokens.denominator).to(like.dtype)


def hard_label_loss(row: RowStatistics, weights: torch.Tensor | None) -> torch.Tensor:
    """NaN of a label that no rank has, or several with a wrong offset, which a CPU refuses, as it does without a split.

    Raises:
        ValueError: on every rank.
    """
    nowhere = row.label_found != 1
    refuse_labels(nowhere, weights)
    return torch.where(nowhere, torch.nan, row.hard_label_loss())


def refuse_labels(nowhere: torch.Tensor, weights: torch.Tensor | None) -> None:
    """:func:`refuse_nowhere` of tokens that count."""
    refuse_nowhere("labels", nowhere if weights is None else nowhere & (weights != 0))


def refuse_nowhere(name: str, nowhere: torch.Tensor) -> None:
    """Refuse labels or ids that no rank has, ``[n]``, on a CPU, where no host waits to know.

    Raises:
        ValueError: on every rank.
    """
    if nowhere.is_cpu and nowhere.any():
        raise ValueError(
            f"{name} must lie in the vocabulary that the ranks split or equal ignore_index, and no rank, or "
            f"by a wrong vocab_offset several, has that of {int(nowhere.sum())} tokens, the first of them "
            f"at {int(nowhere.nonzero()[0])}"
        )
