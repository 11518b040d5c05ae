"""Log-probabilities and entropies of a row's tokens, and their gradient.

With ``x`` a logit, ``m`` the row's maximum, ``y = (x - m) / T`` and ``l = sum(exp(y))``, the token's
log-probability is ``y_id - log(l)`` and the entropy ``H = log(l) - sum(exp(y) * y) / l``, in which no
two terms cancel: one sweep. Their gradient for upstream gradients ``g`` and ``h``,

    (g (1[j = id] - q_j) - h q_j (log(q_j) + H)) / T    with    q_j = exp(y_j) / l,

is ``exp(y_j) * (a + b * y_j)`` with numbers ``a`` and ``b`` of the row, but at the token itself, which
is written over it.

There is one form of each loop, for every row: taking the maximum from a logit costs one instruction
more than folding it into the scale does, and neither -inf nor the lowest float needs a guard then.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .dense import device_facts, first_position, plan, row_offset
from .layout import row_layouts, uniform_rows
from .math import INFINITY, LN2, LOG2E, from_float32
from .sweeps import (
    LOWEST,
    NOWHERE,
    PEELED,
    UNROLL,
    combine_lanes,
    fill_zero,
    read,
    rescale,
    tile,
    whole_tiles,
    write,
)

KEPT = tl.constexpr(launch.TOKEN_STATISTICS)


@triton.jit
def token_tile(
    state, row, position, inside, c,
    MASKED: tl.constexpr, KEEP: tl.constexpr, ENTROPY: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    m, l, moment, top = state
    x = read(row, position, inside, MASKED, KEEP)
    if TOP:  # the first of a lane's maxima, in whatever order the tiles come
        tile_m = tl.max(x, axis=1)
        found = tl.min(tl.where(x == tile_m[:, None], position, NOWHERE), axis=1)
        top = tl.where(tile_m > m, found, tl.where(tile_m == m, tl.minimum(found, top), top))
    m, factor, shift, y = rescale(m, l, x, c, True)
    e = tl.exp2(y)
    if ENTROPY:  # no 0 * inf where a logit, or the maximum so far, is -inf
        term = e * tl.maximum(y, LOWEST)
        moment = factor * (moment + l * tl.maximum(shift, LOWEST)) + tl.sum(term, axis=1)
    return m, l * factor + tl.sum(e, axis=1), moment, top


@triton.jit
def token_sweep(
    row, lead, n_cols, c, LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr,
    KEEP: tl.constexpr, ENTROPY: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """A row's maximum, sum of exponentials, entropy in nats (ENTROPY), and the position of the
    first of its maxima (TOP; NOWHERE without a finite logit)."""
    first, end, begin, stop = whole_tiles(lead, n_cols, LANES * WIDTH, ENDS)
    zero = tl.zeros([LANES], tl.float32)
    low = tl.full([LANES], -INFINITY, tl.float32)
    state = (low, zero, zero, tl.full([LANES], NOWHERE, tl.int32))
    for k in tl.range(first, end, loop_unroll_factor=UNROLL):
        position, inside = tile(k, lead, n_cols, LANES, WIDTH, ENDS)
        state = token_tile(state, row, position, inside, c, False, KEEP, ENTROPY, TOP)
    for j in range(begin, stop):
        position, inside = tile(j * end, lead, n_cols, LANES, WIDTH, ENDS)
        state = token_tile(state, row, position, inside, c, True, KEEP, ENTROPY, TOP)
    lanes_m, lanes_l, moment, top = state
    m, l, factor, shift = combine_lanes(lanes_m, lanes_l, c, True)
    top = tl.min(tl.where(lanes_m == m, top, NOWHERE), axis=0)
    entropy = 0.0
    if ENTROPY:
        moment = tl.sum(factor * (moment + lanes_l * tl.maximum(shift, LOWEST)), axis=0)
        entropy = tl.log(l) - tl.fdiv(moment, l) * LN2
    return m, l, entropy, top


@triton.jit
def token_log_prob(x, m, l, over_t):
    """Of a logit of the row."""
    return (x.to(tl.float32) - m) * over_t - tl.log(l)


@triton.jit
def token_coefficients(l, entropy, over_t, upstream, upstream_entropy):
    """``a`` and ``b`` of the gradient ``exp2(y) * (a + b * y)``, for ``y`` in base 2."""
    over = tl.fdiv(over_t, l)
    surprise = entropy - tl.log(l)
    return -(upstream + upstream_entropy * surprise) * over, -upstream_entropy * over * LN2


@triton.jit
def token_gradient_tile(x, m, c, a, b, ENTROPY: tl.constexpr):
    """Gradient of a tile of logits, but for the token's own ``upstream / T``."""
    y = (x - m) * c
    e = tl.exp2(y)
    if ENTROPY:
        return e * (tl.maximum(y, LOWEST) * b + a)
    else:
        return e * a


@triton.jit
def token_gradient(
    row, gradient_row, lead, n_cols, token_id, m, l, entropy, over_t, upstream, upstream_entropy,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Write a row's gradient, which may be over its logits."""
    c = over_t * LOG2E
    a, b = token_coefficients(l, entropy, over_t, upstream, upstream_entropy)
    known = (token_id >= 0) & (token_id < n_cols)
    logit = tl.load(row + lead + token_id, mask=known, other=float("nan")).to(tl.float32)
    own = token_gradient_tile(logit, m, c, a, b, ENTROPY) + upstream * over_t
    tl.debug_barrier()  # every thread has read the logit before one overwrites it
    first, end, begin, stop = whole_tiles(lead, n_cols, LANES * WIDTH, ENDS)
    for j in range(begin, stop):
        position, inside = tile(j * end, lead, n_cols, LANES, WIDTH, ENDS)
        x = read(row, position, inside, True, False)
        gradient = token_gradient_tile(x, m, c, a, b, ENTROPY)
        write(gradient_row, position, gradient, inside, True)
    for k in tl.range(first, end, loop_unroll_factor=UNROLL):
        position, inside = tile(k, lead, n_cols, LANES, WIDTH, ENDS)
        x = read(row, position, inside, False, False)
        gradient = token_gradient_tile(x, m, c, a, b, ENTROPY)
        write(gradient_row, position, gradient, inside, False)
    tl.debug_barrier()  # the token's own entry goes over what another thread wrote there
    own = from_float32(own, gradient_row.dtype.element_ty)
    tl.store(gradient_row + lead + token_id, own, mask=known)


@triton.jit(
    do_not_specialize=[
        "logits_start", "logits_outer", "logits_inner", "gradient_start", "gradient_outer",
        "gradient_inner", "n_inner", "n_rows", "n_cols", "over_t", "ignore_index",
    ]
)  # fmt: skip
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
    if gradient is None or gradient is logits:
        layouts.append(layouts[0])
    else:
        layouts.append(uniform_rows(gradient, n_inner))
    ends, matched, budget = plan(layouts, n_cols, n_cols)
    itemsize = logits.element_size()
    choice = launch.dense_launch(
        n_rows, n_cols, itemsize, n_cols * itemsize, budget, device_facts(logits.device)
    )
    logits_rows, gradient_rows = layouts
    filler = logits  # stands for a pointer that the kernel's form does not read
    token_kernel[(choice.n_programs,)](
        **logits_rows.arguments("logits"),
        **gradient_rows.arguments("gradient"),
        ids_ptr=ids,
        log_probs_ptr=filler if log_probs is None else log_probs,
        entropies_ptr=filler if entropies is None else entropies,
        statistics_ptr=filler if statistics is None else statistics,
        upstream_ptr=filler if upstream is None else upstream,
        upstream_entropy_ptr=filler if upstream_entropy is None else upstream_entropy,
        n_inner=n_inner,
        n_rows=n_rows,
        n_cols=n_cols,
        over_t=1.0 / temperature,
        ignore_index=ignore_index,
        ENTROPY=(entropies if gradient is None else upstream_entropy) is not None,
        WRITE_STATISTICS=gradient is None and statistics is not None,
        WRITE_GRADIENT=gradient is not None,
        LANES=choice.lanes,
        WIDTH=choice.width,
        ENDS=ends.value,
        LOGITS_MATCHED=matched[0],
        GRADIENT_MATCHED=matched[1],
        **choice.options(),
    )
