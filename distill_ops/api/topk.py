"""The loss against a teacher of K log-probabilities a token: cached, served or sampled."""

import torch

from ..checks import Counted, check_topk
from ..divergences import Divergence, SoftCrossEntropy
from ..operators.dense import dense_loss
from ..operators.topk import topk_loss
from ..problem import DenseInputs, LossComponents, Options, TopKInputs
from .choices import as_tensor, choose_backend, gradient_mode, loss_result


def topk_distillation_loss(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    *,
    tail: str = "bucket",
    divergence: Divergence | str = SoftCrossEntropy(),
    loss_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    vocab_size: int | None = None,
    gradient: str = "auto",
    return_components: bool = False,
    backend: str = "auto",
) -> torch.Tensor | LossComponents:
    """Distillation loss of student logits against a teacher's K most likely (or sampled) tokens,
    in nats.

    With ``q = softmax(student_logits / temperature)`` over the whole vocabulary and
    ``p = exp(teacher_log_probs)``, per token::

        loss = (1 - w) * divergence(q, p) + w * cross_entropy(student_logits, label)

    times the token's weight, and the rest of the vocabulary, by ``tail``, is

    - "bucket": one more outcome, ``p_rest = max(1 - sum(p), 2**-24)`` against ``q_rest``, the sum of
      q over the columns outside the K; none where the K cover the vocabulary. A divergence of K + 1
      outcomes, finite and 0 at equality;
    - "renormalize": p = 0 there, and p over the K rescaled to sum 1;
    - "ignore": p = 0 there, and p over the K as given.

    The gradient is dense. The student's row is read once, and once more (from cache) for the
    gradient; no probability tensor exists, nor a dense teacher. With the last two tails divergences
    that are infinite at p = 0 (reverse and symmetric KL) restrict the student to the K, and read
    nothing else. Results are the same bits run after run.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in Triton). Rows
            may be strided: a view such as ``logits[:, :-1]`` is not copied. With Hugging Face labels
            pass that, the teacher's slots ``[:, :-1]`` and ``labels[:, 1:]``: no shift happens inside.
        teacher_log_probs: ``[..., K]``, K at most 1024, any of these dtypes: natural logarithms, at
            the loss's temperature already; they are taken as they are. -inf is a token that the
            teacher excludes. No gradient flows to them.
        teacher_ids: ``[..., K]``, int64 or int32, unique within a token, -1 in unused slots. On a
            GPU a repeated id is refused in debug mode only (:func:`distill_ops.set_debug`), and an
            id outside the vocabulary makes the token's loss NaN.
        tail: the rest of the vocabulary, as above.
        gradient: when it is made, as in :func:`distill_ops.distillation_loss`; "backward" re-reads
            the student's logits and keeps 20 bytes a token.
        vocab_size: the vocabulary is the student's first ``vocab_size`` columns; the others get
            gradient 0.

    The other arguments are those of :func:`distill_ops.distillation_loss`. Both teacher arguments may
    be None where ``hard_label_weight`` is 1.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or ``[...]`` with "none"; or
        ``LossComponents(loss, divergence, hard_label)``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative, or a second backward of a gradient
            made in the forward.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], requires_grad=True)
        >>> log_probs, ids = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[4, 1]])
        >>> loss = distill_ops.topk_distillation_loss(student, log_probs, ids, divergence="forward_kl")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
        (0.6338, [0.0923, 0.263, 0.0125, 0.056, -0.4238])
    """
    divergence, n_cols = check_topk(
        student_logits, teacher_log_probs, teacher_ids, tail, divergence,
        Counted(loss_mask, labels, ignore_index), hard_label_weight, temperature, reduction,
        normalizer, vocab_size,
    )  # fmt: skip
    made = gradient_mode(gradient, reduction, student_logits)
    hard_alone = hard_label_weight == 1  # the divergence has no share
    options = Options.of(
        divergence, n_cols,
        choose_backend(
            backend, "student_logits", student_logits, None if hard_alone else teacher_log_probs
        ),
        reduction=reduction, tail=None if hard_alone else tail, temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        hard_label_weight=hard_label_weight, normalizer=normalizer, ignore_index=ignore_index,
        return_components=return_components,
    )  # fmt: skip
    tokens = loss_mask, labels, as_tensor(normalizer), divergence.tensors
    if hard_alone:
        operator, inputs = dense_loss, DenseInputs(student_logits, None, *tokens)
    else:
        operator = topk_loss
        inputs = TopKInputs(student_logits, teacher_log_probs, teacher_ids, *tokens)
    outputs = operator("topk_distillation_loss", inputs, options, made)
    return loss_result(outputs, options, return_components)
