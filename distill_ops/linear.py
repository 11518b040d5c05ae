"""The linear loss: hidden states and language-model heads instead of logits."""

import torch

from .checks import check_head, check_linear, check_linear_options, check_options
from .differentiation import refuse_transforms
from .divergences import Divergence, SoftCrossEntropy
from .heads import Wanted
from .linear_ops import LinearOptions, autocasts, linear_loss_op
from .losses import as_tensor, gradient_mode, use_triton, with_components
from .ops import NO_GRADIENT
from .paths import Options
from .reference import LossComponents

NAME = "linear_distillation_loss"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which autocast wants matrix products; on a CPU, whose products are float32, it has no say."""
    if device.type == "cpu" or not autocasts(device):
        return None
    return torch.get_autocast_dtype(device.type)


def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    *,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    kept_tokens: int | None = None,
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
    ``[tokens, vocab]`` tensor exists. Inputs are not changed, and results are the same bits run after
    run.

    Args:
        student_hidden, teacher_hidden: ``[..., d]``, float32, bfloat16, float16, or float64 (not in
            Triton); the two dimensions d may differ. No gradient flows to the teacher: its hidden
            states must not require one while gradients are enabled.
        student_weight, teacher_weight: ``[V, d]``, of the heads; the teacher's is detached. Both
            ``teacher_hidden`` and ``teacher_weight`` may be None where ``hard_label_weight`` is 1.
        student_bias, teacher_bias: ``[V]``; the teacher's is detached.
        loss_mask, labels: ``[...]``, aligned with the hidden states: no shift happens inside. With
            Hugging Face labels pass ``hidden[:, :-1]`` of both models and ``labels[:, 1:]``.
        student_logit_scale, teacher_logit_scale: positive factors of the logits.
        student_softcap, teacher_softcap: c above, positive; None for no cap.
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

        The others are those of :func:`distillation_loss`. A token of weight 0 is not read: whatever
        its hidden states hold, its gradient is 0. Infinite logits, which a bias may make, are
        dropped.

    Matrix products are float32 on a CPU (float64 for float64 inputs) and in the promoted dtype of
    hidden states and weight on a GPU, or autocast's. Gradients have the dtype of their tensors. The
    gradient of the logits is rounded to the products' dtype.

    Returns:
        The loss, float32 (float64 where a tensor is): 0-d, or ``[...]`` with "none". Without a token
        of nonzero weight it is 0, with a graph. ``LossComponents`` with ``return_components``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: from backward, on a second derivative, or a second backward of gradients made
            in the forward.
    """
    check_head(
        "student_", student_hidden, student_weight, student_bias, student_logit_scale,
        student_softcap,
    )  # fmt: skip
    with_teacher = teacher_hidden is not None and teacher_weight is not None
    if with_teacher:
        check_head(
            "teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale,
            teacher_softcap, constant=True,
        )  # fmt: skip
    n_cols = check_linear(
        student_hidden, student_weight, teacher_hidden, teacher_weight, hard_label_weight,
        loss_mask, labels, vocab_size,
    )  # fmt: skip
    divergence = check_options(
        student_hidden, n_cols, divergence, loss_mask, labels, ignore_index, hard_label_weight,
        temperature, reduction, normalizer, of="student_hidden",
    )  # fmt: skip
    check_linear_options(
        student_hidden, loss_mask, labels, ignore_index, logits_dtype, memory_budget, kept_tokens
    )
    teachers = (None,) * 3
    if with_teacher:  # no graph is made through a head in training
        bias = None if teacher_bias is None else teacher_bias.detach()
        teachers = (teacher_hidden, teacher_weight.detach(), bias)
    students = (student_hidden, student_weight, student_bias)
    triton = use_triton(backend, *students, *teachers, of="student_hidden")
    options = Options.of(
        divergence, reduction, "drop", triton, temperature, scale_by_temperature_squared,
        hard_label_weight, normalizer, n_cols, ignore_index,
    )  # fmt: skip
    return run_linear(
        NAME, students, (*teachers, None, None), "", divergence, loss_mask, labels, normalizer, options,
        (student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap),
        logits_dtype, memory_budget, kept_tokens, gradient, return_components,
    )  # fmt: skip


def run_linear(
    name: str,
    students: tuple[torch.Tensor | None, ...],  # hidden, weight, bias
    teachers: tuple[torch.Tensor | None, ...],  # the same, and log-probabilities and ids
    tail: str,
    divergence: Divergence,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    normalizer: float | torch.Tensor | None,
    options: Options,
    heads: tuple[float | None, ...],
    logits_dtype: torch.dtype,
    memory_budget: int | None,
    kept_tokens: int | None,
    gradient: str,
    return_components: bool,
) -> torch.Tensor | LossComponents:
    """A linear loss, ``name``, of checked arguments."""
    hidden, weight, bias = students
    autocast = autocast_dtype(hidden.device)
    mode = gradient_mode(gradient, hidden, options.reduction, weight, bias, products=autocast)
    if not torch.compiler.is_compiling():
        refuse_transforms(*students, function=name)
    packed = LinearOptions(
        options,
        tail,
        logits_dtype,
        autocast,
        *heads,
        memory_budget,
        kept_tokens,
        Wanted(*(mode != NO_GRADIENT and x is not None and x.requires_grad for x in students)),
    ).pack()
    loss, components, *_ = linear_loss_op(
        *students, *teachers, loss_mask, labels, as_tensor(normalizer), divergence.tensors, *packed,
        mode, return_components,
    )  # fmt: skip
    return with_components(loss, components, options) if return_components else loss


class LinearDistillationLoss(torch.nn.Module):
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

    def __init__(self, **options):
        super().__init__()
        unknown = set(options) - set(linear_distillation_loss.__kwdefaults__)
        if unknown:
            raise TypeError(
                f"LinearDistillationLoss got unknown options: {', '.join(sorted(unknown))}"
            )
        self.options = options

    def forward(
        self,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_weight: torch.Tensor | None,
        **arguments,
    ) -> torch.Tensor | LossComponents:
        """``arguments`` are those that change from step to step: ``loss_mask``, ``labels``..."""
        return linear_distillation_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight,
            **{**self.options, **arguments},
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
