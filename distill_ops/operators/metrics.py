"""The operator of the metrics of tokens, which has no derivative."""

import torch

from ..problem import MetricsInputs, MetricsOptions
from ..results import DistillationMetrics
from ..vocab_parallel import metrics as split_metrics
from .path import path_of, phases_of
from .register import LossOperator, Plan

N_SUMS = len(DistillationMetrics._fields) - 1


def forward(inputs: MetricsInputs, options: MetricsOptions, plan: Plan):
    """Sums ``[N_SUMS, ...]`` and the agreement ``[...]``."""
    if options.split.group is None:
        sums, agreement = path_of(options.backend).metrics_of_tokens(inputs, options)
    else:
        sums, agreement = split_metrics.metrics(phases_of(options.backend), inputs, options)
    return (sums.view(N_SUMS, *inputs.leading), agreement.view(inputs.leading)), ()


def fake(inputs: MetricsInputs, options: MetricsOptions, plan: Plan):
    new, leading = inputs.student.new_empty, inputs.leading
    return (new((N_SUMS, *leading), dtype=inputs.dtype()), new(leading, dtype=torch.bool)), ()


distillation_metrics = LossOperator(
    "metrics", MetricsInputs, MetricsOptions, forward=forward, fake=fake, outputs=2
)
