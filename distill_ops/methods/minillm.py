"""MiniLLM (arXiv:2306.08543): on-policy training by the reverse KL of whole sequences.

Rewards, rewards-to-go and whitening, importance weights, the clipped policy loss, and the whole loss from
one call of the fused statistics. Everything is on ``[batch, sequence]``, aligned with the logits, whose row
t predicts ``token_ids[:, t]``; ``mask`` marks the generated tokens, and nothing at another token counts,
be it NaN. docs/minillm.md has the method, its knobs and what it costs.
"""

from collections.abc import Callable
from functools import partial

import torch

from ..api.dense import distillation_loss
from ..api.linear_statistics import linear_distillation_statistics
from ..api.statistics import distillation_statistics
from ..checks.sequences import ValidTokens, check_finite, check_positive
from ..checks.values import check_share
from ..results import DistillationStatistics, LossComponents, PolicyLoss, StatisticsCoefficients
from ..scalars import flag
from .policy import PolicyTerms, policy_loss
from .rewards import advantages, importance_weights, rewards_to_go, token_rewards, whiten
from .sampling import MixedSampling, mix

__all__ = [
    "MixedSampling",
    "advantages",
    "importance_weights",
    "linear_loss",
    "loss",
    "mix",
    "policy_loss",
    "pretraining_loss",
    "rewards_to_go",
    "token_rewards",
    "whiten",
]


def loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    single_step: bool = True,
    single_step_weights: torch.Tensor | None = None,
    clip: float | None = 0.2,
    entropy_coef: float = 0.0,
    reduction: str = "mean",
    temperature: float = 1.0,
    backend: str = "auto",
) -> PolicyLoss:
    """MiniLLM's loss of sampled sequences, from one :func:`distill_ops.distillation_statistics` call.

    ``policy_loss + mean v_t KL(q_t || p_t) - entropy_coef mean H(q_t)``, in nats: equation 7, clipped.
    Logits ``[batch, sequence, V]`` and what was sampled go in, a :class:`PolicyLoss` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> student = torch.tensor([[[1.0, 2.0, -1.0], [0.0, 0.5, 0.0]]], requires_grad=True)
        >>> teacher = torch.tensor([[[0.5, 1.5, 0.0], [1.0, 0.0, 0.0]]])
        >>> ids, mask = torch.tensor([[1, 0]]), torch.tensor([[True, True]])
        >>> losses = minillm.loss(student, teacher, ids, mask, advantages=torch.tensor([[0.4, 0.0]]))
        >>> losses.loss.backward()
        >>> [round(x.item(), 4) for x in losses[:3]]
        [-0.0642, -0.2, 0.1358]

    With ``old_log_probs=None``, right for the first update after a rollout, the ratio to the old policy is 1,
    so that all weights of the statistics are known before the call: it makes the gradient in the forward
    (its coefficients path). Value and gradient are those of ``old_log_probs`` equal to the log-probabilities.

    Args:
        student_logits, teacher_logits: ``[batch, sequence, V]``, float32, bfloat16, float16, or float64 (not
            in Triton); no gradient flows to the teacher's. Of a model's own input pass ``logits[:, :-1]``.
        token_ids: ``[batch, sequence]``, int64 or int32, what was sampled; anything where not valid.
        mask: ``[batch, sequence]``, bool, or 0 and 1: the generated tokens. The rows of the others are not
            read, and get gradient 0.
        advantages, old_log_probs, weights, clip: as in :func:`policy_loss`; ``old_log_probs=None`` as above.
        single_step: add the reverse KL of each token's whole row. Advantages with ``include="next"`` go with it.
        single_step_weights: ``[batch, sequence]``, v_t above, constants; None for 1, as in MiniLLM's code. The
            paper has the policy's own weights there.
        entropy_coef: of a bonus for the student's entropy; MiniLLM has none.
        reduction: "mean" over the valid tokens of the batch (0 if there is none), or "sum".
        temperature: of both models' logits, positive; that of the sampling.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        :class:`PolicyLoss`: the loss to call ``backward`` on, its parts, and the statistics of each token
        (float32, of which the next rewards and log-probabilities can be taken).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative; on a second backward where the forward made
            the gradient.
    """
    statistics = partial(
        distillation_statistics, student_logits, teacher_logits, temperature=temperature, backend=backend
    )  # fmt: skip
    terms = PolicyTerms.of(
        mask, advantages, old_log_probs, weights, clip, reduction, student_logits
    )
    extra = _extra(terms.valid, single_step, single_step_weights, entropy_coef)
    return _from_statistics(statistics, token_ids, terms, *extra)


def linear_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    single_step: bool = True,
    single_step_weights: torch.Tensor | None = None,
    clip: float | None = 0.2,
    entropy_coef: float = 0.0,
    reduction: str = "mean",
    **head_options,
) -> PolicyLoss:
    """:func:`loss` from hidden states and heads, by one ``linear_distillation_statistics`` call.

    ``policy_loss + mean v_t KL(q_t || p_t) - entropy_coef mean H(q_t)``, in nats: equation 7, clipped.
    Hidden states ``[batch, sequence, d]`` and both heads go in, a :class:`PolicyLoss` comes out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> hidden = torch.eye(2)[None].requires_grad_()  # [1, 2, 2]
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> losses = minillm.linear_loss(
        ...     hidden, weight, torch.eye(2)[None], weight.flip(0), torch.tensor([[0, 1]]),
        ...     torch.ones(1, 2), advantages=torch.tensor([[0.5, -1.0]]),
        ... )
        >>> losses.loss.backward()
        >>> [round(x.item(), 4) for x in losses[:3]], hidden.grad.shape
        ([0.316, 0.25, 0.066], torch.Size([1, 2, 2]))

    No ``[tokens, V]`` tensor exists. With ``old_log_probs=None``, the first update after a rollout, it takes
    four matrix products, else six, as the ratio must be known before its gradient is.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight: as in
            :func:`distill_ops.linear_distillation_statistics`, hidden states ``[batch, sequence, d]``.
        **head_options: those of that function: ``student_bias``, ``teacher_bias``, ``student_logit_scale``,
            ``student_softcap`` and so on, ``temperature``, ``vocab_size``, ``logits_dtype``,
            ``memory_budget``, ``backend``.
        token_ids, mask and the others: as in :func:`loss`.

    Returns:
        :class:`PolicyLoss`, as :func:`loss`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: as :func:`loss`.
    """
    for name in ("coefficients", "divergence", "ignore_index"):  # this loss's own
        if name in head_options:
            raise TypeError(f"linear_loss() got an unexpected keyword argument {name!r}")
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    statistics = partial(linear_distillation_statistics, *heads, **head_options)
    terms = PolicyTerms.of(
        mask, advantages, old_log_probs, weights, clip, reduction, student_hidden
    )
    extra = _extra(terms.valid, single_step, single_step_weights, entropy_coef)
    return _from_statistics(statistics, token_ids, terms, *extra)


def _extra(
    valid: ValidTokens, single_step: bool, weights: torch.Tensor | None, entropy_coef: float
) -> tuple[bool, torch.Tensor | None, float]:
    """What a loss adds to the policy's, checked."""
    flag("single_step", single_step)
    if weights is not None:
        if not single_step:
            raise ValueError(
                "single_step_weights are unused with single_step=False: leave them out"
            )
        weights = valid.numbers("single_step_weights", weights, finite=True, no_gradient=True)
    return single_step, weights, check_finite("entropy_coef", entropy_coef)


class _GradientOf(torch.autograd.Function):
    """A value whose gradient is that of another, which a constant sets apart from it: an infinite one too."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, upstream


def _from_statistics(
    statistics: Callable[..., DistillationStatistics],
    token_ids: torch.Tensor,
    terms: PolicyTerms,
    single_step: bool,
    step_weights: torch.Tensor | None,
    entropy_coef: float,
) -> PolicyLoss:
    ids, shares = terms.valid.ids(token_ids), terms.shares
    step_shares = shares if step_weights is None else shares * step_weights
    made = None
    if terms.old_log_probs is None:
        ratio = terms.ratio(torch.zeros_like(shares))
        clipped = terms.clipped(ratio)
        policy = terms.losses(ratio, clipped)
        slopes = (-terms.advantages * ratio).masked_fill(clipped, 0.0)
        coefficients = StatisticsCoefficients(
            step_shares if single_step else None,
            shares * slopes,
            -entropy_coef * shares if entropy_coef else None,
        )
        made, found = statistics(ids, coefficients=coefficients)
    else:
        found = statistics(ids)
        policy, clipped = terms.of_log_probs(found.student_log_prob)
    policy = (shares * policy).sum()
    step = (step_shares * found.divergence).sum()
    entropy = (shares * found.student_entropy).sum()
    total = policy + step if single_step else policy
    if entropy_coef:
        total = total - entropy_coef * entropy
    if made is not None:
        total = _GradientOf.apply(total, made)
    parts = (x.detach() for x in (policy, step, entropy))
    detached = DistillationStatistics(*(x.detach() for x in found))
    return PolicyLoss(total, *parts, terms.share_of(clipped), detached)


def pretraining_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    lm_coef: float = 1.0,
    kd_ratio: float = 0.5,
    ignore_index: int = -100,
    backend: str = "auto",
) -> LossComponents:
    """The plain-text loss beside MiniLLM's own, from one :func:`distill_ops.distillation_loss` call.

    ``lm_coef ((1 - kd_ratio) cross_entropy + kd_ratio distil)``, ``distil = -mean sum(p log q)``; nats.
    Logits ``[batch, sequence, V]`` and labels go in, a loss and its two parts come out.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> logits, labels = torch.zeros(1, 2, 4, requires_grad=True), torch.tensor([[3, -100]])
        >>> losses = minillm.pretraining_loss(logits, torch.zeros(1, 2, 4), labels, lm_coef=0.5)
        >>> losses.loss.backward()
        >>> [round(x.item(), 4) for x in losses]  # half of log(4), and log(4) twice
        [0.6931, 1.3863, 1.3863]

    Args:
        student_logits, teacher_logits: ``[batch, sequence, V]``, of plain text; no gradient flows to the
            teacher's. The teacher's may be None where ``kd_ratio`` is 0.
        labels: ``[batch, sequence]``, int64 or int32, aligned with the logits.
        lm_coef: of the whole, positive; 1 in MiniLLM's code.
        kd_ratio: the share of the distillation, in [0, 1]; 0.5 in MiniLLM's scripts.
        ignore_index: of labels that do not count.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.

    Returns:
        ``LossComponents(loss, divergence, hard_label)``, means over the labelled tokens; the two parts are
        detached and without their weights.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    lm_coef = check_positive("lm_coef", lm_coef)
    kd_ratio = check_share("kd_ratio", kd_ratio)
    return distillation_loss(
        student_logits,
        teacher_logits,
        labels=labels,
        hard_label_weight=lm_coef * (1 - kd_ratio),
        soft_weight=lm_coef * kd_ratio,
        ignore_index=ignore_index,
        return_components=True,
        backend=backend,
    )
