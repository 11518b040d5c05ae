"""The loss against a top-k teacher, of rows whose columns ranks split: the order of its phases, and what is
exchanged between them. ``rows.py`` is that of whole teachers.

    normalise     SlotStatistics of this rank's columns: of the K that lie in them and of the others
      all-gather  of 6 numbers a row, 10 with a hard label; combined in rank order
    reduce        L and D of the K that lie here, and of the rest of the vocabulary on the first rank
      all-gather  of 3 numbers a row; added in rank order
    differentiate the gradient of this rank's columns, from what is kept of the rows

Every rank has all slots: the teacher's rest, and what it is divided by, need no exchange.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, Protocol

import torch

from ..checks.slots import without_repeats
from ..groups import Place
from ..problem import Options
from ..row_statistics import NEG_INF, RowStatistics, distance, in_two
from ..rows import Tokens, TopKTeacher, mixed
from .rows import RowLosses, hard_label_loss, refuse_labels, scale_of

OF_DIVERGENCE = 6  # of the numbers, the first ones; those that follow are the hard label's
NOWHERE = -(1 << 40)  # an offset: no id and no label lies in the columns that begin there


class SlotStatistics(NamedTuple):
    """Of some columns of n rows: ten numbers a row, each ``[n]``, float32 or float64.

    Sums are of exponentials relative to the maximum beside them, which is -inf where there is nothing
    to sum. The rest are the columns outside the K, where the divergence reads them; the K come as it
    restricts them, their sum without the 1 of their maximum: of a confident student float32 would round
    away the others.
    """

    rest_max: torch.Tensor
    rest_sum: torch.Tensor
    slots_max: torch.Tensor
    slots_more: torch.Tensor
    found: torch.Tensor  # how many of the used slots have their column here
    outside: torch.Tensor  # 1 where a column outside the K is here, else 0
    label_max: torch.Tensor  # of the whole student
    label_sum: torch.Tensor  # at temperature 1
    label_logit: torch.Tensor  # -inf where the label is in no column of the part
    label_found: torch.Tensor  # 1 where it is in one, else 0

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "SlotStatistics":
        """Of ``[6, n]``, without a hard label, or ``[10, n]``."""
        numbers = packed.unbind(0)
        if len(numbers) == OF_DIVERGENCE:
            zero = torch.zeros_like(numbers[0])
            numbers = *numbers, zero + NEG_INF, zero, zero + NEG_INF, zero
        return cls(*numbers)

    @classmethod
    def combine(cls, packed: torch.Tensor, temperature: float) -> "SlotStatistics":
        """Of the columns of all parts ``[parts, 6 or 10, n]``, summed in their order, in float64."""
        parts = [cls.unpack(part) for part in packed.double().unbind(0)]
        numbers = zip(cls._fields, *parts, strict=True)
        whole = cls(*(reduce(_joined(name), of_parts) for name, *of_parts in numbers))
        sums = {}
        for name, first, at in (
            ("rest_sum", 0, temperature), ("slots_more", 1, temperature), ("label_sum", 0, 1.0),
        ):  # fmt: skip
            of_maximum = name.split("_")[0] + "_max"
            maximum = getattr(whole, of_maximum)
            moved = [
                (getattr(x, name) + first) * distance(getattr(x, of_maximum), maximum, at).exp()
                for x in parts
            ]
            sums[name] = reduce(torch.add, moved) - first  # -1 of slots without a finite logit
        return whole._replace(**sums)

    hard_label_loss = RowStatistics.hard_label_loss


def _joined(name: str):
    largest = name.endswith(("_max", "_logit")) or name == "outside"
    return torch.maximum if largest else torch.add


class SlotTeacher(NamedTuple):
    """The K of each row, of whose columns this rank has those from ``offset`` on."""

    log_probs: torch.Tensor  # [N, K]
    ids: torch.Tensor  # [N, K], counted over all columns
    offset: int | torch.Tensor  # [] where nothing on the host needs it

    @classmethod
    def of(cls, teacher: TopKTeacher, place: Place, options: Options) -> "SlotTeacher":
        log_probs, ids = teacher
        # the kernels see to it themselves
        if options.backend == "torch" and (log_probs == NEG_INF).any():
            ids = without_repeats(log_probs, ids.long())
        return cls(log_probs, ids, place.offset)


class Phases(Protocol):
    """What a path computes of this rank's columns, one at least. Labels count from the first of them."""

    KEPT: int  # numbers that are kept of a row: those that row_losses stacks

    combined: Callable | None
    """``(options, tokens, parts, used, sums) -> (losses, components, kept)`` at once, of gathered ``[ranks, 6
    or 10, n]`` and ``[ranks, 3, n]`` (None: not known yet, nor the losses). None: by PyTorch's operations,
    here."""

    def normalise(
        self, options: Options, tokens: Tokens, student, teacher: SlotTeacher, n_cols: int
    ):
        """SlotStatistics, packed ``[6 or 10, n]``, with the number of used slots, of all ranks', in the
        place of ``outside``; 0 or -inf where a weight is 0."""

    def reduce(
        self, options: Options, tokens: Tokens, student, teacher: SlotTeacher, n_cols: int, kept,
        with_rest: bool,
    ):  # fmt: skip
        """``[3, n]``: sums of value and slope, the rest's among them if it is to be, and what the rounding of
        the slopes' left; NaN of rows without a softmax, in either model."""

    def differentiate(
        self, options: Options, tokens: Tokens, student, teacher: SlotTeacher, n_cols: int, kept,
        upstream, out,
    ) -> None:  # fmt: skip
        """Fill the gradient ``out``, that of the reduced loss times ``upstream``, ``[]`` or ``[n]``."""


def row_losses(
    phases: Phases, options: Options, tokens: Tokens, student, teacher: SlotTeacher, place: Place
) -> RowLosses:
    """Losses of rows ``[..., width]`` of this rank's columns; the labels are counted from their first."""
    weights, columns = tokens.weights, _with_a_column(tokens, student, teacher, place.n_cols)
    parts = phases.normalise(options, *columns)
    used, parts[5] = parts[5].clone(), parts[4] < place.n_cols
    gathered = place.group.all_gather(parts)
    missing = (
        _missing(gathered, used, weights) if gathered.is_cpu or phases.combined is None else None
    )

    def summed(kept: torch.Tensor) -> torch.Tensor:
        return place.group.all_gather(
            phases.reduce(options, *columns, kept, with_rest=place.group.rank == 0)
        )

    if phases.combined is not None:
        _, _, kept = phases.combined(options, tokens, gathered, used, None)
        found = phases.combined(options, tokens, gathered, used, summed(kept))
        if options.hard and gathered.is_cpu:
            refuse_labels(gathered[:, -1].sum(0) != 1, weights)
        return RowLosses(*found)
    row = SlotStatistics.combine(gathered, options.temperature)
    scale = scale_of(tokens, row.rest_sum)
    kept = torch.stack(
        [
            row.slots_max, row.slots_more, row.rest_max, row.rest_sum, torch.zeros_like(scale),
            row.label_max, row.label_sum, row.outside, scale, torch.zeros_like(scale),
        ],
        -1,
    ).to(parts.dtype)  # fmt: skip
    loss, slope, more = reduce(torch.add, summed(kept).double().unbind(0))
    loss, slope = (torch.where(missing, torch.nan, x) for x in (loss, slope + more))
    loss, kept[:, 4], kept[:, 9] = loss.to(kept.dtype), *in_two(slope, kept.dtype)
    hard = hard_label_loss(row, weights).to(loss.dtype) if options.hard else None
    shares = options.divergence_scale, options.soft_weight, options.hard_label_weight
    losses, components = mixed(loss, hard, weights, *shares)
    return RowLosses(losses, components, kept)


def differentiate(
    phases: Phases, options: Options, tokens: Tokens, student, teacher: SlotTeacher, n_cols: int,
    kept, upstream, out,
) -> None:  # fmt: skip
    """Fill ``out``, the gradient of this rank's columns, of which there may be none."""
    if n_cols == 0:
        out.zero_()
        return
    phases.differentiate(options, tokens, student, teacher, n_cols, kept, upstream, out)


def _with_a_column(tokens: Tokens, student, teacher: SlotTeacher, n_cols: int):
    """What the phases take: of a rank without columns, one of -inf, which is no token's."""
    if n_cols > 0:
        return tokens, student, teacher, n_cols
    if tokens.labels is not None:
        tokens = tokens._replace(labels=torch.full_like(tokens.labels, -1))
    column = student.new_full((*student.shape[:-1], 1), NEG_INF)
    return tokens, column, teacher._replace(offset=NOWHERE), 1


def _missing(parts: torch.Tensor, used: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``[n]``: rows with an id that no rank has; an error on a CPU, which refuses ids outside the
    vocabulary.

    Raises:
        ValueError: on every rank.
    """
    missing = parts[:, 4].sum(0) != used
    if missing.is_cpu:
        kept = missing if weights is None else missing & (weights != 0)
        if kept.any():
            raise ValueError(
                f"teacher_ids must lie in the vocabulary that the ranks split, or be -1 in unused slots, and no "
                f"rank, or by a wrong vocab_offset several, has one or more of {int(kept.sum())} tokens, the "
                f"first of them at {int(kept.nonzero()[0])}"
            )
    return missing
