"""How far a student is from its teacher, token by token, for evaluation and logging."""

from typing import Any

import torch

from ..checks.logits import check_pair, check_parts
from ..checks.split import split_logits
from ..checks.values import check_temperature
from ..operators.metrics import distillation_metrics as operator
from ..problem import MetricsInputs, MetricsOptions
from ..results import DistillationMetrics
from ..scalars import integer
from .choices import choose_backend


def distillation_metrics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
    group: Any = None,
    vocab_offset: int | None = None,
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
        group, vocab_offset: as there, of the ranks that split the vocabulary; two collectives.

    Returns:
        :class:`DistillationMetrics`, each ``[...]``; detached. A token whose logits are NaN, or all
        -inf, has NaN and no agreement.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    student_logits, teacher_logits = (
        x.detach() if isinstance(x, torch.Tensor) else x for x in (student_logits, teacher_logits)
    )
    if vocab_size is not None:
        vocab_size = integer("vocab_size", vocab_size, 1)
    split, student_logits, teacher_logits = split_logits(
        group, vocab_offset, vocab_size, student_logits, teacher_logits
    )
    if split.group is None:
        n_cols = check_pair(student_logits, teacher_logits, vocab_size)
    else:
        n_cols = check_parts(student_logits, teacher_logits)
    temperature = check_temperature(temperature)
    backend = choose_backend(backend, "student_logits", student_logits, teacher_logits)
    sums, agreement = operator(
        "distillation_metrics",
        MetricsInputs(student_logits, teacher_logits),
        MetricsOptions(backend, temperature, n_cols, split),
    )
    return DistillationMetrics(*sums.unbind(0), agreement)
