"""What on-policy methods need of a token, from hidden states and two language-model heads."""

from typing import Any

import torch

from ..checks.options import block_options
from ..checks.split_heads import check_sequence_parallel, split_heads
from ..checks.statistics import both_heads, check_linear_statistics
from ..divergences.base import Divergence
from ..divergences.built_in import ReverseKL
from ..operators.linear_statistics import linear_distillation_statistics as operator
from ..problem import LinearStatisticsInputs, LinearStatisticsOptions, Options
from ..results import DistillationStatistics, StatisticsCoefficients
from .choices import autocast_dtype, choose_backend, gradient_mode
from .statistics import statistics_result


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
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Any = None,
    vocab_offset: int | None = None,
    sequence_parallel: bool = False,
) -> DistillationStatistics | tuple[torch.Tensor, DistillationStatistics]:
    """:func:`distillation_statistics` of two language-model heads, without their logits in memory.

    ``divergence(q, p)``, ``log q_id``, ``log p_id``, ``-sum(q log q)``, ``-sum(p log p)``; in nats.
    Hidden states ``[..., d]``, heads and ids ``[...]`` go in, :class:`DistillationStatistics` comes out.

    Example:
        >>> import torch, distill_ops
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> advantages = torch.tensor([1.0, -0.5])
        >>> loss, found = distill_ops.linear_distillation_statistics(
        ...     hidden, weight, torch.eye(2), weight.flip(0), torch.tensor([0, 1]),
        ...     coefficients=(1.0, -advantages, None),
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in found.student_log_prob.tolist()]
        (0.659, [-0.6803, -0.3064])

    Each model's logits are ``softcap((hidden weight^T + bias) * logit_scale)``, formed a block of tokens
    at a time, as :func:`linear_distillation_loss` does; no ``[tokens, vocab]`` tensor exists. Divergence,
    ``student_log_prob`` and ``student_entropy`` are differentiable in the student's hidden states, weight
    and bias, together: six matrix products in all, as the upstream gradients are known in the backward
    only, which forms the logits again. With ``coefficients`` they are known before, and it is four; two
    without gradients.

    Args:
        student_hidden, teacher_hidden: ``[..., d]``, float32, bfloat16, float16, or float64 (not in
            Triton); the two dimensions d may differ. No gradient flows to the teacher: its hidden
            states must not require one while gradients are enabled.
        student_weight, teacher_weight: ``[V, d]``, of the heads; the teacher's is detached.
        token_ids: ``[...]``, int64 or int32, aligned with the hidden states: of a model's own input pass
            ``hidden[:, :-1]`` of both and ``input_ids[:, 1:]``. Where it is ``ignore_index`` the hidden
            states are not read: results and gradients are 0, and there is no agreement.
        student_bias, teacher_bias: ``[V]``; the teacher's is detached.
        student_logit_scale, teacher_logit_scale: positive factors of the logits.
        student_softcap, teacher_softcap: c of ``c tanh(x / c)``, positive; None for no cap.
        divergence, temperature: as in :func:`distillation_statistics`.
        vocab_size: use the first ``vocab_size`` rows of both heads; the others get gradient 0.
        coefficients: as in :func:`distillation_statistics`: weights of the divergence, the log-probability
            and the entropy, a :class:`StatisticsCoefficients`. The call makes the loss, which is the sum
            over tokens, and its gradients in the forward, which keeps them for one backward. Where
            products or tensors of the student are float16 the backward makes them, by six products: the
            forward would not know ``GradScaler``'s scale. A token whose coefficients are 0 has its
            hidden states read all the same, for its statistics; ``ignore_index`` leaves one out.
        logits_dtype, memory_budget: as in :func:`linear_distillation_loss`.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.
        group, vocab_offset, sequence_parallel: as in :func:`linear_distillation_loss`, of column-parallel heads: one
            or two collectives a block, as in :func:`distillation_statistics`, beside the exchange of widths
            and the sum of the hidden states' gradient.

    Returns:
        :class:`DistillationStatistics`, each ``[...]``, nats, float32 (float64 where a tensor is).
        With ``coefficients`` a pair: the 0-d loss, which is differentiable, and the statistics, detached.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative; on a second backward of a loss whose
            gradients the forward made.
    """
    blocks = block_options(logits_dtype, memory_budget)
    heads = both_heads(student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap)
    split, student_weight, student_bias, teacher_weight, teacher_bias = split_heads(
        group, vocab_offset, vocab_size, student_weight=student_weight, student_bias=student_bias,
        teacher_weight=teacher_weight, teacher_bias=teacher_bias,
    )  # fmt: skip
    ranks = check_sequence_parallel(
        sequence_parallel, group, student_hidden=student_hidden, teacher_hidden=teacher_hidden
    )
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    checked = check_linear_statistics(
        student, teacher, token_ids, divergence, temperature, ignore_index, vocab_size, coefficients,
        split, ranks,
    )  # fmt: skip
    # in training no graph is made through a head
    teacher = teacher_hidden, *(x if x is None else x.detach() for x in teacher[1:])
    autocast = autocast_dtype(student_hidden.device)
    backend = choose_backend(backend, "student_hidden", *student, *teacher)
    options = LinearStatisticsOptions(
        Options.of(checked.loss, checked.n_cols, backend, split=split), *heads,
        blocks._replace(autocast=autocast, token_ranks=ranks), checked.numbers,
    )  # fmt: skip
    parameters = checked.loss.divergence.tensors
    inputs = LinearStatisticsInputs(*student, *teacher, checked.ids, parameters, checked.tensors)
    when = "auto" if checked.coefficients else "backward"
    made = gradient_mode(when, "sum", *student, products=autocast)
    outputs = operator("linear_distillation_statistics", inputs, options, made)
    return statistics_result(outputs, checked.coefficients)
