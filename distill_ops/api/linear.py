"""The linear loss: hidden states and language-model heads instead of logits."""

import torch
from typing_extensions import Unpack

from ..arguments import NO_TAIL, LossOptions, with_loss_options
from ..checks.options import block_options, given_options, head_options
from ..checks.split_heads import check_sequence_parallel, split_heads
from ..operators.linear import linear_loss
from ..results import LossResult
from ..scalars import flag
from .choices import LossModule, loss_result
from .heads import checked_heads, linear_problem

WITHOUT = ("infinities",)
OWN = (
    "student_bias", "student_logit_scale", "student_softcap", "teacher_bias", "teacher_logit_scale",
    "teacher_softcap", "teacher_logits", "logits_dtype", "memory_budget", "kept_tokens",
    "sequence_parallel",
)  # fmt: skip


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
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    kept_tokens: int | None = None,
    sequence_parallel: bool = False,
    **options: Unpack[LossOptions],
) -> LossResult:
    """:func:`distillation_loss` of two language-model heads, without their logits in memory.

    ``softcap((hidden weight^T + bias) * logit_scale)`` are each model's logits, a block at a time.
    Hidden states ``[..., d]`` and heads ``[V, d]`` go in, the loss comes out; the student's get gradients.

    Example:
        >>> import torch, distill_ops
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> loss = distill_ops.linear_distillation_loss(
        ...     hidden, weight, torch.eye(2), weight.flip(0), divergence="forward_kl"
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in hidden.grad[0].tolist()]
        (0.066, [0.0498, -0.0498])

    With ``softcap(x) = c tanh(x / c)``. The logits of a block of tokens are turned into the loss and
    the gradients of the student's hidden states, weight and bias: four matrix products in all where
    the forward makes the gradients, six where the backward does, two without gradients. No
    ``[tokens, vocab]`` tensor is made. Inputs are not changed, and results are the same bits run after
    run.

    Args:
        student_hidden, teacher_hidden: ``[..., d]``, float32, bfloat16, float16, or float64 (not in
            Triton); the two dimensions d may differ. No gradient flows to the teacher: its hidden
            states must not require one while gradients are enabled.
        student_weight, teacher_weight: ``[V, d]``, of the heads; the teacher's is detached. Both
            ``teacher_hidden`` and ``teacher_weight`` may be None where the divergence has no weight.
        student_bias, teacher_bias: ``[V]``; the teacher's is detached.
        loss_mask, labels: ``[...]``, aligned with the hidden states: no shift happens inside. With
            Hugging Face labels pass ``hidden[:, :-1]`` of both models and ``labels[:, 1:]``.
        student_logit_scale, teacher_logit_scale: positive factors of the logits.
        student_softcap, teacher_softcap: c above, positive; None for no cap.
        teacher_logits: ``[..., V]``, of a teacher whose logits are there already (a server's, or of
            another call), in place of ``teacher_hidden`` and ``teacher_weight``, which are None then.
            They are read where they are, views too, and never copied: one product less.
        teacher_rows: ``[...]``, int64 or int32: the teacher's row, of hidden states or logits, counted
            over their leading dimensions, that each token is compared with. A CPU forms the logits of
            each row that is used once. A GPU forms those of all rows once, where there are no more of
            them than tokens and they take at most half of ``memory_budget``; else one row a token.
        logits_dtype: in which logits are kept: float32, or bfloat16 or float16 for less memory
            traffic and a less exact gradient. float64 wherever an input is.
        memory_budget: bytes of logits, their gradient and what the products of a block take, by
            default 1 GiB on a GPU and 64 MiB on a CPU. On top come the gradients themselves and,
            where a half-precision weight's gradient takes several blocks, its float32 sum (float64
            of float64 hidden states); one block takes all tokens where that needs no more than both.
        kept_tokens: a bound on the number of tokens of nonzero weight, so that a GPU computes no
            others (it cannot choose them by number without waiting for their count). Were there
            more, the loss is NaN. A CPU never computes others.
        vocab_size: use the first ``vocab_size`` rows of both heads; the others get gradient 0.
        gradient: when it is made. "forward": by the forward, which keeps the gradients of hidden
            states and weight for the backward; one backward only. "backward": by the backward,
            which forms the logits again. "auto": "forward", but "backward" for
            ``reduction="none"`` and where products or tensors of the student are float16.
        group: the ranks that split the vocabulary (a torch.distributed process group, or a DeviceMesh of
            one dimension): a column-parallel head, of which each rank passes its rows of ``student_weight``
            and ``student_bias``, in rank order, and the hidden states of all tokens. It gets the loss of
            the whole vocabulary, the gradient of its rows, and that of the hidden states, summed over the
            ranks. The teacher's head (or logits) is split alike, or whole on every rank. Weights may be
            DTensors, ``Shard(0)`` over this group. Labels, masks and ``vocab_size`` are of all; blocks
            are of the same tokens on all ranks, with one or two collectives each (docs/vocab-parallel.md).
        vocab_offset: the columns before this rank's, which is checked: the ranks exchange their widths
            once a call all the same (but for DTensors), for which the host waits.
        sequence_parallel: the hidden states come sharded over their first dimension too, in rank order and
            equally many on each of the group's ranks, ``[n / ranks, ..., d]`` of both models: they are
            gathered, and their gradient is that of the rank's own. Labels, masks and results are of all.

        The others are those of :func:`distillation_loss`. A token of weight 0 is not read: whatever
        its hidden states hold, its gradient is 0. Infinite logits, which a bias may make, are
        dropped.

    Matrix products are float32 on a CPU (float64 for float64 inputs) and in the promoted dtype of
    hidden states and weight on a GPU, or autocast's. Gradients have the dtype of their tensors. The
    gradient of the logits is rounded to the products' dtype.

    Result and errors are those of :func:`distillation_loss`; float64 where a tensor is.
    """
    arguments = given_options("linear_distillation_loss", options, *WITHOUT, own=OWN)
    blocks = block_options(logits_dtype, memory_budget, kept_tokens)
    split, student_weight, student_bias, teacher_weight, teacher_bias, teacher_logits = split_heads(
        arguments.group, arguments.vocab_offset, arguments.vocab_size,
        student_weight=student_weight, student_bias=student_bias, teacher_weight=teacher_weight,
        teacher_bias=teacher_bias, teacher_logits=teacher_logits,
    )  # fmt: skip
    ranks = check_sequence_parallel(
        sequence_parallel,
        arguments.group,
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
    )
    student, student_options, teacher, teacher_options, n_cols, arguments = checked_heads(
        (student_hidden, student_weight, student_bias), (student_logit_scale, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias), (teacher_logit_scale, teacher_softcap),
        arguments, teacher_logits, split, ranks,
    )  # fmt: skip
    inputs, options, made = linear_problem(
        student, student_options, teacher, teacher_options, (None, None), NO_TAIL, n_cols,
        arguments, blocks._replace(token_ranks=ranks), teacher_logits if arguments.soft else None,
        split=split,
    )  # fmt: skip
    outputs = linear_loss("linear_distillation_loss", inputs, options, made)
    return loss_result(outputs, options.loss, arguments.return_components)


class LinearDistillationLoss(LossModule):
    """:func:`linear_distillation_loss` as a module that keeps the options.

    Args:
        **options: the keyword arguments of :func:`linear_distillation_loss` that stay the same from
            step to step.

    Example:
        >>> import torch, distill_ops
        >>> loss = distill_ops.LinearDistillationLoss(divergence="reverse_kl", temperature=2.0)
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(5, 4)
        >>> loss(hidden, weight, hidden, weight).item()
        0.0
    """

    own = OWN
    without = WITHOUT

    def __init__(self, **options):
        super().__init__(options)

    @staticmethod
    def check(
        *, student_bias=None, student_logit_scale=1.0, student_softcap=None, teacher_bias=None,
        teacher_logit_scale=1.0, teacher_softcap=None, teacher_logits=None, sequence_parallel=False,
        **blocks,
    ) -> dict:  # fmt: skip
        student = head_options("student_", student_logit_scale, student_softcap)
        teacher = head_options("teacher_", teacher_logit_scale, teacher_softcap)
        heads = {f"student_{name}": value for name, value in student._asdict().items()}
        heads |= {f"teacher_{name}": value for name, value in teacher._asdict().items()}
        heads["sequence_parallel"] = flag("sequence_parallel", sequence_parallel)
        return heads | block_options(**blocks)._asdict()

    def forward(
        self,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_weight: torch.Tensor | None = None,
        **arguments,
    ) -> LossResult:
        """``arguments`` are those that change from step to step: ``loss_mask``, ``labels``..."""
        return linear_distillation_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight,
            **{**self.options, **arguments},
        )  # fmt: skip
