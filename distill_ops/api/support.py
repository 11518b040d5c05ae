"""The loss on a support: the K tokens that the student, or the teacher, finds most likely."""

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, Tail, with_loss_options
from ..checks.options import given_options
from ..checks.slots import check_support, check_tail
from ..checks.tokens import check_dense
from ..operators.dense import dense_loss
from ..operators.gather import support_slots
from ..operators.topk import topk_loss
from ..problem import DenseInputs, Options, TopKInputs
from ..results import LossResult
from ..support import SupportOptions
from .choices import choose_backend, gradient_mode, loss_result
from .topk import OWN as OF_TOPK

WITHOUT = ("infinities", "teacher_rows", "group", "vocab_offset")
OWN = ("k", "support", *OF_TOPK)


@with_loss_options(*WITHOUT)
def support_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    *,
    k: int,
    support: str = "student",
    tail: str = "bucket",
    mass_terms: bool = False,
    log_prob_floor: float | None = None,
    **options: Unpack[LossOptions],
) -> LossResult:
    """Distillation loss on each row's K most likely tokens, the student's own by default, in nats.

    ``soft_weight * divergence(q, p) + hard_label_weight * cross_entropy(label)``, over K and the rest.
    Logits ``[..., V]`` go in, the loss comes out; the student's get a gradient.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> loss = distill_ops.support_distillation_loss(student, teacher, k=2, divergence="reverse_kl")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
        (0.2759, [0.0758, 0.2061, -0.0344, -0.1541, -0.0935])

    Three steps: the ids of the ``k`` largest logits of the ``support`` model
    (:func:`student_topk`); the teacher's log-probabilities there, of its whole row and at the loss's
    temperature (:func:`gather_log_probs`); and :func:`topk_distillation_loss` against them. The first
    two make no gradient: no derivative is taken through the choice. On-policy distillation uses the
    student's support: its own rows are what it samples from (docs/support.md).

    Args:
        student_logits, teacher_logits: ``[..., V]``, as in :func:`distill_ops.distillation_loss`; the
            teacher's may be None where the divergence has no weight.
        k: tokens a row, in [1, V] and at most 1024. Of equally likely tokens any may be chosen.
        support: whose largest logits choose them, "student" or "teacher". Columns of logit -inf are
            not chosen.
        tail, mass_terms, log_prob_floor: what becomes of the rest of the vocabulary, as in
            :func:`topk_distillation_loss`.
        gradient: when it is made, as in :func:`distill_ops.distillation_loss`; "backward" re-reads
            the student's logits and keeps 20 + 12 K bytes a token.
        vocab_size: use the first ``vocab_size`` columns of both; the others get gradient 0.

    The other arguments are those of :func:`distill_ops.distillation_loss`; of the ``token_outputs``
    "teacher_mass" is the teacher's probability of the K, and those of its whole row cannot be had
    ("teacher_argmax" neither, but with ``support="teacher"``). Whatever a token of weight 0
    holds, its gradient is 0.

    Result and errors are those of :func:`distill_ops.distillation_loss`.
    """
    name = "support_distillation_loss"
    arguments = given_options(name, options, *WITHOUT, own=OWN)
    arguments, n_cols = check_dense(student_logits, teacher_logits, arguments)
    k = check_support(support, k, n_cols, arguments)
    checked = check_tail(Tail(tail, mass_terms, log_prob_floor), arguments.divergence)
    made = gradient_mode(arguments.gradient, arguments.reduction, student_logits)
    backend = choose_backend(arguments.backend, "student_logits", student_logits, teacher_logits)
    tensors = arguments.tensors
    if not arguments.soft:
        options = Options.of(arguments, n_cols, backend)
        outputs = dense_loss(name, DenseInputs(student_logits, None, *tensors), options, made)
        return loss_result(outputs, options, arguments.return_components)
    options = Options.of(arguments, n_cols, backend, checked)
    pair = (x.detach() for x in (student_logits, teacher_logits))
    slots = support_slots(name, DenseInputs(*pair, *tensors), SupportOptions(options, support, k))
    outputs = topk_loss(name, TopKInputs(student_logits, *slots, *tensors), options, made)
    return loss_result(outputs, options, arguments.return_components)
