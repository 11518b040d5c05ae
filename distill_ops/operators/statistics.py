"""The operator of the statistics of tokens, and what it shares with that of hidden states: the loss that
coefficients make of them, and the upstream gradients."""

import torch

from ..checks import contents
from ..kernels.launch import STATISTICS, TOKEN_STATISTICS
from ..problem import (
    BACKWARD,
    FORWARD,
    NO_GRADIENT,
    LinearStatisticsInputs,
    LinearStatisticsOptions,
    Options,
    StatisticsInputs,
    StatisticsOptions,
)
from ..vocab_parallel import statistics as split_statistics
from .path import path_of, phases_of
from .register import LossOperator, Plan

OUTPUTS = 5  # divergence, both log-probabilities, both entropies
OTHERWISE = "leave coefficients out, and weigh the statistics"
DIFFERENTIABLE = 0, 1, 3  # the divergence, the student's log-probability and entropy

Inputs = StatisticsInputs | LinearStatisticsInputs
AnyOptions = StatisticsOptions | LinearStatisticsOptions


def coefficient_rows(inputs: Inputs, options: AnyOptions) -> torch.Tensor:
    """``[OUTPUTS, n]``: what the loss multiplies the outputs by, 0 where the token is ignored."""
    ids, tensors = inputs.ids.reshape(-1), iter(inputs.coefficients)
    rows = ids.new_zeros((OUTPUTS, len(ids)), dtype=inputs.dtype())
    for i, number in zip(DIFFERENTIABLE, options.coefficients, strict=True):
        rows[i] = next(tensors).reshape(-1) if number is None else number
    return rows.masked_fill_(ids == options.loss.ignore_index, 0.0)


def times(coefficients: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The product; 0 where the coefficient is, be the value infinite."""
    return torch.where(coefficients == 0, 0.0, coefficients * values)


def loss_of(outputs: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """``[]``: the sum over tokens of outputs ``[OUTPUTS, ...]`` times their coefficients."""
    return times(coefficients, outputs.view(OUTPUTS, -1)).sum()


def asking(inputs: StatisticsInputs, options: Options, upstream: torch.Tensor) -> StatisticsInputs:
    """The inputs of a gradient for ``[OUTPUTS, n]``: a token for which all of it is 0 is ignored, so that
    its row is not read and its gradient is 0 whatever the row holds."""
    ids = inputs.ids.reshape(-1)
    ids = torch.where((upstream == 0).all(0), options.ignore_index, ids)
    return inputs._replace(ids=ids.view(inputs.leading))


def upstream_rows(inputs: Inputs, options: AnyOptions, upstreams) -> torch.Tensor:
    """``[OUTPUTS, n]``, of the upstream gradients of the loss and of the outputs; one may be None."""
    of_loss, of_outputs = upstreams
    rows = None if of_outputs is None else of_outputs.reshape(OUTPUTS, -1)
    if options.coefficients and of_loss is not None:
        through = times(coefficient_rows(inputs, options), of_loss)
        rows = through if rows is None else rows + through
    return rows.contiguous()


def kept_shapes(n_rows: int, options: Options) -> tuple[tuple[int, ...] | None, ...]:
    """Of what a path keeps of the rows for a gradient made in the backward."""
    if options.split.group is not None:
        return (n_rows, phases_of(options.backend).KEPT), (n_rows, TOKEN_STATISTICS)
    if options.backend == "triton":
        return (n_rows, STATISTICS), (n_rows, TOKEN_STATISTICS)
    return None, (n_rows,)


def statistics_of(inputs: StatisticsInputs, options: Options, keep: bool):
    """``[OUTPUTS, ...]``, the agreement ``[...]``, and what the gradient needs of the rows, and of a split
    vocabulary the offset."""
    if options.split.group is not None:
        return split_statistics.statistics(phases_of(options.backend), inputs, options)
    found = path_of(options.backend).statistics_of_tokens(inputs, options, keep)
    outputs, agreement, kept = found
    return outputs, agreement, (*kept, None)


def write_gradient(
    inputs: StatisticsInputs, options: Options, kept, upstream: torch.Tensor, out: torch.Tensor
) -> None:
    """Fill ``out`` with the gradient for ``[OUTPUTS, n]``."""
    if options.split.group is not None:
        phases = phases_of(options.backend)
        split_statistics.gradient(phases, inputs, options, kept, upstream, out)
    else:
        path_of(options.backend).statistics_gradient(inputs, options, kept[:2], upstream, out)


def fakes(inputs: Inputs, options: AnyOptions, plan: Plan):
    """The outputs, and what is kept for a gradient made in the backward."""
    new, dtype = inputs[0].new_empty, inputs.dtype()
    kept = None, None, None
    if plan.made == BACKWARD:
        shapes = kept_shapes(inputs.n_rows, options.loss)
        offset = None if options.loss.split.group is None else new((), dtype=torch.int64)
        kept = *(None if shape is None else new(shape, dtype=dtype) for shape in shapes), offset
    loss = new((), dtype=dtype) if options.coefficients else None
    outputs = new((OUTPUTS, *inputs.leading), dtype=dtype)
    return (loss, outputs, new(inputs.leading, dtype=torch.bool)), kept


def forward(inputs: StatisticsInputs, options: StatisticsOptions, plan: Plan):
    """The loss ``[]`` where there are coefficients, ``[OUTPUTS, ...]``, and the agreement ``[...]``; kept
    is the gradient, made here, or what it needs of the rows."""
    outputs, agreement, kept = statistics_of(inputs, options.loss, plan.made != NO_GRADIENT)
    if plan.made == NO_GRADIENT:
        kept = None, None, None
    if not options.coefficients:
        return (None, outputs, agreement), kept
    coefficients = coefficient_rows(inputs, options)
    if plan.made == FORWARD:
        made = torch.empty_like(inputs.student, memory_format=torch.contiguous_format)
        asked = asking(inputs, options.loss, coefficients)
        write_gradient(asked, options.loss, kept, coefficients, made)
        kept = made, None, None
    return (loss_of(outputs, coefficients), outputs, agreement), kept


def gradient(inputs: StatisticsInputs, options: StatisticsOptions, plan: Plan, kept, upstreams):
    out = torch.empty_like(inputs.student, memory_format=torch.contiguous_format)
    upstream = upstream_rows(inputs, options, upstreams)
    if options.coefficients:
        inputs = asking(inputs, options.loss, upstream)
    write_gradient(inputs, options.loss, kept, upstream, out)
    return (out,)


def fake(inputs: StatisticsInputs, options: StatisticsOptions, plan: Plan):
    outputs, kept = fakes(inputs, options, plan)
    if plan.made == FORWARD:
        kept = inputs.student.new_empty(inputs.student.shape), None, None
    return outputs, kept


distillation_statistics = LossOperator(
    "distillation_statistics", StatisticsInputs, StatisticsOptions, forward=forward, gradient=gradient,
    fake=fake, check=contents.of_statistics, students=("student",), outputs=3, kept=3, differentiable=2,
    otherwise=OTHERWISE,
)  # fmt: skip
