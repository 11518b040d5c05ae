"""How far a student is from its teacher, token by token, for evaluation and logging."""

import math
from typing import NamedTuple

import torch

from .checks import check_pair, check_temperature
from .host import row_blocks, row_groups, rows_in_chunk
from .losses import use_triton
from .ops import library
from .paths import device_of, working_dtype


class DistillationMetrics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    A divergence that is infinite (one model excludes a token that the other does not) is +inf.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.zeros(3, 4)
        >>> metrics = distill_ops.distillation_metrics(logits, logits)
        >>> metrics.expected_acceptance.tolist(), round(metrics.student_entropy[0].item(), 4)
        ([1.0, 1.0, 1.0], 1.3863)
    """

    forward_kl: torch.Tensor  # KL(teacher || student)
    reverse_kl: torch.Tensor  # KL(student || teacher)
    jensen_shannon: torch.Tensor  # beta 0.5
    total_variation: torch.Tensor
    expected_acceptance: torch.Tensor  # sum(min(p, q)): of speculative decoding (arXiv:2211.17192)
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals


N_SUMS = len(DistillationMetrics._fields) - 1


def _times(probability: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    return torch.where(probability == 0, 0.0, probability * log)


def _rows(student: torch.Tensor, teacher: torch.Tensor, temperature: float, dtype) -> tuple:
    """Sums ``[N_SUMS, rows]`` and agreement of a chunk of rows."""
    top_s, top_t = student.argmax(-1), teacher.argmax(-1)
    # the maximum goes first: the division could overflow
    logs = []
    for logits in (student.to(dtype), teacher.to(dtype)):
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        logs.append(torch.log_softmax(logits, -1))
    log_q, log_p = logs
    q, p = log_q.exp(), log_p.exp()
    both = (q == 0) & (p == 0)
    log_ratio = (log_p - log_q).masked_fill(both, 0.0)
    log_m = torch.log(0.5 + 0.5 * torch.exp(-log_ratio.abs()))
    of_student = _times(q, log_ratio.clamp(min=0) + log_m)
    of_teacher = _times(p, log_ratio.clamp(max=0) - log_m)
    sums = (
        _times(p, log_ratio), _times(q, -log_ratio), 0.5 * (of_teacher - of_student),
        0.5 * (q - p).abs(), torch.minimum(q, p), -_times(q, log_q), -_times(p, log_p),
    )  # fmt: skip
    no_softmax = (log_q.isnan() | log_p.isnan()).any(-1)
    sums = torch.stack([x.sum(-1) for x in sums]).masked_fill(no_softmax, math.nan)
    return sums, (top_s == top_t) & ~no_softmax


def _metrics(student, teacher, temperature: float, n_cols: int, backend: str):
    leading = student.shape[:-1]
    n_rows = math.prod(leading)
    dtype = working_dtype(student, teacher)
    if backend == "triton":
        from .kernels import metrics as kernel

        sums = student.new_empty((N_SUMS, n_rows), dtype=torch.float32)
        agreement = student.new_empty(n_rows, dtype=torch.uint8)
        with device_of(student):
            kernel.run(student, teacher, temperature, n_cols, sums, agreement)
        return sums.view(N_SUMS, *leading), agreement.view(torch.bool).view(leading)
    sums = student.new_empty((N_SUMS, n_rows), dtype=dtype)
    agreement = student.new_empty(n_rows, dtype=torch.bool)
    size = rows_in_chunk(n_rows, n_cols, dtype.itemsize, torch.get_num_threads())
    first = 0
    for block in row_blocks(student, teacher, size=size, copies=True):
        for rows in row_groups(range(block[0].shape[0]), size):
            group = [matrix[rows, :n_cols] for matrix in block]
            out = slice(first + rows.start, first + rows.stop)
            sums[:, out], agreement[out] = _rows(*group, temperature, dtype)
        first += block[0].shape[0]
    return sums.view(N_SUMS, *leading), agreement.view(leading)


def _metrics_fake(student, teacher, temperature, n_cols, backend):
    dtype = working_dtype(student, teacher)
    leading = student.shape[:-1]
    sums = student.new_empty((N_SUMS, *leading), dtype=dtype)
    return sums, student.new_empty(leading, dtype=torch.bool)


library.define(
    "metrics(Tensor student, Tensor teacher, float temperature, SymInt n_cols, str backend)"
    " -> (Tensor sums, Tensor agreement)"
)
library.impl("metrics", _metrics, "CompositeExplicitAutograd")
torch.library.register_fake("distill_ops::metrics", _metrics_fake, lib=library)
metrics_op = torch.ops.distill_ops.metrics.default


def distillation_metrics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> DistillationMetrics:
    """Divergences, entropies and agreement of student and teacher, per token, without a gradient.

    ``KL(p || q)``, ``KL(q || p)``, ``sum(min(p, q))`` and others, q and p the softmax at T; in nats.
    Logits ``[..., V]`` of both go in; a :class:`DistillationMetrics` of ``[...]`` comes out.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]])
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> metrics = distill_ops.distillation_metrics(student, teacher)
        >>> round(metrics.forward_kl.item(), 4), round(metrics.expected_acceptance.item(), 4)
        (0.6584, 0.5496)
        >>> metrics.top1_agreement
        tensor([False])

    One launch on a GPU: the logits are read once from memory and once more from cache, and no
    probability tensor exists.

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in
            Triton); dtypes may differ, rows may be strided.
        temperature: of both softmaxes, positive.
        vocab_size: use the first columns of both.
        backend: "auto", "triton" or "torch", as in :func:`distill_ops.distillation_loss`.

    Returns:
        :class:`DistillationMetrics`, each ``[...]``; detached. A token whose logits are NaN, or all
        -inf, has NaN and no agreement.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    student_logits = (
        student_logits.detach() if isinstance(student_logits, torch.Tensor) else student_logits
    )
    teacher_logits = (
        teacher_logits.detach() if isinstance(teacher_logits, torch.Tensor) else teacher_logits
    )
    n_cols = check_pair(student_logits, teacher_logits, vocab_size)
    temperature = check_temperature(temperature)
    triton = use_triton(backend, student_logits, teacher_logits)
    sums, agreement = metrics_op(
        student_logits, teacher_logits, temperature, n_cols, "triton" if triton else "torch"
    )
    return DistillationMetrics(*sums.unbind(0), agreement)
