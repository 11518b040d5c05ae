"""The linear form: hidden states and heads, their logits formed in full (semantics.md, 10)."""

from typing import Any

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, with_loss_options
from ..checks.heads import check_head, check_heads, check_no_teacher
from ..checks.options import given_options, head_options
from ..checks.split_heads import check_sequence_parallel, split_heads
from ..checks.statistics import both_heads, check_linear_statistics
from ..checks.tokens import check_options, check_token_ids
from ..checks.values import TokenRows
from ..divergences.base import Divergence
from ..divergences.built_in import ReverseKL
from ..problem import working_dtype
from ..results import DistillationStatistics, LossResult, StatisticsCoefficients
from .dense import distillation_loss, token_weights
from .split import both_gathered, head_gathered, heads_gathered, tokens_gathered
from .tokens import statistics_of, token_log_probs

WITHOUT = ("infinities", "gradient", "backend")


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    unread: torch.Tensor,
    n_cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``softcap((hidden weight^T + bias) * scale)``, ``[..., n_cols]``, softcap being
    ``c tanh(x / c)``.

    Neither the hidden states of unread tokens nor further rows of the head are touched: the NaN
    that they may hold would reach the gradients of the others as 0 * NaN."""
    hidden = hidden.to(dtype).masked_fill(unread[..., None], 0.0)
    logits = hidden @ weight[:n_cols].to(dtype).t()
    if bias is not None:
        logits = logits + bias[:n_cols].to(dtype)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@with_loss_options(*WITHOUT)
def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logits: torch.Tensor | None = None,
    sequence_parallel: bool = False,
    **options: Unpack[LossOptions],
) -> LossResult:
    """:func:`distill_ops.linear_distillation_loss` in eager PyTorch, differentiable by autograd.

    ``softcap((hidden weight^T + bias) * logit_scale)`` are each model's logits, formed in full.
    Hidden states ``[..., d]`` and heads ``[V, d]`` go in, the loss comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> reference.linear_distillation_loss(
        ...     hidden, weight, hidden, weight, divergence="forward_kl"
        ... ).item()
        0.0

    Arguments, result and errors are those of :func:`distill_ops.linear_distillation_loss`
    (docs/semantics.md, section 10), without those that say how it is computed. Logits are formed in
    float32 (float64 where a tensor is); autograd gives the gradients of the student's hidden states,
    weight and bias. With ``group`` the heads are gathered, and each rank has the gradient of its own rows
    and the whole one of its hidden states.
    """
    arguments = given_options("reference.linear_distillation_loss", options, *WITHOUT)
    student_head = head_options("student_", student_logit_scale, student_softcap)
    teacher_head = head_options("teacher_", teacher_logit_scale, teacher_softcap)
    split, student_weight, student_bias, teacher_weight, teacher_bias, teacher_logits = split_heads(
        arguments.group, arguments.vocab_offset, arguments.vocab_size,
        student_weight=student_weight, student_bias=student_bias, teacher_weight=teacher_weight,
        teacher_bias=teacher_bias, teacher_logits=teacher_logits,
    )  # fmt: skip
    hidden = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
    if check_sequence_parallel(sequence_parallel, arguments.group, **hidden) > 1:
        student_hidden, teacher_hidden = (tokens_gathered(x, split) for x in hidden.values())
    if split.group is not None:
        if teacher_logits is not None:
            like = teacher_logits.new_empty((1, student_weight.shape[0]))
            _, teacher_logits = both_gathered(split, like, teacher_logits)
        heads = (student_weight, student_bias), (teacher_weight, teacher_bias)
        heads = heads_gathered(split, *heads)
        (student_weight, student_bias), (teacher_weight, teacher_bias) = heads
    check_head("student_", student_hidden, student_weight, student_bias)
    if teacher_hidden is not None and teacher_weight is not None:
        check_head("teacher_", teacher_hidden, teacher_weight, teacher_bias, frozen=True)
    rows = TokenRows("student_hidden", student_hidden)
    n_cols = check_heads(
        rows, student_weight, teacher_hidden, teacher_weight, arguments, teacher_logits
    )
    if teacher_hidden is None or teacher_weight is None:
        check_no_teacher(teacher_bias, teacher_head)
    arguments = check_options(rows, arguments)
    teacher = teacher_hidden, teacher_weight, teacher_logits
    dtype = working_dtype(student_hidden, student_weight, *teacher)
    unread = token_weights(student_hidden, dtype, arguments.counted) == 0
    student = head_logits(
        student_hidden, student_weight, student_bias, *student_head, unread, n_cols, dtype
    )
    teacher = None if teacher_logits is None else teacher_logits[..., :n_cols]
    if teacher_hidden is not None and teacher_weight is not None:
        if arguments.teacher_rows is not None:  # any row may be another token's
            unread = torch.zeros_like(teacher_hidden[..., 0], dtype=torch.bool)
        teacher = head_logits(
            teacher_hidden, teacher_weight, teacher_bias, *teacher_head, unread, n_cols, dtype
        ).detach()
    for name in (
        "vocab_size",
        "group",
        "vocab_offset",
    ):  # the logits have all columns, and no other
        options.pop(name, None)
    return distillation_loss(student, teacher, **options)


def linear_token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: Any = None,
    vocab_offset: int | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`distill_ops.linear_token_log_probs` in eager PyTorch, differentiable by autograd.

    ``log_softmax(softcap((hidden weight^T + bias) * logit_scale) / T)`` at the tokens' ids, in nats.
    Hidden states ``[..., d]``, a head and ids ``[...]`` go in, ``[...]`` or a pair comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> log_probs = reference.linear_token_log_probs(hidden, weight, torch.tensor([0, 1]))
        >>> [round(x, 4) for x in log_probs.tolist()]
        [-0.6803, -0.3064]

    Arguments, result and errors are those of :func:`distill_ops.linear_token_log_probs`, without those
    that say how it is computed.
    """
    head = head_options("", logit_scale, softcap)
    split, weight, bias = split_heads(group, vocab_offset, None, weight=weight, bias=bias)
    if check_sequence_parallel(sequence_parallel, group, hidden=hidden) > 1:
        hidden = tokens_gathered(hidden, split)
    if split.group is not None:
        weight, bias = (head_gathered(x, split) for x in (weight, bias))
    check_head("", hidden, weight, bias)
    rows, n_cols = TokenRows("hidden", hidden), weight.shape[0]
    checked = check_token_ids(rows, token_ids, temperature, ignore_index)
    dtype = working_dtype(hidden, weight)
    ignored = checked.ids == checked.ignore_index
    logits = head_logits(hidden, weight, bias, *head, ignored, n_cols, dtype)
    return token_log_probs(
        logits, checked.ids, temperature=checked.temperature, ignore_index=checked.ignore_index,
        return_entropy=return_entropy,
    )  # fmt: skip


def linear_distillation_statistics(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    divergence: Divergence | str = ReverseKL(),
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    coefficients: StatisticsCoefficients | None = None,
    group: Any = None,
    vocab_offset: int | None = None,
    sequence_parallel: bool = False,
) -> DistillationStatistics | tuple[torch.Tensor, DistillationStatistics]:
    """:func:`distill_ops.linear_distillation_statistics` in eager PyTorch, differentiable by autograd.

    ``divergence(q, p)``, ``log q_id``, ``log p_id``, ``-sum(q log q)``, ``-sum(p log p)``; in nats.
    Hidden states ``[..., d]``, heads ``[V, d]`` and ids ``[...]`` go in, results of ``[...]`` come out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> found = reference.linear_distillation_statistics(
        ...     hidden, weight, hidden, weight, torch.tensor([0, 1])
        ... )
        >>> [round(x, 4) for x in found.student_log_prob.tolist()], found.divergence.tolist()
        ([-0.6803, -0.3064], [0.0, 0.0])

    Arguments, result and errors are those of :func:`distill_ops.linear_distillation_statistics`, without
    those that say how it is computed.
    """
    heads = both_heads(student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap)
    split, student_weight, student_bias, teacher_weight, teacher_bias = split_heads(
        group, vocab_offset, vocab_size, student_weight=student_weight, student_bias=student_bias,
        teacher_weight=teacher_weight, teacher_bias=teacher_bias,
    )  # fmt: skip
    hidden = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
    if check_sequence_parallel(sequence_parallel, group, **hidden) > 1:
        student_hidden, teacher_hidden = (tokens_gathered(x, split) for x in hidden.values())
    if split.group is not None:
        gathered = heads_gathered(
            split, (student_weight, student_bias), (teacher_weight, teacher_bias)
        )
        (student_weight, student_bias), (teacher_weight, teacher_bias) = gathered
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    checked = check_linear_statistics(
        student, teacher, token_ids, divergence, temperature, ignore_index, vocab_size, coefficients
    )
    dtype, unread = working_dtype(*student, *teacher), checked.ids == checked.loss.ignore_index
    logits, of_teacher = (
        head_logits(*tensors, *head, unread, checked.n_cols, dtype)
        for tensors, head in zip((student, teacher), heads, strict=True)
    )
    return statistics_of(logits, of_teacher.detach(), checked)
