"""K tokens a row: whose logits are the largest, and their log-probabilities."""

import torch

from ..checks.logits import check_alone
from ..checks.slots import check_gather
from ..checks.values import TokenRows, check_temperature, of_teacher
from ..operators.gather import gather_log_probs as gather_operator
from ..operators.gather import top_ids
from ..scalars import integer
from ..support import GatherInputs, GatherOptions, TopInputs, TopOptions
from .choices import choose_backend


def student_topk(logits: torch.Tensor, k: int, *, vocab_size: int | None = None) -> torch.Tensor:
    """The ids of each row's ``k`` largest logits: a student's own most likely tokens.

    ``torch.topk`` over the first ``vocab_size`` columns, which no temperature changes.
    Logits ``[..., V]`` go in; ids ``[..., k]`` come out, detached.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, float("-inf")]])
        >>> distill_ops.student_topk(student, 2), distill_ops.student_topk(student, 5)
        (tensor([[1, 0]]), tensor([[ 1,  0,  3,  2, -1]]))

    With :func:`gather_log_probs` of the teacher's logits at these ids it makes the teacher of
    :func:`topk_distillation_loss`; :func:`support_distillation_loss` is the three in one call. It runs
    some rows at a time and keeps nothing but the ids.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64; rows may be strided. They may
            require grad: none flows.
        k: ids a row, in [1, V] (a loss takes at most 1024). Of equal logits any may be chosen.
        vocab_size: use the first columns (a head padded beyond its vocabulary).

    Returns:
        int64 ``[..., k]``, in descending order of the logits; -1, an unused slot, where a logit is
        -inf. In a row that holds NaN or +inf these come first; its loss is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    n_cols = check_alone("logits", logits, vocab_size)
    k = integer("k", k, 1, n_cols)
    backend = choose_backend("auto", "logits", logits)
    (ids,) = top_ids("student_topk", TopInputs(logits.detach()), TopOptions(backend, k, n_cols))
    return ids


def gather_log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    loss_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A teacher's log-probabilities of K given tokens a row, in nats, without a gradient.

    ``log_softmax(logits / T)`` over the whole vocabulary, at the ids.
    Logits ``[..., V]`` and ids ``[..., K]`` go in, ``[..., K]`` comes out.

    Example:
        >>> import torch, distill_ops
        >>> teacher = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]])
        >>> log_probs = distill_ops.gather_log_probs(teacher, torch.tensor([[4, 1, -1]]))
        >>> [round(x, 4) for x in log_probs[0].tolist()]
        [-0.7164, -1.2164, -inf]

    Each row is read once, by one launch on a GPU: the normaliser and the gather are fused, and no
    tensor of the vocabulary's size exists. With :func:`student_topk` for the ids it makes a teacher of
    :func:`topk_distillation_loss` on the student's support.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in Triton); rows may be
            strided. They must not require grad while gradients are enabled.
        ids: ``[..., K]``, int64 or int32, K at most 1024; -1 in unused slots. On a GPU an id
            outside the vocabulary gives NaN, and is refused in debug mode only
            (:func:`distill_ops.set_debug`).
        temperature: T above, positive: the one of the loss.
        vocab_size: use the first columns.
        loss_mask: ``[...]``, bool, int or float: rows of weight 0 are not read.
        backend: "auto", "triton" or "torch", as in :func:`distill_ops.distillation_loss`.

    Returns:
        ``[..., K]``, float32 (float64 for float64 logits), detached: -inf in unused slots and in rows
        of weight 0. A row of NaN, of +inf, or all -inf gives NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    n_cols = check_alone("logits", logits, vocab_size)
    of_teacher("logits", logits)
    check_gather(TokenRows("logits", logits), ids, loss_mask)
    options = GatherOptions(
        choose_backend(backend, "logits", logits), check_temperature(temperature), n_cols
    )
    inputs = GatherInputs(logits.detach(), ids, loss_mask)
    (log_probs,) = gather_operator("gather_log_probs", inputs, options)
    return log_probs
