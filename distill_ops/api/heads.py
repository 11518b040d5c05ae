"""What the losses of hidden states hand to their operator."""

import torch

from ..arguments import LossArguments, Tail
from ..problem import BlockOptions, HeadOptions, LinearInputs, LinearOptions, Options
from .choices import autocast_dtype, choose_backend, gradient_mode

Head = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NO_HEAD = None, None, None


def linear_problem(
    student: Head,
    student_options: HeadOptions,
    teacher: Head,
    teacher_options: HeadOptions,
    slots: tuple[torch.Tensor | None, torch.Tensor | None],  # of a top-k teacher
    tail: Tail,
    n_cols: int,
    arguments: LossArguments,
    blocks: BlockOptions,
    teacher_logits: torch.Tensor | None = None,  # of a teacher without a head
) -> tuple[LinearInputs, LinearOptions, str]:
    """The operator's inputs and options, and when it makes the gradients, of checked arguments."""
    hidden, *_ = student
    autocast = autocast_dtype(hidden.device)
    made = gradient_mode(arguments.gradient, arguments.reduction, *student, products=autocast)
    log_probs, _ = slots
    of_teacher = *teacher, log_probs, teacher_logits
    backend = choose_backend(arguments.backend, "student_hidden", *student, *of_teacher)
    options = LinearOptions(
        Options.of(arguments, n_cols, backend, tail), student_options, teacher_options,
        blocks._replace(autocast=autocast),
    )  # fmt: skip
    inputs = LinearInputs(*student, *teacher, *slots, *arguments.tensors, teacher_logits)
    return inputs, options, made
