"""What on-policy methods need of a token, in one call."""

from typing import Any

import torch

from ..checks.split import split_logits
from ..checks.statistics import check_statistics
from ..divergences.base import Divergence
from ..divergences.built_in import ReverseKL
from ..operators.statistics import distillation_statistics as operator
from ..problem import Options, StatisticsInputs, StatisticsOptions
from ..results import DistillationStatistics, StatisticsCoefficients
from .choices import choose_backend, gradient_mode


def distillation_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    divergence: Divergence | str = ReverseKL(),
    temperature: float = 1.0,
    ignore_index: int = -100,
    coefficients: StatisticsCoefficients | None = None,
    backend: str = "auto",
    group: Any = None,
    vocab_offset: int | None = None,
) -> DistillationStatistics | tuple[torch.Tensor, DistillationStatistics]:
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
        coefficients: where the weights of the three are known before (advantages, masks): a
            :class:`StatisticsCoefficients`, or a tuple of three in its order, each a number, a 0-d tensor,
            one a token ``[...]``, or None for none; constants, finite. The call then makes the loss

                sum over tokens of ``c_d divergence + c_l log q_id + c_h student_entropy``

            and its gradient in the forward, as :func:`distillation_loss` does (float16 logits: in the
            backward). A term whose coefficient is 0 is left out, be it infinite: where all three are,
            the gradient of the row is 0. A token that is ignored counts 0 whatever its coefficients hold.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.
        group, vocab_offset: as in :func:`token_log_probs`, of the ranks that split the vocabulary of both; a whole
            teacher is sliced. One collective for the soft cross-entropy, forward and reverse KL, two for others.

    Returns:
        :class:`DistillationStatistics`, each ``[...]``, nats, float32 (float64 for float64 logits).
        A row of NaN, of +inf, or all -inf makes what depends on it NaN.
        With ``coefficients`` a pair: the 0-d loss, which is differentiable, and the statistics, detached.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative; on a second backward of a loss whose
            gradient the forward made.
    """
    split, student_logits, teacher_logits = split_logits(
        group, vocab_offset, None, student_logits, teacher_logits
    )
    checked = check_statistics(
        student_logits,
        teacher_logits,
        token_ids,
        divergence,
        temperature,
        ignore_index,
        coefficients,
        split,
    )
    backend = choose_backend(backend, "student_logits", student_logits, teacher_logits)
    options = StatisticsOptions(
        Options.of(checked.loss, checked.n_cols, backend, split=split), checked.numbers
    )
    parameters = checked.loss.divergence.tensors
    inputs = StatisticsInputs(
        student_logits, teacher_logits, checked.ids, parameters, checked.tensors
    )
    made = gradient_mode("auto" if checked.coefficients else "backward", "sum", student_logits)
    outputs = operator("distillation_statistics", inputs, options, made)
    return statistics_result(outputs, checked.coefficients)


def statistics_result(
    outputs: tuple[torch.Tensor | None, ...], coefficients: tuple[float | torch.Tensor, ...]
) -> DistillationStatistics | tuple[torch.Tensor, DistillationStatistics]:
    """What the user gets of an operator's outputs; beside a loss the statistics are detached."""
    loss, of_tokens, agreement = outputs
    if coefficients:
        of_tokens = of_tokens.detach()
    divergence, student_log_prob, teacher_log_prob, student_entropy, teacher_entropy = (
        of_tokens.unbind(0)
    )
    found = DistillationStatistics(
        divergence, student_log_prob, teacher_log_prob.detach(), student_entropy,
        teacher_entropy.detach(), agreement,
    )  # fmt: skip
    return (loss, found) if coefficients else found
