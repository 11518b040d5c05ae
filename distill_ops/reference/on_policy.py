"""On-policy distillation restated: full log-softmaxes, every formula of docs/on-policy.md on its own."""

import torch
import torch.nn.functional as F
from typing_extensions import Unpack

from ..arguments import LossArguments, with_options
from ..checks.heads import check_head, check_heads, check_no_teacher
from ..checks.logits import check_alone, check_pair, check_vocabulary
from ..checks.on_policy import check_on_policy_tokens, check_teacher_of_sampled
from ..checks.on_policy_options import (
    DEFAULTS,
    OnPolicyArguments,
    OnPolicyOptions,
    on_policy_options,
)
from ..checks.options import head_options
from ..checks.values import TokenRows
from ..problem import working_dtype
from ..results import OnPolicyLoss
from .dense import divergence_terms
from .linear import head_logits
from .rows import entropy
from .support import support_distillation_loss


@with_options(OnPolicyOptions, DEFAULTS)
def on_policy_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    vocab_size: int | None = None,
    **options: Unpack[OnPolicyOptions],
) -> OnPolicyLoss:
    """:func:`distill_ops.methods.on_policy.loss` in eager PyTorch, differentiable by autograd.

    ``sum_t m_t v_t w_t D(q_t, p_t) / sum_t m_t``; "sampled": ``log q(y_t) - log p(y_t)`` for D.
    Logits ``[..., S, V]``, ids and mask ``[..., S]`` go in; :class:`OnPolicyLoss` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.reference.on_policy import on_policy_loss
        >>> student = torch.tensor([[[1.0, 2.0, -1.0, 0.5, 0.0]]], dtype=torch.float64)
        >>> teacher = torch.tensor([[[0.5, 1.5, 0.0, -0.5, 2.0]]], dtype=torch.float64)
        >>> found = on_policy_loss(student, teacher, torch.tensor([[1]]), torch.tensor([[True]]))
        >>> round(found.loss.item(), 6), round(found.k1.item(), 6)
        (0.472252, 0.641977)

    Arguments, result and errors are those of :func:`distill_ops.methods.on_policy.loss`, without
    ``backend``.
    """
    options = on_policy_options("reference.on_policy_loss", options)
    if check_teacher_of_sampled(options, "teacher_logits", teacher_logits):
        n_cols = check_alone("student_logits", student_logits, vocab_size)
    else:
        n_cols = check_pair(student_logits, teacher_logits, vocab_size)
    rows, models = TokenRows("student_logits", student_logits), (student_logits, teacher_logits)
    check_on_policy_tokens(rows, models, token_ids, mask, options)
    kept, dtype = _kept(token_ids, mask, options), working_dtype(*models)
    read = (
        x if x is None else x[..., :n_cols].to(dtype).masked_fill(~kept[..., None], 0.0)
        for x in models
    )  # fmt: skip
    return _loss(*read, token_ids, mask, options)


@with_options(OnPolicyOptions, DEFAULTS)
def on_policy_linear_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    **options: Unpack[OnPolicyOptions],
) -> OnPolicyLoss:
    """:func:`distill_ops.methods.on_policy.linear_loss` in eager PyTorch, differentiable by autograd.

    ``softcap((hidden weight^T + bias) * logit_scale)`` are each model's logits, formed in full.
    Hidden states ``[..., S, d]``, heads, ids and mask go in; :class:`OnPolicyLoss` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.reference.on_policy import on_policy_linear_loss
        >>> hidden, ids = torch.eye(2)[None], torch.tensor([[0, 1]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> on_policy_linear_loss(hidden, weight, hidden, weight, ids, ids >= 0).loss.item()
        0.0

    Arguments, result and errors are those of :func:`distill_ops.methods.on_policy.linear_loss`, without
    those that say how it is computed.
    """
    options = on_policy_options("reference.on_policy_linear_loss", options)
    served = check_teacher_of_sampled(options, "teacher_hidden", teacher_hidden)
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    check_head("student_", *student)
    rows = TokenRows("student_hidden", student_hidden)
    of_teacher = head_options("teacher_", teacher_logit_scale, teacher_softcap)
    if served:
        check_no_teacher(teacher_bias, of_teacher)
        n_cols = check_vocabulary(vocab_size, len(student_weight))
    else:
        check_head("teacher_", *teacher, frozen=True)
        arguments = LossArguments(vocab_size=vocab_size)
        n_cols = check_heads(rows, student_weight, *teacher[:2], arguments)
    check_on_policy_tokens(rows, (*student, *teacher), token_ids, mask, options)
    how = ~_kept(token_ids, mask, options), n_cols, working_dtype(*student, *teacher)
    head = head_options("student_", student_logit_scale, student_softcap)
    student_logits, teacher_logits = head_logits(*student, *head, *how), None
    if not served:
        teacher_logits = head_logits(*teacher, *of_teacher, *how).detach()
    return _loss(student_logits, teacher_logits, token_ids, mask, options)


def _kept(token_ids: torch.Tensor, mask: torch.Tensor, options: OnPolicyArguments) -> torch.Tensor:
    return (mask != 0) & (token_ids != options.ignore_index)


def _loss(
    student: torch.Tensor, teacher: torch.Tensor | None, token_ids: torch.Tensor,
    mask: torch.Tensor, options: OnPolicyArguments,
) -> OnPolicyLoss:  # fmt: skip
    """Of logits ``[..., S, n_cols]``, 0 where a token does not count."""
    kept = _kept(token_ids, mask, options)
    read = lambda x: None if x is None else x.to(student.dtype).masked_fill(~kept, 0.0)
    log_q = F.log_softmax(student / options.temperature, -1)
    ids = token_ids.long().masked_fill(~kept, 0)[..., None]
    student_log_prob = read(log_q.gather(-1, ids).squeeze(-1))
    teacher_log_prob, teacher_entropy, divergence = read(options.teacher_log_probs), None, None
    losses = mass = None
    if options.objective == "support":
        losses, outputs = support_distillation_loss(
            student, teacher, divergence=options.divergence, temperature=options.temperature,
            loss_mask=kept, reduction="none", token_outputs=("teacher_mass",), **options.of_support,
        )  # fmt: skip
        mass = outputs.teacher_mass
    elif teacher is not None:
        log_p = F.log_softmax(teacher / options.temperature, -1)
        teacher_log_prob = read(log_p.gather(-1, ids).squeeze(-1))
        teacher_entropy = read(entropy(log_p))
        terms = divergence_terms(student, teacher, options.divergence, options.temperature)
        losses = divergence = read(terms.sum(-1))
    behaviour = read(options.behaviour_log_probs)
    weights, out = importance_weights(student_log_prob.detach(), behaviour, kept, options)
    k1, k2, k3 = estimates(student_log_prob, teacher_log_prob)
    v = read(mask) * (1 if options.token_weights is None else read(options.token_weights))
    if options.objective == "sampled":
        r = k1
        if options.reward_clip is not None:
            r = r.clamp(-options.reward_clip, options.reward_clip)
        value = times(weights, r)
        if options.importance == "clip":
            lower, upper = options.bounds
            value = torch.maximum(value, times(weights.clamp(lower, upper), r))
            out = out & (((r > 0) & (weights < lower)) | ((r < 0) & (weights > upper)))
            if options.dual_clip is not None:
                value = torch.where(r > 0, torch.minimum(value, options.dual_clip * r), value)
                out = out | ((r > 0) & (weights > options.dual_clip))
            weights = weights.masked_fill(out, 0.0)
        slope = times(v * weights, r)  # of log q(y_t)
        moves = (slope != 0) & ~student_log_prob.isneginf()
        moving = torch.where(moves, student_log_prob, 0.0)
        # slope is value where the term moves; its own may be infinite
        losses = torch.where(moves, value * (moving - moving.detach()).exp(), value)
    else:
        losses = times(weights, losses)
    losses = times(v, losses)
    over = options.normalizer if options.normalizer is not None else read(mask).sum()
    if options.reduction != "mean" or not kept.any():
        over = 1
    loss = losses if options.reduction == "none" else losses.sum() / over
    record = divergence, student_log_prob, teacher_log_prob, read(entropy(log_q)), teacher_entropy
    record = (x if x is None else x.detach() for x in record)
    share = out.sum() / kept.sum().clamp(min=1)
    return OnPolicyLoss(loss, *record, k1, k2, k3, weights, out, share.to(loss.dtype), mass)


def times(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The product; 0 where a weight is, whatever the value."""
    return torch.where(weights == 0, torch.zeros_like(values), weights * values)


def estimates(log_q: torch.Tensor, log_p: torch.Tensor | None) -> tuple:
    """k1, k2 and k3 of :func:`distill_ops.reverse_kl_estimate`."""
    if log_p is None:
        return None, None, None
    neither = log_q.isneginf() & log_p.isneginf()
    k1 = torch.where(neither, torch.zeros_like(log_q), log_q - log_p).detach()
    k3 = torch.where(k1.isneginf(), -k1, (-k1).exp() - 1 + k1)
    return k1, k1**2 / 2, k3


def importance_weights(
    log_q: torch.Tensor, log_b: torch.Tensor | None, kept: torch.Tensor, options: OnPolicyArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """``w_t``, for "clip" the ratios themselves, and which ratios are out of the bounds."""
    if options.importance == "none":
        return kept.to(log_q.dtype), torch.zeros_like(kept)
    ratio = (log_q - log_b).exp()
    if options.importance_level == "prefix":
        with_own = ratio.cumprod(-1)
        own = options.objective == "sampled"
        ratio = with_own if own else torch.ones_like(with_own)
        if not own:
            ratio[..., 1:] = with_own[..., :-1]
    ratio = ratio.clamp(max=torch.finfo(ratio.dtype).max ** 0.5)
    lower, upper = options.bounds
    out = kept & ((ratio < lower) | (ratio > upper))
    weights = ratio
    if options.importance == "truncate":
        weights = ratio.clamp(lower, upper)
    if options.importance == "mask":
        weights = ratio.masked_fill(out, 0.0)
    return weights.masked_fill(~kept, 0.0), out
