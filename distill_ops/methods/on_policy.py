"""On-policy distillation: the student samples, the teacher scores every token that it wrote.

The per-token objective is ``E_{y ~ sg(q)} sum_t D(q_t, p_t)``: the divergence at every token of what the
student samples, without a gradient through the sampling. docs/on-policy.md says what each way to
estimate it optimises, and what other trainers call it.
"""

from collections.abc import Callable
from functools import partial

import torch
from typing_extensions import Unpack

from ..api.estimators import KINDS, reverse_kl_estimate
from ..api.linear_statistics import linear_distillation_statistics
from ..api.linear_support import linear_support_distillation_loss
from ..api.linear_tokens import linear_token_log_probs
from ..api.statistics import distillation_statistics
from ..api.support import support_distillation_loss
from ..api.tokens import token_log_probs
from ..arguments import with_options
from ..checks.heads import check_head, check_no_teacher
from ..checks.logits import check_alone, check_pair, check_vocabulary
from ..checks.on_policy import OnPolicyTokens, check_on_policy_tokens, check_teacher_of_sampled
from ..checks.on_policy_options import (
    DEFAULTS,
    OnPolicyArguments,
    OnPolicyOptions,
    on_policy_options,
)
from ..checks.options import head_options
from ..checks.values import TokenRows
from ..results import DistillationStatistics, OnPolicyLoss
from .importance import importance_weights, sampled_losses, times

__all__ = ["OnPolicyLoss", "linear_loss", "loss"]


@with_options(OnPolicyOptions, DEFAULTS)
def loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    vocab_size: int | None = None,
    backend: str = "auto",
    **options: Unpack[OnPolicyOptions],
) -> OnPolicyLoss:
    """Loss of tokens that the student sampled, against a teacher that scores them, in nats.

    ``sum_t m_t v_t w_t D(q_t, p_t) / sum_t m_t``; "sampled": ``log q(y_t) - log p(y_t)`` for D; see below.
    Logits ``[..., S, V]``, ids and mask ``[..., S]`` go in; :class:`OnPolicyLoss` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import on_policy
        >>> student = torch.tensor([[[1.0, 2.0, -1.0, 0.5, 0.0]]], requires_grad=True)
        >>> teacher = torch.tensor([[[0.5, 1.5, 0.0, -0.5, 2.0]]])
        >>> ids, mask = torch.tensor([[1]]), torch.tensor([[True]])
        >>> found = on_policy.loss(student, teacher, ids, mask)
        >>> found.loss.backward()
        >>> round(found.loss.item(), 4), round(found.k1.item(), 4)
        (0.4723, 0.642)
        >>> old = found.student_log_prob - 0.5  # of a policy that found the token less likely
        >>> step = on_policy.loss(
        ...     student, teacher, ids, mask, objective="sampled", behaviour_log_probs=old,
        ...     importance="truncate", bounds=(0.0, 1.5),
        ... )
        >>> step.importance_weights.item(), round(step.loss.item(), 4)
        (1.5, 0.963)

    With m the mask, v the token weights, w the importance weights (constants), and q, p the softmax of
    student and teacher at the temperature. What the expected gradient is, the tokens drawn from the
    student itself (derivations, and all biases: docs/on-policy.md):

    | objective | of a token, D | target |
    |---|---|---|
    | "full" | the divergence over the whole vocabulary | ``E_{y ~ sg(q)} sum_t D(q_t, p_t)``: exact given the tokens |
    | "support" | the divergence over k tokens and the rest (:func:`distill_ops.support_distillation_loss`) | the same of the coarser D, which is at most the full one where ``tail="bucket"`` |
    | "sampled" | ``sg(r_t)``, ``r = log q(y_t) - log p(y_t)``, with the gradient of ``sg(r_t) log q(y_t)`` | ``E_{y ~ sg(q)} sum_t KL(q_t || p_t)``, unbiased: a policy gradient with reward -k1 |

    The reverse KL of whole sequences has the same value as "full" with the reverse KL, and in its
    gradient that of the sampling as well: rewards-to-go (MiniLLM, arXiv:2306.08543) have it, these
    objectives do not. GKD (arXiv:2306.13649) is "full" with its divergence.

    One fused call: :func:`distill_ops.distillation_statistics` ("full", "sampled"),
    :func:`distill_ops.support_distillation_loss`, or :func:`distill_ops.token_log_probs` (with
    ``teacher_log_probs``). The gradient is made in its forward where the weights are known before: "full"
    without importance weights, and "support" without any, both unless ``reduction="none"``.

    Args:
        student_logits, teacher_logits: ``[..., S, V]``, as in :func:`distill_ops.distillation_loss`;
            aligned with the ids: those at position t predict ``token_ids[..., t]``. Of a model's own
            input pass ``logits[:, :-1]`` of both, ``input_ids[:, 1:]`` and the mask's ``[:, 1:]``.
        token_ids: ``[..., S]``, int64 or int32: what the student sampled.
        mask: ``[..., S]``, bool, int or float: 1 for the tokens that count, 0 for the others, padding on
            either side and prompts, of which nothing is read: they may hold NaN, and any id. A
            token of id ``ignore_index`` does not count either.
        objective: "full", "support" or "sampled".
        divergence: a :class:`distill_ops.Divergence` or its name; "sampled" has the reverse KL alone.
        temperature: positive, of both models; that of the sampling, if nothing is to correct for it.
        k, support, tail, mass_terms, log_prob_floor: as in
            :func:`distill_ops.support_distillation_loss`; with ``objective="support"``, which needs ``k``.
        teacher_log_probs: ``[..., S]``, float, ``log p(y_t)`` at the temperature. "sampled": of a server that
            gives no more, ``teacher_logits`` being None then. "support": for k1 to k3, beside the logits.
        behaviour_log_probs: ``[..., S]``, float, ``log b(y_t)``: of the policy that sampled (an older
            student, or an inference engine's), at its own temperature and truncation. With importance.
        importance: how ``w_t`` is made of ``rho_t = q(y_t) / b(y_t)``. "none": 1. "truncate": clamped to the
            bounds (TIS). "mask": 0 outside of the bounds (IcePop). "clip", with "sampled": PPO's
            ``max(r rho, r clip(rho))``: no gradient where the reward would move rho further out. The
            ratio, or product, counts as at most the square root of the largest float (float32: 1.8e19).
        bounds: ``(lower, upper)`` of the ratio, ``0 <= lower < upper <= inf``. By default (0, 2) for
            "truncate", (0.5, 2) for "mask", (0.8, 1.2) for "clip". "truncate" with (0, inf) leaves it as it is.
        dual_clip: a number above 1, with "clip": where ``r > 0`` the value is at most ``dual_clip r``, constant
            where rho is above (arXiv:1912.09729; verl's ``clip_ratio_c``, 3 by default there). None: no bound.
        importance_level: "token": the token's own ratio. That corrects the draw of ``y_t``, which "sampled"
            needs, but neither that of its prefix nor anything of D, which does not depend on ``y_t``: "full"
            and "support" keep their expectation, prefixes being the behaviour's. "prefix": the product of
            the ratios of the tokens before, for "sampled" with its own: unbiased for ``y ~ sg(q)``, of a
            variance that grows with the length. It goes along the last axis, which has to be one sequence:
            not packed ones, nor a batch's tokens in a line. Not with "clip".
        reward_clip: ``r_t`` lies in ``[-reward_clip, reward_clip]`` (verl's ``loss_max_clamp``), for "sampled".
            Without it a token that the teacher excludes makes loss and gradient infinite.
        token_weights: ``[..., S]``, int or float: v above, constants, of either sign.
        reduction: "mean" (over the sum of the mask: weights do not count in it), "sum", or "none".
        normalizer: number or 0-d tensor that replaces the mask's sum in "mean": the tokens of all
            micro-batches, or the number of sequences.
        vocab_size: use the first ``vocab_size`` columns of both; the others get gradient 0.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        :class:`OnPolicyLoss`: the loss, 0-d (``[..., S]`` with "none"), 0 with a graph where no token counts, and
        detached numbers of each token to log. The value of "sampled" is the mean of ``w_t r_t``, an estimate
        of the reverse KL, of either sign (of "clip" the mean of its maximum); k1 to k3 know nothing of
        ``reward_clip``. With "support" the divergence and the teacher's entropy are None, and so are its
        log-probability and k1 to k3 without ``teacher_log_probs``; a server's teacher has no entropy either.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative; on a second backward where the gradient was made
            in the forward: take ``reduction="none"`` and its sum or mean to call backward again.
    """
    options = on_policy_options("on_policy.loss", options)
    served = check_teacher_of_sampled(options, "teacher_logits", teacher_logits)
    if served:
        n_cols = check_alone("student_logits", student_logits, vocab_size)
    else:
        n_cols = check_pair(student_logits, teacher_logits, vocab_size)
    models = (student_logits,) if served else (student_logits, teacher_logits)
    rows = TokenRows("student_logits", student_logits)
    tokens = check_on_policy_tokens(rows, models, token_ids, mask, options)
    models = (x if x.shape[-1] == n_cols else x[..., :n_cols] for x in models)
    function = token_log_probs if served else distillation_statistics
    if options.objective == "support":
        function = support_distillation_loss
    return _loss(partial(function, *models, backend=backend), tokens, options)


@with_options(OnPolicyOptions, DEFAULTS)
def linear_loss(
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
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    backend: str = "auto",
    **options: Unpack[OnPolicyOptions],
) -> OnPolicyLoss:
    """:func:`loss` of two language-model heads, without their logits in memory.

    ``softcap((hidden weight^T + bias) * logit_scale)`` are each model's logits, a block at a time.
    Hidden states ``[..., S, d]``, heads, ids and mask go in; :class:`OnPolicyLoss` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import on_policy
        >>> hidden = torch.eye(2)[None].requires_grad_()  # one sequence of two tokens
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> found = on_policy.linear_loss(
        ...     hidden, weight, torch.eye(2)[None], weight.flip(0), torch.tensor([[0, 1]]),
        ...     torch.tensor([[True, True]]), objective="sampled",
        ... )
        >>> found.loss.backward()
        >>> round(found.loss.item(), 4), [round(x, 4) for x in found.k1[0].tolist()]
        (0.25, [0.5, 0.0])

    One call of :func:`distill_ops.linear_distillation_statistics`,
    :func:`distill_ops.linear_support_distillation_loss` or :func:`distill_ops.linear_token_log_probs`: four
    matrix products in all where the forward makes the gradients (see :func:`loss`) or with
    ``teacher_log_probs``, else six.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
            student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap, vocab_size,
            logits_dtype, memory_budget: as in :func:`distill_ops.linear_distillation_loss`. With
            ``teacher_log_probs`` the teacher's hidden states and weight are None.

        The others are those of :func:`loss`.

    Result and errors are those of :func:`loss`.
    """
    options = on_policy_options("on_policy.linear_loss", options)
    served = check_teacher_of_sampled(options, "teacher_hidden", teacher_hidden)
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    check_head("student_", *student)
    how = {"logits_dtype": logits_dtype, "memory_budget": memory_budget, "backend": backend}
    if served:
        check_no_teacher(
            teacher_bias, head_options("teacher_", teacher_logit_scale, teacher_softcap)
        )
        n_cols = check_vocabulary(vocab_size, len(student_weight))
        call = partial(
            linear_token_log_probs, student_hidden, student_weight[:n_cols],
            bias=None if student_bias is None else student_bias[:n_cols],
            logit_scale=student_logit_scale, softcap=student_softcap, **how,
        )  # fmt: skip
    else:
        check_head("teacher_", *teacher, frozen=True)
        on_support = options.objective == "support"
        call = partial(
            linear_support_distillation_loss if on_support else linear_distillation_statistics,
            *student[:2], *teacher[:2], student_bias=student_bias, teacher_bias=teacher_bias,
            student_logit_scale=student_logit_scale, student_softcap=student_softcap,
            teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_softcap,
            vocab_size=vocab_size, **how,
        )  # fmt: skip
    rows, models = TokenRows("student_hidden", student_hidden), (*student, *teacher)
    return _loss(call, check_on_policy_tokens(rows, models, token_ids, mask, options), options)


def _loss(call: Callable, tokens: OnPolicyTokens, options: OnPolicyArguments) -> OnPolicyLoss:
    """The loss from the fused function, bound to the models, which is called once."""
    shared = {"temperature": options.temperature, "ignore_index": options.ignore_index}
    known = options.importance == "none" and options.reduction != "none"
    if options.objective == "support":
        shared |= options.of_support | {"divergence": options.divergence}
        return _on_support(partial(call, **shared), tokens, options, known)
    if options.teacher_log_probs is not None:
        log_q, entropy = call(tokens.ids, return_entropy=True, **shared)
        found = _record(log_q, entropy, tokens)
    elif options.objective == "full" and known:
        coefficients = tokens.weights / tokens.denominator, None, None
        loss, found = call(
            tokens.ids, divergence=options.divergence, coefficients=coefficients, **shared
        )
        weights = importance_weights(found.student_log_prob, tokens, options)
        return _result(loss, found, tokens, *weights)
    else:
        found = call(tokens.ids, divergence=options.divergence, **shared)
    log_q, log_p = found.student_log_prob, found.teacher_log_prob
    weights, out = importance_weights(log_q, tokens, options)
    if options.objective == "full":
        losses = times(weights, found.divergence)
    else:
        losses, weights, out = sampled_losses(log_q, log_p, weights, out, tokens, options)
    return _result(_reduced(losses, tokens, options), found, tokens, weights, out)


def _on_support(
    call: Callable, tokens: OnPolicyTokens, options: OnPolicyArguments, known: bool
) -> OnPolicyLoss:
    outputs = ("log_prob", "student_entropy", "teacher_mass")
    call = partial(call, token_outputs=outputs, token_ids=tokens.ids)
    fused = known and options.token_weights is None  # else one that counts may have a weight of 0
    if fused:
        loss, given = call(loss_mask=tokens.weights, normalizer=tokens.denominator)
    else:
        losses, given = call(loss_mask=tokens.kept, reduction="none")
    weights, out = importance_weights(given.log_prob, tokens, options)
    if not fused:
        loss = _reduced(times(weights, losses), tokens, options)
    found = _record(given.log_prob, given.student_entropy, tokens)
    return _result(loss, found, tokens, weights, out, given.teacher_mass)


def _record(
    log_q: torch.Tensor, entropy: torch.Tensor, tokens: OnPolicyTokens
) -> DistillationStatistics:
    """What is known of a token whose statistics of both models are not."""
    log_p = tokens.teacher_log_probs
    log_p = log_p if log_p is None else log_p.to(log_q.dtype)
    return DistillationStatistics(None, log_q, log_p, entropy, None, None)


def _reduced(losses: torch.Tensor, tokens: OnPolicyTokens, options: OnPolicyArguments):
    losses = times(tokens.weights, losses)
    return losses if options.reduction == "none" else losses.sum() / tokens.denominator


def _result(
    loss: torch.Tensor, found: DistillationStatistics, tokens: OnPolicyTokens,
    weights: torch.Tensor, out: torch.Tensor, teacher_mass: torch.Tensor | None = None,
) -> OnPolicyLoss:  # fmt: skip
    divergence, log_q, log_p, entropy, teacher_entropy, _ = (
        x if x is None else x.detach() for x in found
    )
    estimates = (
        None if log_p is None else reverse_kl_estimate(log_q, log_p, kind=kind) for kind in KINDS
    )
    share = out.sum() / tokens.kept.sum().clamp(min=1)
    return OnPolicyLoss(
        loss, divergence, log_q, log_p, entropy, teacher_entropy, *estimates, weights, out,
        share.to(log_q.dtype), teacher_mass,
    )  # fmt: skip
