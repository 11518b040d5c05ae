"""A token's log-probability, and what on-policy methods need beside it (semantics.md, 12)."""

from typing import Any

import torch
import torch.nn.functional as F

from ..checks.contents import of_statistics, of_tokens
from ..checks.split import split_logits
from ..checks.statistics import CheckedStatistics, check_statistics
from ..checks.tokens import check_mixture, check_token_log_probs
from ..divergences.base import Divergence
from ..divergences.built_in import ReverseKL
from ..problem import (
    Options,
    StatisticsInputs,
    StatisticsOptions,
    TokenInputs,
    TokenOptions,
    working_dtype,
)
from ..results import DistillationStatistics, StatisticsCoefficients
from ..scalars import flag
from .dense import divergence_terms, log_mixture
from .rows import entropy, no_maximum
from .split import both_gathered, gathered


def _read(logits: torch.Tensor, ignored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits to compute with; the rows of ignored tokens are not read."""
    return logits.to(dtype).masked_fill(ignored[..., None], 0.0)


def _of_tokens(log_q: torch.Tensor, token_ids: torch.Tensor, ignored: torch.Tensor):
    ids = token_ids.masked_fill(ignored, 0)[..., None]
    return log_q.gather(-1, ids).squeeze(-1).masked_fill(ignored, 0.0)


def _entropy(log_q: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    return entropy(log_q).masked_fill(ignored, 0.0)


def token_log_probs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: Any = None,
    vocab_offset: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`distill_ops.token_log_probs` in eager PyTorch, differentiable by autograd.

    ``log_softmax(logits / T)`` at the ids; with ``return_entropy``, ``H = -sum(q log q)`` too; in nats.
    Logits ``[..., V]`` and ids ``[...]`` go in, ``[...]`` or a pair comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> logits = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> log_prob = reference.token_log_probs(logits, torch.tensor([1]), temperature=2.0)
        >>> round(log_prob.item(), 9)
        -0.982043571

    Arguments, edges, result and errors are those of :func:`distill_ops.token_log_probs`
    (docs/semantics.md, section 12), without ``backend``.
    """
    flag("return_entropy", return_entropy)
    split, logits, _ = split_logits(group, vocab_offset, None, logits, None, ("logits", ""))
    if split.group is not None:
        logits = gathered(logits, split)
    token_ids, temperature, ignore_index = check_token_log_probs(
        logits, token_ids, temperature, ignore_index
    )
    options = TokenOptions("torch", temperature, ignore_index, return_entropy)
    of_tokens(TokenInputs(logits, token_ids), options)
    ignored = token_ids == ignore_index
    log_q = F.log_softmax(_read(logits, ignored, working_dtype(logits)) / temperature, dim=-1)
    log_probs = _of_tokens(log_q, token_ids, ignored)
    return (log_probs, _entropy(log_q, ignored)) if return_entropy else log_probs


def distillation_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    divergence: Divergence | str = ReverseKL(),
    temperature: float = 1.0,
    ignore_index: int = -100,
    coefficients: StatisticsCoefficients | None = None,
    group: Any = None,
    vocab_offset: int | None = None,
) -> DistillationStatistics | tuple[torch.Tensor, DistillationStatistics]:
    """:func:`distill_ops.distillation_statistics` in eager PyTorch, differentiable by autograd.

    ``divergence(q, p)``, ``log q_id``, ``log p_id``, ``-sum(q log q)``, ``-sum(p log p)``; in nats.
    Logits ``[..., V]`` and ids ``[...]`` go in; :class:`DistillationStatistics` of ``[...]`` comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]], dtype=torch.float64)
        >>> found = reference.distillation_statistics(student, teacher, torch.tensor([4]))
        >>> round(found.divergence.item(), 6), round(found.student_entropy.item(), 6)
        (0.472252, 1.206489)

    Arguments, edges, result and errors are those of :func:`distill_ops.distillation_statistics`
    (docs/semantics.md, section 12), without ``backend``.
    """
    split, student_logits, teacher_logits = split_logits(
        group, vocab_offset, None, student_logits, teacher_logits
    )
    if split.group is not None:
        student_logits, teacher_logits = both_gathered(split, student_logits, teacher_logits)
    checked = check_statistics(
        student_logits,
        teacher_logits,
        token_ids,
        divergence,
        temperature,
        ignore_index,
        coefficients,
    )
    return statistics_of(student_logits, teacher_logits, checked)


def statistics_of(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, checked: CheckedStatistics
) -> DistillationStatistics | tuple[torch.Tensor, DistillationStatistics]:
    """Of logits ``[..., n_cols]`` with checked arguments, for what they hold is looked at here."""
    token_ids, arguments = checked.ids, checked.loss
    inputs = StatisticsInputs(
        student_logits, teacher_logits, token_ids, arguments.divergence.tensors, checked.tensors
    )
    options = StatisticsOptions(Options.of(arguments, checked.n_cols, "torch"), checked.numbers)
    of_statistics(inputs, options)
    dtype = working_dtype(student_logits, teacher_logits)
    ignored, temperature = token_ids == arguments.ignore_index, arguments.temperature
    student, teacher = (_read(x, ignored, dtype) for x in (student_logits, teacher_logits))
    terms = divergence_terms(student, teacher, arguments.divergence, temperature)
    log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    no_answer = (no_maximum(student) | no_maximum(teacher)).squeeze(-1) | ignored
    found = DistillationStatistics(
        terms.sum(-1).masked_fill(ignored, 0.0),
        _of_tokens(log_q, token_ids, ignored),
        _of_tokens(log_p, token_ids, ignored),
        _entropy(log_q, ignored),
        _entropy(log_p, ignored),
        (student.argmax(-1) == teacher.argmax(-1)) & ~no_answer,
    )
    if not checked.coefficients:
        return found
    loss = 0.0
    weighted = found.divergence, found.student_log_prob, found.student_entropy
    for factor, values in zip(checked.coefficients, weighted, strict=True):
        factor = torch.as_tensor(factor, dtype=dtype, device=values.device)
        without = (factor == 0) | ignored
        factor = factor.expand_as(values).masked_fill(ignored, 0.0)
        loss = loss + (factor * values.masked_fill(without, 0.0)).sum()
    return loss, DistillationStatistics(*(x.detach() for x in found))


def mixture_token_log_probs(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_weight: float | torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """:func:`distill_ops.mixture_token_log_probs` in eager PyTorch, differentiable by autograd.

    ``log((1 - a) q + a p)`` at the ids, q and p the softmax at T, a ``teacher_weight``; in nats.
    Logits ``[..., V]`` and ids ``[...]`` go in, ``[...]`` comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, float("-inf")]])
        >>> reference.mixture_token_log_probs(student, teacher, torch.tensor([3]), 0.5).exp()
        tensor([0.1250])

    Arguments, edges, result and errors are those of :func:`distill_ops.mixture_token_log_probs`
    (docs/semantics.md, section 12), without ``backend``.
    """
    (token_ids, temperature, ignore_index), teacher_weight = check_mixture(
        student_logits, teacher_logits, token_ids, teacher_weight, temperature, ignore_index
    )
    options = TokenOptions("torch", temperature, ignore_index, False)
    of_tokens(TokenInputs(student_logits, token_ids), options)
    dtype, ignored = working_dtype(student_logits, teacher_logits), token_ids == ignore_index
    log_q, log_p = (
        _of_tokens(F.log_softmax(_read(x, ignored, dtype) / temperature, -1), token_ids, ignored)
        for x in (student_logits, teacher_logits)
    )
    return log_mixture(teacher_weight, log_p, log_q).masked_fill(ignored, 0.0)
