"""Metrics of tokens whose vocabulary ranks split: two all-gathers, of 7 numbers a row and of 5."""

from functools import reduce

import torch

from ..checks.values import debug
from ..groups import check_agreement, place_of
from ..problem import MetricsInputs, MetricsOptions
from .losses import facts_of
from .statistics import agreement
from .tokens import TokenStatistics


def metrics(phases, inputs: MetricsInputs, options: MetricsOptions):
    """Sums ``[7, n]`` and the agreement ``[n]``."""
    student, teacher = inputs
    width, temperature = student.shape[-1], options.temperature
    if debug():
        check_agreement(options.split, facts_of(inputs, options), student.device)
    place = place_of(options.split, width, student.device, teacher.shape[-1])
    columns = student, place.of_teacher(teacher, width)
    pairs = place.group.all_gather(
        phases.pair_part(*columns, None, place.n_cols, temperature, inputs.dtype())
    )
    none = torch.zeros_like(pairs[0, 0])
    both = [
        TokenStatistics.combine(
            [TokenStatistics(*part[first : first + 3], none) for part in pairs], temperature
        )
        for first in (0, 3)
    ]
    kept = torch.stack([x for row in both for x in (row.maximum, row.total)])
    parts = place.group.all_gather(phases.pair_sums(*columns, place.n_cols, temperature, kept))
    alive = (both[0].total > 0) & (both[1].total > 0)
    sums = torch.cat(
        [reduce(torch.add, parts.unbind(0)), torch.stack([row.entropy() for row in both])]
    )
    return sums.masked_fill_(~alive, torch.nan), agreement(pairs) & alive
