"""What users get beside a tensor, in types."""

from typing import NamedTuple

import torch


class LossComponents(NamedTuple):
    """A loss and its two parts, detached and reduced like it, for logging (nats).

    Example:
        >>> import torch, distill_ops
        >>> student, teacher = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 4)
        >>> losses = distill_ops.distillation_loss(
        ...     student, teacher, labels=torch.tensor([3]), divergence="forward_kl",
        ...     hard_label_weight=0.5, return_components=True,
        ... )
        >>> losses.loss.backward()
        >>> round(losses.divergence.item(), 4), round(losses.hard_label.item(), 4)  # log(4)
        (0.0, 1.3863)
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    hard_label: torch.Tensor


class TokenOutputs(NamedTuple):
    """What a loss found of each token beside it: those of ``token_outputs=``, each ``[...]``, None else.

    Of whole rows at the loss's temperature, without a gradient; nats, float32 (float64 for float64
    inputs), the two argmax int64. 0 where the token's weight is 0, and -1 for its argmax; NaN and -1 of a
    row without a softmax.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
        >>> loss, outputs = distill_ops.distillation_loss(
        ...     logits, logits, token_outputs=("student_argmax", "acceptance")
        ... )
        >>> outputs.student_argmax.tolist(), round(outputs.acceptance.item(), 4), outputs.log_prob
        ([2], 1.0, None)
    """

    log_prob: torch.Tensor | None = None  # the student's, of the label or token_ids=
    student_entropy: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    student_argmax: torch.Tensor | None = None  # the most likely token; the first of equals
    teacher_argmax: torch.Tensor | None = None
    acceptance: torch.Tensor | None = (
        None  # sum(min(p, q)): of speculative decoding (arXiv:2211.17192)
    )
    teacher_mass: torch.Tensor | None = None  # sum(p) over the K, or where no student logit is -inf


LossResult = (
    torch.Tensor
    | LossComponents
    | tuple[torch.Tensor, TokenOutputs]
    | tuple[LossComponents, TokenOutputs]
)

TOKEN_OUTPUTS = TokenOutputs._fields
OF_TEACHER = "teacher_entropy", "teacher_argmax", "acceptance", "teacher_mass"
OF_WHOLE_TEACHER = "teacher_entropy", "acceptance"  # a top-k teacher does not have them
ARGMAX = "student_argmax", "teacher_argmax"
NUMBERS = tuple(name for name in TOKEN_OUTPUTS if name not in ARGMAX)


def asked(names: tuple[str, ...], given: tuple[str, ...]) -> tuple[str, ...]:
    """Those of these token outputs that are given."""
    return tuple(name for name in names if name in given)


class DistillationStatistics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    ``divergence``, ``student_log_prob`` and ``student_entropy`` are differentiable.

    Example:
        >>> import torch, distill_ops
        >>> logits, ids = torch.zeros(2, 4), torch.tensor([3, -100])
        >>> found = distill_ops.distillation_statistics(logits, logits, ids)
        >>> [round(x, 4) for x in found.student_log_prob.tolist()], found.top1_agreement.tolist()
        ([-1.3863, 0.0], [True, False])
    """

    divergence: torch.Tensor
    student_log_prob: torch.Tensor  # of the token's id
    teacher_log_prob: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals


class StatisticsCoefficients(NamedTuple):
    """What a loss multiplies the three differentiable statistics by: a number, a 0-d tensor, one a token
    ``[...]``, or None for none; constants.

    Example:
        >>> import torch, distill_ops
        >>> logits, ids = torch.zeros(2, 4), torch.tensor([3, 0])
        >>> advantages = torch.tensor([1.0, -0.5])
        >>> coefficients = distill_ops.StatisticsCoefficients(log_prob=-advantages, entropy=-0.01)
        >>> loss, _ = distill_ops.distillation_statistics(
        ...     logits, logits, ids, coefficients=coefficients
        ... )
        >>> round(loss.item(), 4)  # 0.5 log(4) - 0.02 log(4)
        0.6654
    """

    divergence: float | torch.Tensor | None = None
    log_prob: float | torch.Tensor | None = None
    entropy: float | torch.Tensor | None = None


class PolicyLoss(NamedTuple):
    """A policy method's loss and its parts, for logging: 0-d and detached, but the loss.

    ``loss = policy + single_step - entropy_coef * entropy``, each reduced over the valid tokens; the single
    step is part of the loss only where the method was asked for it.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> logits, ids = torch.zeros(1, 2, 4, requires_grad=True), torch.tensor([[3, 0]])
        >>> losses = minillm.loss(
        ...     logits, torch.zeros(1, 2, 4), ids, torch.ones(1, 2), advantages=torch.ones(1, 2)
        ... )
        >>> round(losses.policy.item(), 4), round(losses.entropy.item(), 4)  # -1, log(4)
        (-1.0, 1.3863)
    """

    loss: torch.Tensor
    policy: torch.Tensor
    single_step: torch.Tensor  # the divergence of whole rows, with its weights
    entropy: torch.Tensor  # the student's
    clipped: torch.Tensor  # the share of the valid tokens whose ratio was clipped
    statistics: DistillationStatistics  # of each token, detached; 0 of those that are not valid


class DistillationMetrics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    A divergence that is infinite (one model excludes a token that the other does not) is +inf.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.zeros(3, 4)
        >>> metrics = distill_ops.distillation_metrics(logits, logits)
        >>> metrics.expected_acceptance.tolist(), round(metrics.student_entropy[0].item(), 4)
        ([1.0, 1.0, 1.0], 1.3863)
    """

    forward_kl: torch.Tensor  # KL(teacher || student)
    reverse_kl: torch.Tensor  # KL(student || teacher)
    jensen_shannon: torch.Tensor  # beta 0.5
    total_variation: torch.Tensor
    expected_acceptance: torch.Tensor  # sum(min(p, q)): of speculative decoding (arXiv:2211.17192)
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals


class OnPolicyLoss(NamedTuple):
    """A loss of :mod:`distill_ops.methods.on_policy`, and numbers to log: detached, nats, float32 (float64 for
    float64 inputs), each ``[...]`` unless it says 0-d; 0 where a token does not count. None: not known.

    Example:
        >>> import torch
        >>> from distill_ops.methods import on_policy
        >>> logits, ids = torch.zeros(1, 2, 4), torch.tensor([[3, 0]])
        >>> found = on_policy.loss(logits, logits, ids, torch.tensor([[True, False]]))
        >>> [[round(x, 4) for x in row] for row in found.student_log_prob.tolist()]
        [[-1.3863, 0.0]]
    """

    loss: torch.Tensor  # 0-d, differentiable; [...] for reduction="none"
    divergence: torch.Tensor | None  # over the whole vocabulary
    student_log_prob: torch.Tensor  # of the sampled token
    teacher_log_prob: torch.Tensor | None
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor | None
    k1: torch.Tensor | None  # estimates of the reverse KL: distill_ops.reverse_kl_estimate
    k2: torch.Tensor | None
    k3: torch.Tensor | None
    importance_weights: torch.Tensor  # what the gradient is multiplied by: after the bounds
    out_of_bounds: torch.Tensor  # bool: truncated, masked, or without a gradient by the clip
    share_out_of_bounds: torch.Tensor  # 0-d: of the tokens that count
    teacher_mass: torch.Tensor | None  # the teacher's probability of the support


class OutputBuffers(NamedTuple):
    """Where a path puts the token outputs of n tokens."""

    names: tuple[str, ...]  # those that are asked for, in the order of TokenOutputs
    numbers: torch.Tensor | None  # [a, n]
    argmax: torch.Tensor | None  # [b, n] int64

    @classmethod
    def of(
        cls,
        names: tuple[str, ...],
        n_rows: int,
        like: torch.Tensor,
        dtype: torch.dtype,
        filled=True,
    ) -> "OutputBuffers":
        """``filled``: those of tokens without weight, until they are written."""
        found = []
        for kind, kept_in, fill in ((NUMBERS, dtype, 0), (ARGMAX, torch.int64, -1)):
            several = len(asked(kind, names))
            buffer = like.new_empty((several, n_rows), dtype=kept_in) if several else None
            found.append(buffer.fill_(fill) if several and filled else buffer)
        return cls(names, *found)

    def each(self, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """Those of some tokens, ``[n]`` each, in the order of the names."""
        numbers, argmax = (iter(()) if x is None else iter(x) for x in self[1:])
        return tuple(next(argmax if name in ARGMAX else numbers)[rows] for name in self.names)

    def shaped(self, leading: torch.Size) -> tuple[torch.Tensor | None, ...]:
        """Numbers and argmax of the tokens ``leading``."""
        return tuple(x if x is None else x.view(x.shape[0], *leading) for x in self[1:])
