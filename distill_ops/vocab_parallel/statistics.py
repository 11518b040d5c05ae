"""Statistics of tokens whose vocabulary ranks split, and their gradient.

normalise, pair_part  RowStatistics of this rank's columns, and each model's softmax of them
  all-gather          of at most 15 numbers a row (``_packed``); combined in rank order
reduce                L and D, for a divergence whose sums these do not give
  all-gather          of 3 numbers a row
statistics_gradient   the gradient of this rank's columns, from what is kept of the rows
"""

import torch

from ..checks.values import debug
from ..divergences.base import Divergence
from ..groups import Place, check_agreement, place_again, place_of
from ..problem import Options, StatisticsInputs
from ..row_statistics import OF_DIVERGENCE, RowStatistics
from ..rows import IGNORED, Tokens, parameters_of
from .losses import facts_of
from .rows import CLOSED, losses_of, refuse_nowhere
from .tokens import TokenStatistics, local_ids, logits_at

PAIR = (
    7  # numbers of phases.pair_part: maximum, sum and moment of each model, and whether they agree
)
WITHOUT_MOMENTS = (
    0,
    1,
    2,
    3,
    7,
)  # of RowStatistics, those that a divergence without closed sums needs


def _which(options: Options) -> tuple[list[int], list[int]]:
    """The numbers of RowStatistics and of the pair that are sent. A softmax that both have is sent once:
    the teacher's, and the student's where the divergence does not restrict it."""
    kind = options.kind()
    closed = kind.moment in CLOSED
    of_rows = list(range(OF_DIVERGENCE)) if closed else list(WITHOUT_MOMENTS)
    return of_rows, [0, 1, 2, 5, 6] if kind.infinite_at_teacher_zero else [2, 5, 6]


def _packed(options: Options, of_rows: torch.Tensor, pair: torch.Tensor, *logits: torch.Tensor):
    first, second = _which(options)
    return torch.cat([of_rows[first], pair[second], torch.stack(logits)])


def _unpacked(options: Options, packed: torch.Tensor):
    """RowStatistics ``[8, n]``, the pair's numbers ``[7, n]`` and the token's logits of a part."""
    first, second = _which(options)
    of_rows = packed.new_zeros((OF_DIVERGENCE, packed.shape[1]))
    of_rows[first] = packed[: len(first)]
    pair = packed.new_zeros((PAIR, packed.shape[1]))
    pair[:2], pair[3:5] = of_rows[:2], of_rows[2:4]
    pair[second] = packed[len(first) : -2]
    return of_rows, pair, packed[-2:]


def agreement(pairs: torch.Tensor) -> torch.Tensor:
    """``[n]``: whether the first maximum of both models' rows is one column, of ``[ranks, 7, n]``: it is in
    the first rank that has the maximum, and where that is one rank, that rank knows."""
    student, teacher = (
        (pairs[:, i] == pairs[:, i].amax(0)).int().argmax(0, keepdim=True) for i in (0, 3)
    )
    there = pairs[:, 6].gather(0, student)
    return ((student == teacher) & (there > 0))[0]


def statistics(phases, inputs: StatisticsInputs, options: Options):
    """``[5, ...]``, the agreement ``[...]``, and what the gradient needs: numbers of the rows for the
    divergence and for the token, and the offset."""
    student, teacher, split = *inputs[:2], options.split
    if debug():
        check_agreement(split, facts_of(inputs, options), student.device)
    width = student.shape[-1]
    place = place_of(split, width, student.device, teacher.shape[-1])
    here = inputs._replace(teacher=place.of_teacher(teacher, width))
    outputs, agree, kept = statistics_of_rows(phases, here, options, place)
    leading = inputs.leading
    outputs, agree = outputs.view(len(outputs), *leading), agree.view(leading)
    return outputs, agree, (*kept, place.kept(kept[0]))


def statistics_of_rows(phases, inputs: StatisticsInputs, options: Options, place: Place):
    """``[5, n]``, the agreement ``[n]``, and numbers of the rows for the divergence and for the token, of
    this rank's columns of both models.

    Raises:
        ValueError: on every rank, on a CPU, for an id that no rank has.
    """
    models, dtype, temperature = inputs[:2], inputs.dtype(), options.temperature
    ids = local_ids(inputs.ids, options.ignore_index, place)
    ignored = ids == IGNORED
    tokens = Tokens(None, (~ignored).to(dtype), 1.0, parameters_of(inputs, options))
    own = phases.normalise(options, tokens, *models, place.n_cols)
    pair = phases.pair_part(*models, ids, place.n_cols, temperature, dtype)
    logits = (logits_at(x, ids, dtype) for x in models)
    gathered = place.group.all_gather(_packed(options, own, pair, *logits))
    of_rows, pairs, logits = (
        torch.stack(x) for x in zip(*(_unpacked(options, part) for part in gathered), strict=True)
    )
    row = RowStatistics.combine(
        [RowStatistics.unpack(part) for part in of_rows], options.kind() or Divergence, temperature
    )
    of_student, of_teacher = (
        TokenStatistics.combine(
            [TokenStatistics(*pairs[rank, first : first + 3], logits[rank, i]) for rank in range(len(pairs))],
            temperature,
        )
        for i, first in enumerate((0, 3))
    )  # fmt: skip
    nowhere = of_student.nowhere() | of_teacher.nowhere()
    refuse_nowhere("token_ids", nowhere & ~ignored)
    found = losses_of(phases, options, tokens, *models, place, row, own)
    both = of_student, of_teacher
    entropies = [x.entropy() for x in both]
    outputs = torch.stack([found.losses, *(x.log_prob(temperature) for x in both), *entropies])
    alive = (of_student.total > 0) & (of_teacher.total > 0)
    kept = found.kept, of_student.kept(entropies[0])
    return outputs.masked_fill_(ignored, 0.0), agreement(pairs) & alive, kept


def gradient(phases, inputs: StatisticsInputs, options: Options, kept, upstream, out) -> None:
    """Fill ``out`` with the gradient of this rank's columns for ``upstream``, ``[5, n]``; no collective."""
    student, teacher = inputs[:2]
    *of_rows, offset = kept
    width = student.shape[-1]
    place = place_again(options.split, offset, width, teacher.shape[-1])
    here = inputs._replace(teacher=place.of_teacher(teacher, width))
    gradient_of_rows(phases, here, options, place, of_rows, upstream, out)


def gradient_of_rows(
    phases, inputs: StatisticsInputs, options: Options, place: Place, kept, upstream, out
) -> None:
    """Fill ``out``, which may be over the student's logits, for what :func:`statistics_of_rows` keeps."""
    ids = local_ids(inputs.ids, options.ignore_index, place)
    parameters = parameters_of(inputs, options)
    phases.statistics_gradient(options, parameters, *inputs[:2], ids, kept, upstream, out)
