"""Log-probabilities of K tokens a row: the row's sweep (``token_row.py``), and a gather from it.

With ``m`` the row's maximum and ``l`` its sum of exponentials, a token's log-probability is
``(x - m) / T - log(l)``: the row is read once, then K of its logits again, which a cache has.
"""

import torch
import triton
import triton.language as tl

from .layout import row_layouts
from .math import INFINITY, LOG2E
from .rows import RUN_TIME, first_position, pointers, row_offset, rows_launch
from .sweeps import PEELED
from .token_row import token_log_prob, token_sweep


@triton.jit(do_not_specialize=RUN_TIME)
def gather_kernel(
    logits_ptr, logits_start, logits_outer, logits_inner,
    ids_ptr, weights_ptr, log_probs_ptr,
    n_inner, n_rows, n_cols, k, over_t,
    HAS_WEIGHTS: tl.constexpr, BLOCK_K: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, LOGITS_MATCHED: tl.constexpr,
):  # fmt: skip
    """Log-probabilities ``[n_rows, k]`` of the ids ``[n_rows, k]``: -inf in unused slots (id -1) and in
    rows of weight 0, which are not read; NaN for an id outside the vocabulary."""
    lane = tl.arange(0, BLOCK_K)
    given = lane < k
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        offset = row_offset(row, logits_start, logits_outer, logits_inner, n_inner)
        lead = (offset % 8).to(tl.int32) if ENDS == PEELED else 0
        logits = first_position(logits_ptr, offset, lead, LOGITS_MATCHED)
        slots = tl.cast(row, tl.int64) * k
        weight = tl.cast(tl.load(weights_ptr + row) if HAS_WEIGHTS else 1.0, tl.float32)
        log_prob = tl.full([BLOCK_K], -INFINITY, tl.float32)
        if weight != 0.0:
            m, l, _, _ = token_sweep(
                logits, lead, n_cols, over_t * LOG2E, LANES, WIDTH, ENDS, False, False, False
            )
            token_id = tl.load(ids_ptr + slots + lane, mask=given, other=-1)
            used = (token_id >= 0) & (token_id < n_cols)
            position = (token_id + lead).to(tl.int32)
            x = tl.load(logits + position, mask=used, other=float("nan"))
            found = token_log_prob(x, m, l, over_t)
            log_prob = tl.where(token_id == -1, -INFINITY, found)
        tl.store(log_probs_ptr + slots + lane, log_prob, mask=given)


def run(
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [N, K], contiguous
    temperature: float,
    n_cols: int,
    *,
    log_probs: torch.Tensor,  # [N, K] float32, contiguous: written
    weights: torch.Tensor | None = None,  # [N], of any dtype but bool
) -> None:
    """Launch the gather kernel."""
    n_rows, k = ids.shape
    if n_rows == 0:
        return
    n_inner, (logits_rows,) = row_layouts(logits)
    grid, arguments = rows_launch(
        {"logits": logits_rows}, [logits], n_rows, n_cols, logits.shape[-1]
    )
    gather_kernel[grid](
        **arguments,
        **pointers(logits, ids=ids, weights=weights, log_probs=log_probs),
        n_inner=n_inner,
        k=k,
        over_t=1.0 / temperature,
        HAS_WEIGHTS=weights is not None,
        BLOCK_K=triton.next_power_of_2(k),
    )
