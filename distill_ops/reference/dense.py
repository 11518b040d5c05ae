"""The dense loss, and what every form of it shares: terms, tokens' weights, reduction."""

import math

import torch
import torch.nn.functional as F
from typing_extensions import Unpack

from ..arguments import Counted, LossArguments, LossOptions, with_loss_options
from ..checks.contents import of_loss
from ..checks.options import given_options
from ..checks.split import split_logits
from ..checks.tokens import check_dense
from ..divergences.base import Divergence
from ..problem import DenseInputs, Options, working_dtype
from ..results import LossComponents, LossResult
from .outputs import with_token_outputs
from .rows import NEG_INF, no_maximum, times
from .split import both_gathered

WITHOUT = ("gradient", "backend")


def log_mixture(weight, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``log(weight p + (1 - weight) q)``, -inf without a gradient where that is 0; weight a number
    or a tensor."""
    weight = torch.as_tensor(weight, dtype=log_p.dtype, device=log_p.device)
    pair = torch.stack([log_p + weight.log(), log_q + torch.log1p(-weight)])
    impossible = (pair == NEG_INF).all(0)
    return torch.logsumexp(pair.masked_fill(impossible, 0.0), 0).masked_fill(impossible, NEG_INF)


def values(divergence: Divergence, log_q, log_p) -> torch.Tensor:
    """The terms whose sum over the vocabulary is the divergence (semantics.md, section 2).

    A divergence that a user declared is its own text: its value alone, of which autograd takes the
    derivative."""
    q, p = log_q.exp(), log_p.exp()
    parameters = divergence.column_parameters(log_q.dtype)
    if divergence.name == "soft_cross_entropy":
        return -times(p, log_q)
    if divergence.name == "forward_kl":
        return times(p, log_p - log_q)
    if divergence.name == "reverse_kl":
        return times(q, log_q - log_p)
    if divergence.name == "jensen_shannon":
        (beta,) = parameters
        log_m = log_mixture(beta, log_p, log_q)
        return beta * times(p, log_p - log_m) + (1 - beta) * times(q, log_q - log_m)
    if divergence.name == "symmetric_kl":
        forward, reverse = times(p, log_p - log_q), times(q, log_q - log_p)
        (weight,) = parameters
        return (1 - weight) * forward + weight * reverse
    if divergence.name == "skew_forward_kl":
        return times(p, log_p - log_mixture(*parameters, log_p, log_q))
    if divergence.name == "skew_reverse_kl":
        return times(q, log_q - log_mixture(*parameters, log_q, log_p))
    if divergence.name == "total_variation":
        return (q - p).abs() / 2
    if divergence.name == "alpha_beta":
        a, b = parameters
        teacher, student = ((a + b) * log_p).exp(), ((a + b) * log_q).exp()
        sums = a / (a + b) * teacher + b / (a + b) * student
        return (sums - (a * log_p + b * log_q).exp()) / (a * b)
    lowest = torch.finfo(log_q.dtype).min
    logs = log_q.clamp(min=lowest), log_p.clamp(min=lowest)
    return divergence.on_columns(*logs, parameters)[0]


def dropped_terms(
    student_zero: torch.Tensor,
    teacher_zero: torch.Tensor,
    divergence: Divergence,
    infinities: str = "drop",
) -> torch.Tensor:
    """Which outcomes have no term: both probabilities are 0, or "drop" leaves it out as infinite."""
    dropped = student_zero & teacher_zero
    if infinities == "drop":
        if divergence.infinite_at_teacher_zero:
            dropped = dropped | teacher_zero
        if divergence.infinite_at_student_zero:
            dropped = dropped | student_zero
    return dropped


def outcome_terms(
    log_q: torch.Tensor,
    log_p: torch.Tensor,
    student_zero: torch.Tensor,
    teacher_zero: torch.Tensor,
    divergence: Divergence,
    infinities: str = "drop",
) -> torch.Tensor:
    """The terms ``[..., outcomes]`` of the divergence, ``*_zero`` being where a probability is 0.

    A term with a finite limit takes it; "drop" leaves out the infinite ones. A student who is
    restricted to the teacher's support comes so."""
    dropped = dropped_terms(student_zero, teacher_zero, divergence, infinities)
    log_q, log_p = log_q.masked_fill(dropped, 0.0), log_p.masked_fill(dropped, 0.0)
    return values(divergence, log_q, log_p).masked_fill(dropped, 0.0)


def student_log_probs(
    student: torch.Tensor,
    excluded: torch.Tensor,
    no_teacher: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``log_q`` of logits ``[..., V]`` restricted to the columns that are not ``excluded``, and what
    to add to the row's terms, ``[..., 1]``: NaN where it or its teacher has no softmax, else 0.

    Such a row is NaN in value and gradient, however many of its terms are dropped. An excluded
    column counts as -inf, whatever it holds."""
    within = student.masked_fill(excluded, NEG_INF)
    fails = no_teacher | no_maximum(within)
    poison = torch.where(fails, math.nan, 0.0)
    logits = torch.where(fails, student + poison, within)
    return F.log_softmax(logits / temperature, dim=-1), poison


def divergence_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    infinities: str = "drop",
) -> torch.Tensor:
    """The terms ``[..., V]`` of the divergence of logits ``[..., V]``, infinite logits included."""
    student_zero, teacher_zero = student == NEG_INF, teacher == NEG_INF
    restrict = divergence.infinite_at_teacher_zero and infinities == "drop"
    excluded = teacher_zero & restrict
    log_q, poison = student_log_probs(student, excluded, no_maximum(teacher), temperature)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    zeros = student_zero, teacher_zero
    return outcome_terms(log_q, log_p, *zeros, divergence, infinities) + poison


def rows_of_teacher(
    tensor: torch.Tensor, teacher_rows: torch.Tensor | None, unread: torch.Tensor
) -> torch.Tensor:
    """The rows ``[..., n]`` of a teacher's tensor that the tokens are compared with."""
    if teacher_rows is None:
        return tensor
    return tensor.reshape(-1, tensor.shape[-1])[teacher_rows.masked_fill(unread, 0)]


def token_weights(rows: torch.Tensor, dtype: torch.dtype, counted: Counted) -> torch.Tensor:
    """``[...]``: how much each of ``rows [..., n]`` counts; a row of weight 0 is not read."""
    loss_mask, labels, ignore_index = counted
    weights = torch.ones(rows.shape[:-1], dtype=dtype, device=rows.device)
    if loss_mask is not None:
        weights = loss_mask.to(dtype)
    if labels is not None:
        weights = weights.masked_fill(labels == ignore_index, 0.0)
    return weights


def weighted_loss(
    student: torch.Tensor,
    terms: torch.Tensor | None,
    weights: torch.Tensor,
    arguments: LossArguments,
) -> LossResult:
    """Sum the divergence's terms ``[..., outcomes]`` (None where it has no share), mix it with the
    hard-label loss of logits ``student [..., V]``, weigh the tokens and reduce."""
    reduction, labels, normalizer = arguments.reduction, arguments.labels, arguments.normalizer
    divergence_loss = None if terms is None else terms.sum(-1)
    if terms is not None and arguments.scale_by_temperature_squared:
        divergence_loss = divergence_loss * arguments.temperature**2
    unread = weights == 0
    hard_loss = torch.zeros_like(weights)
    if divergence_loss is None:
        divergence_loss = hard_loss
    if arguments.hard:
        ids = labels.masked_fill(unread, 0)[..., None]
        hard_loss = -F.log_softmax(student, dim=-1).gather(-1, ids).squeeze(-1)
    parts = []  # one without weight may be infinite
    if arguments.soft:
        parts.append(arguments.share * divergence_loss)
    if arguments.hard:
        parts.append(arguments.hard_label_weight * hard_loss)
    loss = sum(parts)

    def reduced(per_token):
        per_token = per_token.masked_fill(unread, 0.0) * weights
        if reduction == "none":
            return per_token
        total = per_token.sum()
        if reduction == "sum":
            return total
        if bool(unread.all()):  # no kept token: loss 0 with a graph
            return total
        if normalizer is None:
            return total / weights.sum()
        return total / torch.as_tensor(normalizer, dtype=weights.dtype, device=total.device)

    if not arguments.return_components:
        return reduced(loss)
    return LossComponents(
        reduced(loss), reduced(divergence_loss).detach(), reduced(hard_loss).detach()
    )


@with_loss_options(*WITHOUT)
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    **options: Unpack[LossOptions],
) -> LossResult:
    """:func:`distill_ops.distillation_loss` in eager PyTorch, differentiable by autograd.

    ``u * divergence(q, p) + w * cross_entropy(label)``, q and p their softmax at T, u being ``1 - w``.
    Logits ``[..., V]`` go in, their mean over the tokens comes out; differentiable twice.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]], dtype=torch.float64)
        >>> round(reference.distillation_loss(student, teacher).item(), 6)
        1.91892

    Same arguments, result and errors; half-precision logits are computed in float32, float64 in
    float64.
    """
    arguments = given_options("reference.distillation_loss", options, *WITHOUT)
    split, student_logits, teacher_logits = split_logits(
        arguments.group,
        arguments.vocab_offset,
        arguments.vocab_size,
        student_logits,
        teacher_logits,
    )
    if split.group is not None:
        student_logits, teacher_logits = both_gathered(split, student_logits, teacher_logits)
    arguments, n_cols = check_dense(student_logits, teacher_logits, arguments)
    inputs = DenseInputs(student_logits, teacher_logits, *arguments.tensors)
    of_loss(inputs, Options.of(arguments, n_cols, "torch"))
    dtype = working_dtype(student_logits, teacher_logits)
    weights = token_weights(student_logits, dtype, arguments.counted)
    unread = weights == 0
    student = student_logits[..., :n_cols].to(dtype).masked_fill(unread[..., None], 0.0)
    terms = teacher = None
    if arguments.soft:
        teacher = rows_of_teacher(teacher_logits[..., :n_cols], arguments.teacher_rows, unread)
        teacher = teacher.to(dtype).masked_fill(unread[..., None], 0.0)
        terms = divergence_terms(
            student, teacher, arguments.divergence, arguments.temperature, arguments.infinities
        )
    loss = weighted_loss(student, terms, weights, arguments)
    return with_token_outputs(loss, arguments, weights, student, teacher)
