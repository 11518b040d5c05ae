"""The dense loss: student and teacher logits ``[..., vocab]``."""

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, with_loss_options
from ..checks.logits import check_inplace
from ..checks.options import given_options
from ..checks.split import is_distributed, split_logits
from ..checks.tokens import check_dense
from ..operators.dense import dense_loss
from ..problem import NO_GRADIENT, DenseInputs, Options
from ..results import LossResult
from ..scalars import flag
from .choices import LossModule, choose_backend, gradient_mode, loss_result

OWN = ("inplace",)


@with_loss_options()
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    *,
    inplace: bool = False,
    **options: Unpack[LossOptions],
) -> LossResult:
    """Distillation loss of student logits against teacher logits, in nats.

    ``u * divergence(q, p) + w * cross_entropy(label)``, q and p their softmax at T, u being ``1 - w``.
    Logits ``[..., V]`` go in, their mean over the tokens comes out; the student's get a gradient.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> loss = distill_ops.distillation_loss(student, teacher, divergence="forward_kl")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
        (0.6584, [0.0981, 0.2667, -0.0381, 0.0855, -0.4123])

        A model's logits at one token predict the next, whose label Hugging Face keeps at its own
        place (-100: a prompt's):

        >>> logits, teacher_logits = torch.randn(2, 1, 4, 5)
        >>> labels = torch.tensor([[-100, -100, 3, 1]])
        >>> loss = distill_ops.distillation_loss(
        ...     logits[:, :-1], teacher_logits[:, :-1], labels=labels[:, 1:], hard_label_weight=0.5
        ... )

    A token's loss is multiplied by its weight, ``loss_mask * (labels != ignore_index)``. The default
    divergence, ``-sum(p log q)``, is MiniLLM's (arXiv:2306.08543). The vocabulary is streamed in tiles;
    no probability tensor exists. Inputs are not changed; results are the same bits run after run.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in Triton). Rows
            may be strided: a view such as ``logits[:, :-1]`` is not copied.
        teacher_logits: ``[..., V]``, its dtype may differ; no gradient flows to it, and it must not
            require one while gradients are enabled. None where u below is 0.
        divergence: a :class:`Divergence` or its name.
        loss_mask: ``[...]``, bool, int or float: the tokens' weights, aligned with the logits. A
            token of weight 0 is not read: whatever it holds, its gradient is 0.
        labels: ``[...]``, int64 or int32, aligned with the logits: the token that each predicts. No
            shift happens inside; with Hugging Face labels pass ``logits[:, :-1]`` of both models and
            ``labels[:, 1:]`` (a ``loss_mask`` of the same tokens: ``[:, 1:]``). Tokens whose label is
            ``ignore_index`` have weight 0. Where ``hard_label_weight`` is 0 they do no more than that
            (but for "log_prob" among the token outputs), and may lie outside the vocabulary.
        hard_label_weight: w above, in [0, 1] (any number beside ``soft_weight``); but for 0 it needs
            ``labels``.
        soft_weight: u above, where it is not ``1 - w``: then both are any finite numbers, and their
            terms two of a sum (Liger's ``weight_soft_loss``, Hinton's mixtures). A term of weight 0
            is not computed.
        temperature: T above, positive. The hard-label term is always at 1.
        scale_by_temperature_squared: multiply the divergence by T**2 (arXiv:1503.02531), so that
            gradients stay comparable as T grows.
        reduction: "mean" (over the sum of weights), "sum", or "none" (per token, ``[...]``).
        normalizer: number or 0-d tensor that replaces the sum of weights in "mean", such as
            ``num_items_in_batch`` under gradient accumulation. Under ``torch.compile`` give a tensor:
            each new number compiles again (as each new ``temperature`` or ``hard_label_weight``
            does, which are numbers only; a divergence's parameters may be tensors).
        infinities: "drop" leaves out the terms that are infinite where a logit is -inf (for
            divergences that are infinite where the teacher's is, the student is restricted to the
            teacher's support); "propagate" keeps them: loss +inf.
        vocab_size: use the first ``vocab_size`` columns of both, for heads padded to different
            widths; the others get gradient 0.
        gradient: when it is made. "forward": by the forward, one read of the logits less; one
            backward only. "backward": by the backward, which re-reads both logits; no
            gradient-sized buffer in between. "auto": "forward", but "backward" for
            ``reduction="none"`` and for float16.
        inplace: the gradient overwrites the student's logits, so that no memory of their size is
            taken: when it is made, in the forward or the backward. Autograd notices where another
            operation still needs the logits. Without a gradient (grad mode off, or logits that do
            not require one) nothing is written.
        return_components: return ``LossComponents(loss, divergence, hard_label)``, the last two
            detached and reduced alike.
        token_outputs: names of :class:`TokenOutputs`: return a pair, the second being these numbers of
            each token, from the sweeps that run anyway; "acceptance" takes one more where the forward
            makes no gradient.
        token_ids: ``[...]``, int64 or int32: of what token "log_prob" among them is; by default the labels.
        backend: "triton", "torch" (CPU path), or "auto": Triton for tensors on a GPU.
        teacher_rows: ``[...]``, int64 or int32: the teacher's row that each token is compared with, so
            that several steps of a draft model, or several samples, share a row that nobody copies.
            The teacher's leading dimensions may then be any, and its rows are counted over them. On a
            GPU an index outside is refused in debug mode only (:func:`distill_ops.set_debug`), else the
            token's loss is NaN; that of a token of weight 0 is not looked at.
        group: the ranks that split the vocabulary (a torch.distributed process group, or a DeviceMesh of
            one dimension): each calls with its columns of both logits, in rank order, and with the same
            other arguments, and gets the loss of all columns and the gradient of its own. Labels and
            ``vocab_size`` count over all columns; a whole teacher is sliced. DTensors sharded on the last
            dimension need no group. ``infinities`` must be "drop", ``token_outputs`` empty
            (docs/vocab-parallel.md). None: the logits are whole; there is no default group.
        vocab_offset: the columns before this rank's. Without it the ranks exchange their widths, one more
            collective; on a GPU ``vocab_size`` and a whole teacher then wait for it.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-d, or ``[...]`` with "none". Without a
        token of nonzero weight it is 0, with a graph. With ``token_outputs``, a pair of it and them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative, or a second backward of a gradient
            made in the forward or in place.
    """
    arguments = given_options("distillation_loss", options, own=OWN)
    if flag("inplace", inplace) and is_distributed(student_logits):
        raise ValueError(
            "inplace=True needs student_logits that are no DTensor, whose parts autograd would not see "
            "overwritten: pass student_logits.to_local() with group=, or inplace=False"
        )
    split, student_logits, teacher_logits = split_logits(
        arguments.group,
        arguments.vocab_offset,
        arguments.vocab_size,
        student_logits,
        teacher_logits,
    )
    arguments, n_cols = check_dense(student_logits, teacher_logits, arguments, split)
    made = gradient_mode(arguments.gradient, arguments.reduction, student_logits)
    backend = choose_backend(arguments.backend, "student_logits", student_logits, teacher_logits)
    options = Options.of(arguments, n_cols, backend, split=split)
    inplace = inplace and made != NO_GRADIENT
    if inplace:
        check_inplace(student_logits, teacher_logits)
    inputs = DenseInputs(student_logits, teacher_logits, *arguments.tensors)
    outputs = dense_loss("distillation_loss", inputs, options, made, inplace=inplace)
    return loss_result(outputs, options, arguments.return_components)


class DistillationLoss(LossModule):
    """:func:`distillation_loss` as a module that keeps the options.

    Args:
        **options: the keyword arguments of :func:`distillation_loss` that stay the same from step
            to step.

    Example:
        >>> import torch, distill_ops
        >>> loss = distill_ops.DistillationLoss(divergence="reverse_kl", temperature=2.0)
        >>> loss(torch.zeros(3, 5), torch.zeros(3, 5)).item()
        0.0
    """

    own = OWN

    def __init__(self, **options):
        super().__init__(options)

    @staticmethod
    def check(inplace: bool = False) -> dict:
        return {"inplace": flag("inplace", inplace)}

    def forward(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, **arguments
    ) -> LossResult:
        """``arguments`` are those that change from step to step: ``loss_mask``, ``labels``..."""
        return distillation_loss(student_logits, teacher_logits, **{**self.options, **arguments})
