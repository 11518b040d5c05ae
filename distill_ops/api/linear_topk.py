"""The top-k loss from hidden states and a language-model head instead of logits."""

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, Tail, with_loss_options
from ..checks.heads import check_head
from ..checks.logits import check_vocabulary
from ..checks.options import block_options, given_options, head_options
from ..checks.slots import check_topk
from ..checks.split_heads import check_sequence_parallel, split_heads
from ..checks.values import TokenRows
from ..operators.linear import linear_loss
from ..problem import HeadOptions
from ..results import LossResult
from .choices import loss_result
from .heads import NO_HEAD, linear_problem

WITHOUT = ("infinities",)
OWN = (
    "tail", "mass_terms", "log_prob_floor", "student_bias", "student_logit_scale", "student_softcap",
    "logits_dtype", "memory_budget", "kept_tokens", "sequence_parallel",
)  # fmt: skip


@with_loss_options(*WITHOUT)
def linear_topk_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    *,
    tail: str = "bucket",
    mass_terms: bool = False,
    log_prob_floor: float | None = None,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    kept_tokens: int | None = None,
    sequence_parallel: bool = False,
    **options: Unpack[LossOptions],
) -> LossResult:
    """:func:`topk_distillation_loss` of a language-model head, without its logits in memory.

    ``softcap((hidden weight^T + bias) * logit_scale)`` are the student's logits, a block at a time.
    Hidden states ``[..., d]``, a head and a teacher ``[..., K]`` go in, the loss comes out.

    Example:
        >>> import torch, distill_ops
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> log_probs, ids = torch.tensor([[0.5, 0.3], [0.9, 0.1]]).log(), torch.tensor([[2, 1], [1, 0]])
        >>> loss = distill_ops.linear_topk_distillation_loss(
        ...     hidden, weight, log_probs, ids, divergence="forward_kl"
        ... )
        >>> round(loss.item(), 4)
        0.1909

    The logits are formed as :func:`linear_distillation_loss` forms them and compared with the
    teacher's K log-probabilities a token: three matrix products where the forward makes the
    gradients, four where the backward does, one without gradients.

    Args:
        student_hidden: ``[..., d]``, float32, bfloat16, float16, or float64 (not in Triton). With
            Hugging Face labels pass ``hidden[:, :-1]``, the teacher's slots ``[:, :-1]`` and
            ``labels[:, 1:]``: no shift happens inside.
        student_weight: ``[V, d]``.
        teacher_log_probs, teacher_ids: ``[..., K]``, as in :func:`topk_distillation_loss`.
        tail, mass_terms, log_prob_floor: what becomes of the rest of the vocabulary, as there.
        teacher_rows: ``[...]``, int64 or int32: the row of the slots for each token, as there.
        student_bias, student_logit_scale, student_softcap, logits_dtype, memory_budget,
            kept_tokens, vocab_size: as in :func:`linear_distillation_loss`.
        group, vocab_offset, sequence_parallel: of a column-parallel head, as there; every rank has all of
            the teacher's slots, of all tokens, and two collectives run once a block.

    The others, the result and the errors are those of :func:`distill_ops.distillation_loss`.
    """
    arguments = given_options("linear_topk_distillation_loss", options, *WITHOUT, own=OWN)
    blocks = block_options(logits_dtype, memory_budget, kept_tokens)
    student_options = head_options("student_", student_logit_scale, student_softcap)
    split, student_weight, student_bias = split_heads(
        arguments.group, arguments.vocab_offset, arguments.vocab_size,
        student_weight=student_weight, student_bias=student_bias,
    )  # fmt: skip
    ranks = check_sequence_parallel(
        sequence_parallel, arguments.group, student_hidden=student_hidden
    )
    student = student_hidden, student_weight, student_bias
    check_head("student_", *student, least=int(split.group is None))
    rows = TokenRows("student_hidden", student_hidden, ranks)
    n_cols = student_weight.shape[0]
    if split.group is None:
        n_cols = check_vocabulary(arguments.vocab_size, n_cols)
    asked = Tail(tail, mass_terms, log_prob_floor)
    arguments, checked = check_topk(rows, teacher_log_probs, teacher_ids, asked, arguments)
    if not arguments.soft:
        teacher_log_probs = teacher_ids = None
    inputs, options, made = linear_problem(
        student, student_options, NO_HEAD, HeadOptions(1.0, None), (teacher_log_probs, teacher_ids),
        checked, n_cols, arguments, blocks._replace(token_ranks=ranks), split=split,
    )  # fmt: skip
    outputs = linear_loss("linear_topk_distillation_loss", inputs, options, made)
    return loss_result(outputs, options.loss, arguments.return_components)
