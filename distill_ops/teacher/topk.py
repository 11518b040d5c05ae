"""The teacher's most likely tokens of each row, while the teacher runs; ``store.py`` keeps them."""

import math
from typing import NamedTuple

import torch

from ..checks.logits import check_alone
from ..checks.values import check_temperature, of_teacher
from ..problem import working_dtype
from ..scalars import integer
from ..selection import NEG_INF, largest, row_chunks


class TeacherTopK(NamedTuple):
    """The teacher's probabilities of ``K`` tokens, in the order that the top-k losses take.

    A slot whose id is -1 is unused; its log-probability is -inf.

    Example:
        >>> import torch, distill_ops
        >>> found = distill_ops.teacher_topk(torch.tensor([[0.0, 2.0, 1.0]]), 2)
        >>> type(found).__name__, found.ids.tolist()
        ('TeacherTopK', [[1, 2]])
    """

    log_probs: torch.Tensor  # [..., K] float32, nats
    ids: torch.Tensor  # [..., K] int64


def teacher_topk(
    logits: torch.Tensor, k: int, *, temperature: float = 1.0, vocab_size: int | None = None
) -> TeacherTopK:
    """The teacher's ``k`` most likely tokens and their log-probabilities, in nats.

    ``log_softmax(logits / temperature)`` over the whole vocabulary, of the largest ``k``.
    Logits ``[..., V]`` go in; :class:`TeacherTopK` of ``[..., k]`` comes out, detached.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> log_probs, ids = distill_ops.teacher_topk(logits, 2)
        >>> ids, [round(x, 4) for x in log_probs[0].tolist()]
        (tensor([[4, 1]]), [-0.7164, -1.2164])

    It runs some rows at a time: beside the results it takes one float32 copy of them: 8 MiB, on a GPU
    64, or one row if that is more.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64; rows may be strided.
        k: tokens a row, in [1, V]. Of equally likely tokens any may be kept.
        temperature: of the softmax, positive: the one of the loss, as log-probabilities of some
            tokens cannot be brought to another.
        vocab_size: use the first columns (a head padded beyond its vocabulary).

    Returns:
        :class:`TeacherTopK` ``[..., k]``, in descending order; detached. Columns whose logit is
        -inf become unused slots: id -1, log-probability -inf. The used slots of a row that holds
        NaN or +inf are NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    n_cols = check_alone("logits", logits, vocab_size)
    of_teacher("logits", logits)
    k = integer("k", k, 1, n_cols)
    temperature = check_temperature(temperature)
    leading = logits.shape[:-1]
    log_probs = logits.new_empty((math.prod(leading), k), dtype=torch.float32)
    ids = logits.new_empty((math.prod(leading), k), dtype=torch.int64)
    for rows, places in row_chunks(logits, n_cols):
        log_probs[places], ids[places] = _topk_rows(rows, k, temperature)
    return TeacherTopK(log_probs.view(*leading, k), ids.view(*leading, k))


def _topk_rows(rows: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = working_dtype(rows)
    values, ids = largest(rows, k)
    top = values[:, :1].to(dtype)
    # the maximum goes first: the division could overflow
    weights = rows.to(dtype, copy=True).sub_(top).div_(temperature).exp_()
    log_probs = (values.to(dtype) - top) / temperature - weights.sum(-1, keepdim=True).log()
    # a row of -inf, which is NaN by now, is unused throughout
    return log_probs.masked_fill(values == NEG_INF, NEG_INF).float(), ids
