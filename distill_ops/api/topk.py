"""The loss against a teacher of K log-probabilities a token: cached, served or sampled."""

import torch
from typing_extensions import Unpack

from ..arguments import LossOptions, Tail, with_loss_options
from ..checks.logits import check_alone, check_parts
from ..checks.options import check_splittable, given_options
from ..checks.slots import check_topk
from ..checks.split import split_logits
from ..checks.values import TokenRows
from ..operators.dense import dense_loss
from ..operators.topk import topk_loss
from ..problem import DenseInputs, Options, TopKInputs
from ..results import LossResult
from .choices import choose_backend, gradient_mode, loss_result

WITHOUT = ("infinities",)
OWN = "tail", "mass_terms", "log_prob_floor"


@with_loss_options(*WITHOUT)
def topk_distillation_loss(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    *,
    tail: str = "bucket",
    mass_terms: bool = False,
    log_prob_floor: float | None = None,
    **options: Unpack[LossOptions],
) -> LossResult:
    """Distillation loss against a teacher's K most likely (or sampled) tokens, in nats.

    ``u * divergence(q, p) + w * cross_entropy(label)``, of q and p over the K and the rest.
    Logits ``[..., V]``, log-probabilities and ids ``[..., K]`` go in, the loss comes out.

    Example:
        >>> import torch, distill_ops
        >>> student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], requires_grad=True)
        >>> log_probs, ids = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[4, 1]])
        >>> loss = distill_ops.topk_distillation_loss(student, log_probs, ids, divergence="forward_kl")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
        (0.6338, [0.0923, 0.263, 0.0125, 0.056, -0.4238])

    q is the student's softmax over the whole vocabulary, p is ``exp(teacher_log_probs)``, and the rest
    of the vocabulary, by ``tail``, is

    - "bucket": one more outcome, ``p_rest = max(1 - sum(p), 2**-24)`` against ``q_rest``, the sum of
      q over the columns outside the K; none where the K cover the vocabulary. A divergence of K + 1
      outcomes, finite and 0 at equality;
    - "renormalize": p = 0 there, and p over the K rescaled to sum 1;
    - "ignore": p = 0 there, and p over the K as given;
    - "restrict": no outcome: both models are normalised over the K alone. A divergence of K outcomes;
    - "drop": left out of the sum, p over the K as given. No divergence: it may be negative, and least
      where the models differ; ``mass_terms`` mends that for the KLs.

    The gradient is dense. The student's row is read once, and once more (from cache) for the
    gradient; no probability tensor exists, nor a dense teacher. With "restrict" the student is read at
    the K alone, and so it is with "renormalize" and "ignore" by divergences that are infinite at p = 0
    (reverse and symmetric KL), for they restrict it too. Results are the same bits run after run.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16, or float64 (not in Triton). Rows
            may be strided: a view such as ``logits[:, :-1]`` is not copied. With Hugging Face labels
            pass that, the teacher's slots ``[:, :-1]`` and ``labels[:, 1:]``: no shift happens inside.
        teacher_log_probs: ``[..., K]``, K at most 1024, any of these dtypes: natural logarithms, at
            the loss's temperature already; they are taken as they are. -inf is a token that the
            teacher excludes. No gradient flows to them.
        teacher_ids: ``[..., K]``, int64 or int32, unique within a token, -1 in unused slots. A slot
            of -inf whose id another slot has too, as servers pad, is unused. On a GPU another
            repeated id is refused in debug mode only (:func:`distill_ops.set_debug`), and an id
            outside the vocabulary makes the token's loss NaN.
        tail: the rest of the vocabulary, as above; docs/tails.md compares them.
        mass_terms: with ``tail="drop"`` and a KL, add what makes it the generalised KL, which is
            never negative: ``sum(q) - sum(p)`` over the K to the forward KL, ``sum(p) - sum(q)`` to
            the reverse KL, and to the symmetric KL both by their weights.
        log_prob_floor: a negative number, in nats: what is below it of either model's
            log-probabilities counts as the floor, where the student's slope is 0. Nothing is infinite
            then, and nothing dropped. With "bucket", "restrict" and "drop".
        gradient: when it is made, as in :func:`distill_ops.distillation_loss`; "backward" re-reads
            the student's logits and keeps 20 bytes a token.
        teacher_rows: ``[...]``, int64 or int32: the row of the teacher's slots, counted over their leading
            dimensions, for each token, as in :func:`distill_ops.distillation_loss`.
        vocab_size: the vocabulary is the student's first ``vocab_size`` columns; the others get
            gradient 0.
        group: the ranks that split the vocabulary, as in :func:`distill_ops.distillation_loss`: each has its
            columns of the student's logits and all of the teacher's slots, the same on every rank. Ids,
            labels and ``vocab_size`` count over all columns; an id that no rank has is an error, on a GPU
            NaN. Two collectives, of at most 13 numbers a token in all; none in the backward.
        vocab_offset: the columns before this rank's. Without it the ranks exchange their widths, one more
            collective; on a GPU ``vocab_size`` then waits for it.

    The other arguments are those of :func:`distill_ops.distillation_loss`. Both teacher arguments may
    be None where the divergence has no weight.

    Result and errors are those of :func:`distill_ops.distillation_loss`.
    """
    arguments = given_options("topk_distillation_loss", options, *WITHOUT, own=OWN)
    split, student_logits, _ = split_logits(
        arguments.group, arguments.vocab_offset, arguments.vocab_size, student_logits, None
    )
    if split.group is not None:
        check_splittable(arguments.infinities, arguments.token_outputs)
        n_cols = check_parts(student_logits, None)
    else:
        n_cols = check_alone("student_logits", student_logits, arguments.vocab_size)
    rows = TokenRows("student_logits", student_logits)
    asked = Tail(tail, mass_terms, log_prob_floor)
    arguments, checked = check_topk(rows, teacher_log_probs, teacher_ids, asked, arguments)
    made = gradient_mode(arguments.gradient, arguments.reduction, student_logits)
    if not arguments.soft:
        teacher_log_probs = None
        operator, inputs = dense_loss, DenseInputs(student_logits, None, *arguments.tensors)
    else:
        operator = topk_loss
        inputs = TopKInputs(student_logits, teacher_log_probs, teacher_ids, *arguments.tensors)
    backend = choose_backend(arguments.backend, "student_logits", student_logits, teacher_log_probs)
    options = Options.of(arguments, n_cols, backend, checked, split)
    outputs = operator("topk_distillation_loss", inputs, options, made)
    return loss_result(outputs, options, arguments.return_components)
