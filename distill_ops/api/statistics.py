"""What on-policy methods need of a token, in one call."""

import torch

from ..arguments import LossArguments
from ..checks.tokens import check_statistics
from ..divergences.base import Divergence
from ..divergences.built_in import ReverseKL
from ..operators.statistics import distillation_statistics as operator
from ..problem import Options, StatisticsInputs
from ..results import DistillationStatistics
from .choices import choose_backend, gradient_mode


def distillation_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    divergence: Divergence | str = ReverseKL(),
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> DistillationStatistics:
    """Divergence, log-probabilities, entropies and agreement of both models, token by token.

    ``divergence(q, p)``, ``log q_id``, ``log p_id``, ``-sum(q log q)``, ``-sum(p log p)``; in nats.
    Logits ``[..., V]`` and ids ``[...]`` go in; :class:`DistillationStatistics` of ``[...]`` comes out.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]])
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> found = distill_ops.distillation_statistics(student, teacher, torch.tensor([4]))
        >>> [round(x.item(), 4) for x in (found.divergence, found.teacher_log_prob)]
        [0.4723, -0.7164]
        >>> found.top1_agreement
        tensor([False])

    All that an on-policy distillation step needs of a token (MiniLLM, arXiv:2306.08543: importance
    weights, the single-step reverse KL, rewards and entropy) in one call: one launch forward, which
    finds the logits in cache after their first read, and one backward for the three differentiable
    results together (its formula: docs/semantics.md, section 12).

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in
            Triton); dtypes may differ; no gradient flows to the teacher's.
        token_ids: ``[...]``, int64 or int32, aligned with the logits, as in :func:`token_log_probs`. Where it
            is ``ignore_index`` the rows are not read: results and gradient are 0, and there is no
            agreement.
        divergence: a :class:`Divergence` or its name; infinite terms are dropped, as
            :func:`distill_ops.distillation_loss` does by default.
        temperature: T above, positive, of all results.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        :class:`DistillationStatistics`, each ``[...]``, nats, float32 (float64 for float64 logits).
        A row of NaN, of +inf, or all -inf makes what depends on it NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative.
    """
    (ids, temperature, ignore_index), divergence = check_statistics(
        student_logits, teacher_logits, token_ids, divergence, temperature, ignore_index
    )
    backend = choose_backend(backend, "student_logits", student_logits, teacher_logits)
    arguments = LossArguments(
        divergence, temperature=temperature, reduction="none", ignore_index=ignore_index
    )
    options = Options.of(arguments, student_logits.shape[-1], backend)
    inputs = StatisticsInputs(student_logits, teacher_logits, ids, divergence.tensors)
    made = gradient_mode("backward", "none", student_logits)
    outputs, agreement = operator("distillation_statistics", inputs, options, made)
    found, student_log_prob, teacher_log_prob, student_entropy, teacher_entropy = outputs.unbind(0)
    return DistillationStatistics(
        found, student_log_prob, teacher_log_prob.detach(), student_entropy,
        teacher_entropy.detach(), agreement,
    )  # fmt: skip
