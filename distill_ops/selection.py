"""The ids of each row's largest logits, some rows at a time."""

from collections.abc import Iterator

import torch

from .cpu.rows import Places, kept_groups

NEG_INF = float("-inf")
# of the rows under work, whatever the vocabulary: 8 MiB in float32 stay near a CPU's caches, and 64
# keep a GPU busy
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 21, 1 << 24


def row_chunks(
    logits: torch.Tensor,  # [..., V]
    n_cols: int,
    keep: torch.Tensor | None = None,  # [N] bool; None: every row counts
) -> Iterator[tuple[torch.Tensor, Places]]:
    """Some rows that count, their first ``n_cols`` columns, and their places in the call."""
    on_cpu = logits.device.type == "cpu"
    size = max(1, (CPU_CHUNK_ELEMENTS if on_cpu else GPU_CHUNK_ELEMENTS) // n_cols)
    for (matrix, _), rows, places in kept_groups(
        keep, logits, gradient=None, size=size, copies=True
    ):
        yield matrix[:, :n_cols][rows], places


def largest(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest logits ``[n, k]`` in descending order, NaN being the largest, and their
    columns: -1 where the logit is -inf."""
    values, ids = rows.topk(k)
    return values, ids.masked_fill_(values == NEG_INF, -1)


def largest_ids(
    logits: torch.Tensor,  # [..., V]
    k: int,
    n_cols: int,
    keep: torch.Tensor | None = None,  # [N] bool; None: every row counts
) -> torch.Tensor:
    """Columns ``[N, k]`` of the largest logits; -1 in rows that do not count, which are not read."""
    n_rows = logits.shape[:-1].numel()
    ids = torch.full((n_rows, k), -1, dtype=torch.int64, device=logits.device)
    for rows, places in row_chunks(logits, n_cols, keep):
        ids[places] = largest(rows, k)[1]
    return ids
