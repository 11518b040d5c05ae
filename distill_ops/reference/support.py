"""K tokens of a row: their log-probabilities, and the loss on the support that they are."""

import math

import torch
from typing_extensions import Unpack

from ..arguments import Counted, LossOptions, Tail, with_loss_options
from ..checks.contents import of_gather, of_loss
from ..checks.logits import check_alone
from ..checks.options import given_options
from ..checks.slots import check_gather, check_support, check_tail
from ..checks.tokens import check_dense
from ..checks.values import TokenRows, check_temperature, of_teacher
from ..problem import DenseInputs, Options, working_dtype
from ..results import LossResult
from ..support import GatherInputs, GatherOptions
from .dense import token_weights
from .topk import OWN as OF_TOPK
from .topk import topk_distillation_loss

WITHOUT = ("infinities", "teacher_rows", "gradient", "backend", "group", "vocab_offset")
OWN = ("k", "support", *OF_TOPK)


def gather_log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    loss_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`distill_ops.gather_log_probs` in eager PyTorch.

    ``log_softmax(logits / T)`` over the whole vocabulary, at the ids; in nats, without a gradient.
    Logits ``[..., V]`` and ids ``[..., K]`` go in, ``[..., K]`` comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> found = reference.gather_log_probs(teacher, torch.tensor([[4, 1, -1]]))
        >>> [round(x, 4) for x in found[0].tolist()]
        [-0.7164, -1.2164, -inf]

    Arguments, edges, result and errors are those of :func:`distill_ops.gather_log_probs`, without
    ``backend``.
    """
    n_cols = check_alone("logits", logits, vocab_size)
    of_teacher("logits", logits)
    check_gather(TokenRows("logits", logits), ids, loss_mask)
    temperature = check_temperature(temperature)
    of_gather(GatherInputs(logits, ids, loss_mask), GatherOptions("torch", temperature, n_cols))
    dtype = working_dtype(logits)
    unread = token_weights(logits, dtype, Counted(loss_mask)) == 0
    unused = (ids < 0) | unread[..., None]
    log_p = torch.log_softmax(logits.detach()[..., :n_cols].to(dtype) / temperature, -1)
    found = log_p.gather(-1, ids.long().masked_fill(unused, 0))
    return found.masked_fill(unused, -math.inf)


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
    """:func:`distill_ops.support_distillation_loss` in eager PyTorch, differentiable by autograd.

    ``soft_weight * divergence(q, p) + hard_label_weight * cross_entropy(label)``, over K and the rest.
    Logits ``[..., V]`` go in, the loss comes out.

    Example:
        >>> import torch
        >>> from distill_ops import reference
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]], dtype=torch.float64)
        >>> loss = reference.support_distillation_loss(student, teacher, k=2, divergence="reverse_kl")
        >>> round(loss.item(), 6)
        0.275909

    Arguments, edges, result and errors are those of :func:`distill_ops.support_distillation_loss`,
    without ``gradient`` and ``backend``.
    """
    arguments = given_options("reference.support_distillation_loss", options, *WITHOUT, own=OWN)
    arguments, n_cols = check_dense(student_logits, teacher_logits, arguments)
    k = check_support(support, k, n_cols, arguments)
    of_tail = Tail(tail, mass_terms, log_prob_floor)
    check_tail(of_tail, arguments.divergence)
    names = dict(zip(OF_TOPK, of_tail, strict=True))
    inputs = DenseInputs(student_logits, teacher_logits, *arguments.tensors)
    of_loss(inputs, Options.of(arguments, n_cols, "torch"))
    if not arguments.soft:
        return topk_distillation_loss(student_logits, None, None, **names, **options)
    source = student_logits if support == "student" else teacher_logits
    values, ids = source.detach()[..., :n_cols].topk(k)
    ids = ids.masked_fill(values == -math.inf, -1)
    dtype = working_dtype(student_logits, teacher_logits)
    counts = token_weights(student_logits, dtype, arguments.counted) != 0
    log_probs = gather_log_probs(
        teacher_logits.detach().to(dtype), ids, temperature=arguments.temperature,
        vocab_size=n_cols, loss_mask=counts,
    )  # fmt: skip
    return topk_distillation_loss(
        student_logits, log_probs, ids, **names, **{**options, "vocab_size": n_cols}
    )
