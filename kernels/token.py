"""Log-probabilities and entropies of tokens, and their gradient: the launches (``token_row.py``)."""

import torch
import triton
import triton.language as tl

from . import launch
from .layout import row_layouts, uniform_rows
from .math import LOG2E
from .rows import RUN_TIME, first_position, pointers, row_offset, rows_launch
from .sweeps import PEELED, fill_zero
from .token_row import token_gradient, token_log_prob, token_sweep

KEPT = tl.constexpr(launch.TOKEN_STATISTICS)


@triton.jit(do_not_specialize=RUN_TIME)
def token_kernel(
    logits_ptr, logits_start, logits_outer, logits_inner,
    gradient_ptr, gradient_start, gradient_outer, gradient_inner,
    ids_ptr, log_probs_ptr, entropies_ptr, statistics_ptr, upstream_ptr, upstream_entropy_ptr,
    n_inner, n_rows, n_cols, over_t, ignore_index,
    ENTROPY: tl.constexpr, WRITE_STATISTICS: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    LOGITS_MATCHED: tl.constexpr, GRADIENT_MATCHED: tl.constexpr,
):  # fmt: skip
    """Forward launch: log-probabilities, entropies (ENTROPY) and, where asked for, TOKEN_STATISTICS
    numbers a row. WRITE_GRADIENT: the gradient from them and from both upstream gradients (the
    entropy's only with ENTROPY). A row whose id is ``ignore_index`` is not read: 0 everywhere.
    """
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        offset = row_offset(row, logits_start, logits_outer, logits_inner, n_inner)
        gradient_offset = row_offset(row, gradient_start, gradient_outer, gradient_inner, n_inner)
        lead = (offset % 8).to(tl.int32) if ENDS == PEELED else 0
        logits = first_position(logits_ptr, offset, lead, LOGITS_MATCHED)
        gradient = first_position(gradient_ptr, gradient_offset, lead, GRADIENT_MATCHED)
        kept = statistics_ptr + tl.cast(row, tl.int64) * KEPT
        token_id = tl.load(ids_ptr + row)
        read_it = token_id != ignore_index
        if WRITE_GRADIENT:
            if read_it:
                upstream = tl.load(upstream_ptr + row)
                upstream_entropy = tl.load(upstream_entropy_ptr + row) if ENTROPY else 0.0
                token_gradient(
                    logits, gradient, lead, n_cols, token_id,
                    tl.load(kept), tl.load(kept + 1), tl.load(kept + 2), over_t,
                    upstream, upstream_entropy, LANES, WIDTH, ENDS, ENTROPY,
                )  # fmt: skip
            else:
                fill_zero(gradient, lead, n_cols, 0, LANES, WIDTH, ENDS)
        else:
            log_prob = 0.0
            m = 0.0
            l = 0.0
            entropy = 0.0
            if read_it:
                m, l, entropy, _ = token_sweep(
                    logits, lead, n_cols, over_t * LOG2E, LANES, WIDTH, ENDS, False, ENTROPY, False
                )
                known = (token_id >= 0) & (token_id < n_cols)
                logit = tl.load(logits + lead + token_id, mask=known, other=float("nan"))
                log_prob = token_log_prob(logit, m, l, over_t)
            tl.store(log_probs_ptr + row, log_prob)
            if ENTROPY:
                tl.store(entropies_ptr + row, entropy)
            if WRITE_STATISTICS:
                tl.store(kept, m)
                tl.store(kept + 1, l)
                tl.store(kept + 2, entropy)


def run(
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N] int64
    temperature: float,
    ignore_index: int,
    *,
    log_probs: torch.Tensor | None = None,  # [N] float32
    entropies: torch.Tensor | None = None,  # [N] float32
    statistics: torch.Tensor | None = None,  # [N, TOKEN_STATISTICS]
    gradient: torch.Tensor | None = None,  # like logits, contiguous, or the logits: write it
    upstream: torch.Tensor | None = None,  # [N] float32, of the log-probabilities
    upstream_entropy: torch.Tensor | None = None,  # [N] float32
) -> None:
    """Launch the token kernel: log-probabilities, or the gradient from the statistics."""
    n_inner, layouts = row_layouts(logits)
    n_rows = ids.numel()
    if n_rows == 0:
        return
    n_cols = logits.shape[-1]
    (logits_rows,) = layouts
    rows = {"logits": logits_rows, "gradient": logits_rows}
    if not (gradient is None or gradient is logits):
        rows["gradient"] = uniform_rows(gradient, n_inner)
    grid, arguments = rows_launch(rows, [logits], n_rows, n_cols, n_cols)
    arguments |= pointers(
        logits, ids=ids, log_probs=log_probs, entropies=entropies, statistics=statistics,
        upstream=upstream, upstream_entropy=upstream_entropy,
    )  # fmt: skip
    token_kernel[grid](
        **arguments,
        n_inner=n_inner,
        over_t=1.0 / temperature,
        ignore_index=ignore_index,
        ENTROPY=(entropies if gradient is None else upstream_entropy) is not None,
        WRITE_STATISTICS=gradient is None and statistics is not None,
        WRITE_GRADIENT=gradient is not None,
    )
