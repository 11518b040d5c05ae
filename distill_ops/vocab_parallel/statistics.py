"""Statistics of tokens whose vocabulary ranks split, and their gradient.

normalise, pair_part  RowStatistics of this rank's columns, and each model's softmax of them
  all-gather          of at most 15 numbers a row (``_packed``); combined in rank order
reduce                L and D, for a divergence whose sums these do not give
  all-gather          of 3 numbers a row
statistics_gradient   the gradient of this rank's columns, from what is kept of the rows
"""

import torch

from ..checks.values import debug
from ..groups import Place, check_agreement, place_again, place_of
from ..problem import Options, StatisticsInputs
from ..row_statistics import OF_DIVERGENCE
from ..rows import IGNORED, Tokens, parameters_of
from .losses import facts_of
from .rows import CLOSED, losses_of, refuse_nowhere
from .tokens import TokenStatistics, local_ids, logits_at

# Of phases.pair_part: maximum, sum and moment of each model, and whether they agree.
PAIR = 7


def _which(options: Options) -> tuple[list[slice], list[slice]]:
    """The numbers of RowStatistics and of the pair that are sent: without the moments where sums follow,
    and a softmax that both have once, which is the teacher's, and the student's where the divergence does
    not restrict it."""
    kind = options.kind()
    closed = kind.moment in CLOSED
    of_rows = [slice(0, OF_DIVERGENCE)] if closed else [slice(0, 4), slice(7, 8)]
    return of_rows, [slice(0 if kind.infinite_at_teacher_zero else 2, 3), slice(5, PAIR)]


def _packed(options: Options, of_rows: torch.Tensor, pair: torch.Tensor, *logits: torch.Tensor):
    first, second = _which(options)
    return torch.cat(
        [*(of_rows[x] for x in first), *(pair[x] for x in second), torch.stack(logits)]
    )


def _unpacked(options: Options, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """RowStatistics ``[ranks, 8, n]``, the pairs' numbers ``[ranks, 7, n]`` and the token's logits
    ``[ranks, 2, n]``, of gathered numbers."""
    first, second = _which(options)
    n_ranks, _, n_rows = packed.shape
    of_rows = packed.new_zeros((n_ranks, OF_DIVERGENCE, n_rows))
    pairs = packed.new_zeros((n_ranks, PAIR, n_rows))
    at = 0

    def take(target: torch.Tensor, places: list[slice]) -> None:
        nonlocal at
        for place in places:
            n = place.stop - place.start
            target[:, place] = packed[:, at : at + n]
            at += n

    take(of_rows, first)
    pairs[:, :2], pairs[:, 3:5] = of_rows[:, :2], of_rows[:, 2:4]
    take(pairs, second)
    return of_rows, pairs, packed[:, at:]


def of_pairs(pairs: torch.Tensor, logits: torch.Tensor, temperature: float) -> TokenStatistics:
    """Of whole rows of student and teacher, each ``[2, n]``, from the numbers of all ranks."""
    maximum, total, moment = (pairs[:, i:6:3] for i in range(3))
    return TokenStatistics(maximum, total, moment, logits).combined(temperature)


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
        check_agreement(split, facts_of(inputs, options), student.device, student.shape[-1])
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
    of_rows, pairs, logits = _unpacked(options, gathered)
    both = of_pairs(pairs, logits, temperature)
    refuse_nowhere("token_ids", both.nowhere().any(0) & ~ignored)
    found = losses_of(phases, options, tokens, *models, place, of_rows, own)
    entropies = both.entropy()
    outputs = torch.cat([found.losses[None], both.log_prob(temperature), entropies])
    alive = (both.total > 0).all(0)
    student = TokenStatistics(*(x[0] for x in both))
    kept = found.kept, student.kept(entropies[0])
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
