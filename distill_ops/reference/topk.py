"""The loss against a teacher of whom K log-probabilities a token are known (semantics.md, 11)."""

import math

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, Tail, with_loss_options
from ..checks.contents import of_loss
from ..checks.logits import check_alone
from ..checks.options import check_splittable, given_options
from ..checks.slots import check_topk, without_repeats
from ..checks.split import split_logits
from ..checks.values import TokenRows
from ..divergences.base import Divergence
from ..problem import Options, TopKInputs, working_dtype
from ..results import LossResult
from .dense import (
    dropped_terms,
    outcome_terms,
    rows_of_teacher,
    student_log_probs,
    token_weights,
    weighted_loss,
)
from .outputs import with_token_outputs
from .rows import NEG_INF
from .split import gathered

WITHOUT = ("infinities", "gradient", "backend")
OWN = "tail", "mass_terms", "log_prob_floor"
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


def _listed_terms(
    student, log_p, ids, no_teacher, divergence, temperature, tail: Tail
) -> torch.Tensor:
    """The terms of the K outcomes, and with the bucket of the rest: ``[..., K]`` or ``[..., K + 1]``."""
    n_cols, used = student.shape[-1], ids >= 0
    floor, infinities = tail.log_prob_floor, "drop" if tail.log_prob_floor is None else "propagate"
    listed = _spread(used, ids, n_cols, False)
    teacher_zero = _spread(used & (log_p == NEG_INF), ids, n_cols, False)
    excluded = teacher_zero & (divergence.infinite_at_teacher_zero and floor is None)
    if tail.name == "restrict":
        excluded = excluded | ~listed
    columns, poison = student_log_probs(student, excluded, no_teacher, temperature)
    # an unused slot, and a rest without columns, have probability 0 in both
    log_q = columns.gather(-1, ids.clamp(min=0)).masked_fill(~used, NEG_INF)
    if tail.name == "bucket":
        log_q_rest = _log_sum(columns.masked_fill(listed, NEG_INF))
        p_rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
        log_p_rest = p_rest.log().masked_fill(listed.all(-1, keepdim=True), NEG_INF)
        log_q, log_p = torch.cat([log_q, log_q_rest], -1), torch.cat([log_p, log_p_rest], -1)
    zeros = log_q == NEG_INF, log_p == NEG_INF
    if floor is not None:  # a logarithm below it has no gradient
        log_q, log_p = log_q.clamp(min=floor), log_p.clamp(min=floor)
    terms = outcome_terms(log_q, log_p, *zeros, divergence, infinities)
    if tail.mass_terms:
        masses = _mass_factor(divergence, log_q.dtype) * (log_q.exp() - log_p.exp())
        terms = terms + masses.masked_fill(dropped_terms(*zeros, divergence, infinities), 0.0)
    return terms + poison


def _mass_factor(divergence: Divergence, dtype: torch.dtype) -> float | torch.Tensor:
    """Of ``q - p`` in the generalised KLs: 1 of the forward, -1 of the reverse, or their mixture."""
    if divergence.name == "symmetric_kl":
        (weight,) = divergence.column_parameters(dtype)
        return 1 - 2 * weight
    return 1.0 if divergence.name == "forward_kl" else -1.0


def topk_terms(
    student: torch.Tensor,
    log_p: torch.Tensor,
    ids: torch.Tensor,
    tail: Tail,
    divergence: Divergence,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The terms of the divergence: ``[..., K + 1]`` with the bucket, ``[..., K]`` of the K alone, else
    ``[..., V]``."""
    ids = without_repeats(log_p, ids)
    log_p = log_p.masked_fill(ids < 0, NEG_INF)
    no_teacher = ~(log_p.amax(-1, keepdim=True) < math.inf)  # NaN or +inf among them
    if tail.name in ("renormalize", "restrict"):
        total = _log_sum(log_p)
        no_teacher = no_teacher | (total == NEG_INF)
        log_p = log_p - total.masked_fill(no_teacher, 0.0)
    arguments = student, log_p, ids, no_teacher, divergence, temperature
    if tail.name in ("renormalize", "ignore"):
        return _column_terms(*arguments)
    return _listed_terms(*arguments, tail)


@with_loss_options(*WITHOUT)
def topk_distillation_loss(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    *,
    tail: str = "bucket",
    mass_terms: bool = False,
    log_prob_floor: float | None = None,
    **options: Unpack[LossOptions],
) -> LossResult:
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
    arguments = given_options("reference.topk_distillation_loss", options, *WITHOUT, own=OWN)
    split, student_logits, _ = split_logits(
        arguments.group, arguments.vocab_offset, arguments.vocab_size, student_logits, None
    )
    if split.group is not None:
        check_splittable(arguments.infinities, arguments.token_outputs)
        student_logits = gathered(student_logits, split)
    n_cols = check_alone("student_logits", student_logits, arguments.vocab_size)
    rows = TokenRows("student_logits", student_logits)
    asked = Tail(tail, mass_terms, log_prob_floor)
    arguments, checked = check_topk(rows, teacher_log_probs, teacher_ids, asked, arguments)
    inputs = TopKInputs(student_logits, teacher_log_probs, teacher_ids, *arguments.tensors)
    of_loss(inputs, Options.of(arguments, n_cols, "torch", checked))
    dtype = working_dtype(student_logits, teacher_log_probs)
    weights = token_weights(student_logits, dtype, arguments.counted)
    unread = weights == 0
    student = student_logits[..., :n_cols].to(dtype).masked_fill(unread[..., None], 0.0)
    terms = slots = None
    if arguments.soft:
        log_p, ids = (
            rows_of_teacher(x, arguments.teacher_rows, unread)
            for x in (teacher_log_probs.to(dtype), teacher_ids.long())
        )
        ids = ids.masked_fill(unread[..., None], -1)
        terms = topk_terms(
            student, log_p, ids, checked, arguments.divergence, arguments.temperature
        )
        slots = log_p.masked_fill(ids < 0, NEG_INF), ids
    loss = weighted_loss(student, terms, weights, arguments)
    return with_token_outputs(loss, arguments, weights, student, slots=slots)
