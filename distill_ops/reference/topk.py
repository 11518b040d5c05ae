"""The loss against a teacher of whom K log-probabilities a token are known (semantics.md, 11)."""

import math

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, with_loss_options
from ..checks.contents import of_loss
from ..checks.logits import check_alone
from ..checks.options import given_options
from ..checks.slots import check_topk
from ..checks.values import TokenRows
from ..divergences.base import Divergence
from ..problem import LossComponents, Options, TopKInputs, working_dtype
from .dense import (
    NEG_INF,
    outcome_terms,
    rows_of_teacher,
    student_log_probs,
    token_weights,
    weighted_loss,
)

WITHOUT = ("infinities", "gradient", "backend")
LEAST_REST = 2.0**-24  # of the teacher's tail: 1 - sum(p) of a confident one is rounding


def _spread(slots: torch.Tensor, ids: torch.Tensor, n_cols: int, fill) -> torch.Tensor:
    """What the slots ``[..., K]`` hold at their columns, ``fill`` in the others: ``[..., n_cols]``."""
    columns = ids.masked_fill(ids < 0, n_cols)  # unused slots share a column that is cut off
    full = slots.new_full((*ids.shape[:-1], n_cols + 1), fill)
    return full.scatter(-1, columns, slots)[..., :n_cols]


def _log_sum(log_q: torch.Tensor) -> torch.Tensor:
    """``[..., 1]``: the logarithm of a sum of probabilities, -inf without a gradient where all are 0."""
    empty = (log_q == NEG_INF).all(-1, keepdim=True)
    log_sum = torch.logsumexp(log_q.masked_fill(empty, 0.0), -1, keepdim=True)
    return log_sum.masked_fill(empty, NEG_INF)


def _column_terms(student, log_p, ids, no_teacher, divergence, temperature) -> torch.Tensor:
    """The terms of all columns ``[..., V]``, p being 0 outside the K."""
    log_p = _spread(log_p, ids, student.shape[-1], NEG_INF)
    student_zero, teacher_zero = student == NEG_INF, log_p == NEG_INF
    excluded = teacher_zero & divergence.infinite_at_teacher_zero
    log_q, poison = student_log_probs(student, excluded, no_teacher, temperature)
    return outcome_terms(log_q, log_p, student_zero, teacher_zero, divergence) + poison


def _bucket_terms(student, log_p, ids, no_teacher, divergence, temperature) -> torch.Tensor:
    """The terms of the K outcomes and the rest, ``[..., K + 1]``."""
    n_cols, used = student.shape[-1], ids >= 0
    listed = _spread(used, ids, n_cols, False)
    teacher_zero = _spread(used & (log_p == NEG_INF), ids, n_cols, False)
    excluded = teacher_zero & divergence.infinite_at_teacher_zero
    columns, poison = student_log_probs(student, excluded, no_teacher, temperature)
    # an unused slot, and a rest without columns, have probability 0 in both
    log_q = columns.gather(-1, ids.clamp(min=0)).masked_fill(~used, NEG_INF)
    log_q_rest = _log_sum(columns.masked_fill(listed, NEG_INF))
    p_rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    log_p_rest = p_rest.log().masked_fill(listed.all(-1, keepdim=True), NEG_INF)
    log_q, log_p = torch.cat([log_q, log_q_rest], -1), torch.cat([log_p, log_p_rest], -1)
    return outcome_terms(log_q, log_p, log_q == NEG_INF, log_p == NEG_INF, divergence) + poison


def topk_terms(
    student: torch.Tensor,
    log_p: torch.Tensor,
    ids: torch.Tensor,
    tail: str,
    divergence: Divergence,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The terms of the divergence: ``[..., K + 1]`` with the bucket, else ``[..., V]``."""
    log_p = log_p.masked_fill(ids < 0, NEG_INF)
    no_teacher = ~(log_p.amax(-1, keepdim=True) < math.inf)  # NaN or +inf among them
    if tail == "renormalize":
        total = _log_sum(log_p)
        no_teacher = no_teacher | (total == NEG_INF)
        log_p = log_p - total.masked_fill(no_teacher, 0.0)
    terms = _bucket_terms if tail == "bucket" else _column_terms
    return terms(student, log_p, ids, no_teacher, divergence, temperature)


@with_loss_options(*WITHOUT)
def topk_distillation_loss(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    *,
    tail: str = "bucket",
    **options: Unpack[LossOptions],
) -> torch.Tensor | LossComponents:
    """:func:`distill_ops.topk_distillation_loss` in eager PyTorch, differentiable by autograd.

    ``u * divergence(q, p) + w * cross_entropy(label)``, of q and p over the K and the rest.
    Logits ``[..., V]``, log-probabilities and ids ``[..., K]`` go in, the loss comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> log_probs, ids = torch.tensor([[0.5, 0.3]]).double().log(), torch.tensor([[4, 1]])
        >>> loss = reference.topk_distillation_loss(student, log_probs, ids, divergence="forward_kl")
        >>> round(loss.item(), 6)
        0.633794

    Arguments, edges, result and errors are those of :func:`distill_ops.topk_distillation_loss`
    (docs/semantics.md, section 11), without ``gradient`` and ``backend``; half-precision logits are
    computed in float32, float64 in float64.
    """
    arguments = given_options("reference.topk_distillation_loss", options, *WITHOUT)
    n_cols = check_alone("student_logits", student_logits, arguments.vocab_size)
    rows = TokenRows("student_logits", student_logits)
    arguments = check_topk(rows, teacher_log_probs, teacher_ids, tail, arguments)
    inputs = TopKInputs(student_logits, teacher_log_probs, teacher_ids, *arguments.tensors)
    if not arguments.soft:
        tail = None
    of_loss(inputs, Options.of(arguments, n_cols, "torch", tail))
    dtype = working_dtype(student_logits, teacher_log_probs)
    weights = token_weights(student_logits, dtype, arguments.counted)
    unread = weights == 0
    student = student_logits[..., :n_cols].to(dtype).masked_fill(unread[..., None], 0.0)
    terms = None
    if arguments.soft:
        log_p, ids = (
            rows_of_teacher(x, arguments.teacher_rows, unread)
            for x in (teacher_log_probs.to(dtype), teacher_ids.long())
        )
        ids = ids.masked_fill(unread[..., None], -1)
        terms = topk_terms(student, log_p, ids, tail, arguments.divergence, arguments.temperature)
    return weighted_loss(student, terms, weights, arguments)
