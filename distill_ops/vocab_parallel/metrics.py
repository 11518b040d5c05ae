"""Metrics of tokens whose vocabulary ranks split: two all-gathers, of 7 numbers a row and of 5."""

from functools import reduce

import torch

from ..checks.values import debug
from ..groups import check_agreement, place_of
from ..problem import MetricsInputs, MetricsOptions
from .losses import facts_of
from .statistics import agreement, of_pairs


def metrics(phases, inputs: MetricsInputs, options: MetricsOptions):
    """Sums ``[7, n]`` and the agreement ``[n]``."""
    student, teacher = inputs
    width, temperature = student.shape[-1], options.temperature
    if debug():
        facts = facts_of(inputs, options)
        check_agreement(options.split, facts, student.device, student.shape[-1])
    place = place_of(options.split, width, student.device, teacher.shape[-1])
    columns = student, place.of_teacher(teacher, width)
    pairs = place.group.all_gather(
        phases.pair_part(*columns, None, place.n_cols, temperature, inputs.dtype())
    )
    both = of_pairs(pairs, torch.zeros_like(pairs[:, :2]), temperature)
    kept = torch.stack([both.maximum, both.total], 1).flatten(0, 1)
    parts = place.group.all_gather(phases.pair_sums(*columns, place.n_cols, temperature, kept))
    alive = (both.total > 0).all(0)
    sums = torch.cat([reduce(torch.add, parts.unbind(0)), both.entropy()])
    return sums.masked_fill_(~alive, torch.nan), agreement(pairs) & alive
