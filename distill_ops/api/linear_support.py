"""The loss on a support from hidden states and language-model heads instead of logits."""

import torch
from typing_extensions import Unpack

from ..arguments import NO_TAIL, LossOptions, Tail, with_loss_options
from ..checks.options import block_options, given_options
from ..checks.slots import check_support, check_tail
from ..operators.linear import linear_loss
from ..results import LossResult
from .choices import loss_result
from .heads import checked_heads, linear_problem
from .linear import OWN as OF_HEADS
from .support import OWN as OF_SUPPORT

WITHOUT = ("infinities", "teacher_rows", "group", "vocab_offset")
OWN = (*OF_SUPPORT, *(name for name in OF_HEADS if name != "teacher_logits"))


@with_loss_options(*WITHOUT)
def linear_support_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    *,
    k: int,
    support: str = "student",
    tail: str = "bucket",
    mass_terms: bool = False,
    log_prob_floor: float | None = None,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    kept_tokens: int | None = None,
    **options: Unpack[LossOptions],
) -> LossResult:
    """:func:`support_distillation_loss` of two language-model heads, without their logits in memory.

    ``softcap((hidden weight^T + bias) * logit_scale)`` are each model's logits, a block at a time.
    Hidden states ``[..., d]`` and heads ``[V, d]`` go in, the loss comes out; the student's get gradients.

    Example:
        >>> import torch, distill_ops
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> loss = distill_ops.linear_support_distillation_loss(
        ...     hidden, weight, torch.eye(2), weight.flip(0), k=2, divergence="reverse_kl"
        ... )
        >>> round(loss.item(), 4)
        0.066

    Of a block's logits the support is chosen, the teacher's log-probabilities are taken there, and the
    loss and its gradient are made: the student's logits are formed once for choice and loss, and there
    are four matrix products in all where the forward makes the gradients, six where the backward
    does (which chooses again, the same tokens), two without gradients. Beside the logits' buffers
    there are ``[rows, K]`` tensors alone.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
            student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap,
            logits_dtype, memory_budget, kept_tokens, vocab_size, gradient: as in
            :func:`linear_distillation_loss`. Lower ``logits_dtype`` make more logits equal, of which
            any may be chosen.
        k, support, tail, mass_terms, log_prob_floor: as in :func:`support_distillation_loss`.

    The others, the result and the errors are those of :func:`distill_ops.distillation_loss`.
    """
    name = "linear_support_distillation_loss"
    arguments = given_options(name, options, *WITHOUT, own=OWN)
    blocks = block_options(logits_dtype, memory_budget, kept_tokens)
    *heads, n_cols, arguments = checked_heads(
        (student_hidden, student_weight, student_bias), (student_logit_scale, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias), (teacher_logit_scale, teacher_softcap),
        arguments,
    )  # fmt: skip
    k = check_support(support, k, n_cols, arguments)
    checked = check_tail(Tail(tail, mass_terms, log_prob_floor), arguments.divergence)
    if not arguments.soft:
        checked, support, k = NO_TAIL, None, None
    inputs, options, made = linear_problem(
        *heads, (None, None), checked, n_cols, arguments, blocks, support=support, support_k=k
    )
    outputs = linear_loss(name, inputs, options, made)
    return loss_result(outputs, options.loss, arguments.return_components)
