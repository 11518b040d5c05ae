"""The operator of the statistics of tokens."""

import torch

from ..checks import contents
from ..kernels.launch import STATISTICS, TOKEN_STATISTICS
from ..problem import BACKWARD, Options, StatisticsInputs
from .path import path_of
from .register import LossOperator, Plan

OUTPUTS = 5  # divergence, both log-probabilities, both entropies


def forward(inputs: StatisticsInputs, options: Options, plan: Plan):
    """``[OUTPUTS, ...]``, and the agreement ``[...]``."""
    path = path_of(options.backend)
    outputs, agreement, kept = path.statistics_of_tokens(inputs, options, plan.made == BACKWARD)
    return (outputs, agreement), kept


def gradient(inputs: StatisticsInputs, options: Options, plan: Plan, kept, upstreams):
    out = torch.empty_like(inputs.student, memory_format=torch.contiguous_format)
    upstream = upstreams[0].reshape(OUTPUTS, -1).contiguous()
    path_of(options.backend).statistics_gradient(inputs, options, kept, upstream, out)
    return (out,)


def fake(inputs: StatisticsInputs, options: Options, plan: Plan):
    new, dtype, n_rows = inputs.student.new_empty, inputs.dtype(), inputs.n_rows
    kept = None, None
    if plan.made == BACKWARD:
        triton = options.backend == "triton"
        sizes = [(n_rows, STATISTICS), (n_rows, TOKEN_STATISTICS)] if triton else [None, n_rows]
        kept = tuple(None if size is None else new(size, dtype=dtype) for size in sizes)
    outputs = new((OUTPUTS, *inputs.leading), dtype=dtype)
    return (outputs, new(inputs.leading, dtype=torch.bool)), kept


distillation_statistics = LossOperator(
    "distillation_statistics", StatisticsInputs, Options, forward=forward, gradient=gradient,
    fake=fake, check=contents.of_statistics, students=("student",), outputs=2, kept=2,
)  # fmt: skip
