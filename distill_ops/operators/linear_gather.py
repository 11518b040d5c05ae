"""The operators of K tokens a row of hidden states: one product, a block of tokens at a time."""

from collections.abc import Callable

import torch

from ..checks import contents
from ..heads.engine import Engine
from ..heads.projection import Projection
from ..heads.select import on_device, select
from ..problem import NO_GRADIENTS, BlockOptions, HeadOptions
from ..rows import Tokens
from ..selection import largest_ids
from ..support import (
    LinearGatherInputs,
    LinearGatherOptions,
    LinearTopInputs,
    LinearTopOptions,
)
from .gather import gather_fake, top_fake
from .path import path_of
from .register import LossOperator, Plan


def of_blocks(
    inputs: LinearTopInputs | LinearGatherInputs,
    head: HeadOptions,
    blocks: BlockOptions,
    backend: str,
    n_cols: int,
    weights: torch.Tensor | None,  # [n]
    found: torch.Tensor,  # [n, K]
    of_rows: Callable[[torch.Tensor, slice | torch.Tensor], torch.Tensor],
) -> None:
    """Write to the rows of ``found`` that count what ``of_rows`` makes of their logits, which it gets with
    their places."""
    with on_device(inputs.hidden):
        wide = inputs.dtype() == torch.float64
        _, selection = select(Tokens(None, weights, 1.0, ()), inputs.n_rows, backend, None)
        projection = Projection.of(
            *inputs[:3], head, selection, n_cols, wide, blocks.autocast, backend == "triton"
        )
        logits_dtype = torch.float64 if wide else blocks.logits_dtype

        def store(logits: torch.Tensor, rows: slice, _) -> None:
            places = rows if selection.index is None else selection.index[rows]
            found[places] = of_rows(logits, places)

        Engine(projection, logits_dtype, NO_GRADIENTS, blocks.memory_budget, 0).run(store)


def top_forward(inputs: LinearTopInputs, options: LinearTopOptions, plan: Plan):
    """Ids ``[..., k]``."""
    top, head, blocks = options
    ids = inputs.hidden.new_empty((inputs.n_rows, top.k), dtype=torch.int64)
    of_blocks(
        inputs, head, blocks, top.backend, top.n_cols, None, ids,
        lambda logits, _: largest_ids(logits, top.k, top.n_cols),
    )  # fmt: skip
    return (ids.view(*inputs.leading, top.k),), ()


def gather_forward(inputs: LinearGatherInputs, options: LinearGatherOptions, plan: Plan):
    """Log-probabilities ``[..., K]``."""
    (backend, temperature, n_cols), head, blocks = options
    shape, weights, dtype = inputs.ids.shape, inputs.loss_mask, inputs.dtype()
    ids = inputs.ids.reshape(inputs.n_rows, shape[-1])
    weights = None if weights is None else weights.reshape(-1)
    found = inputs.hidden.new_full(ids.shape, -torch.inf, dtype=dtype)
    path = path_of(backend)

    def of_rows(logits: torch.Tensor, places):
        mask = None if weights is None else weights[places]
        return path.log_probs_at(logits, ids[places], mask, temperature, n_cols, dtype)

    of_blocks(inputs, head, blocks, backend, n_cols, weights, found, of_rows)
    return (found.view(shape),), ()


linear_top_ids = LossOperator(
    "linear_top_ids", LinearTopInputs, LinearTopOptions, forward=top_forward, fake=top_fake
)
linear_gather_log_probs = LossOperator(
    "linear_gather_log_probs", LinearGatherInputs, LinearGatherOptions, forward=gather_forward,
    fake=gather_fake, check=contents.of_linear_gather,
)  # fmt: skip
