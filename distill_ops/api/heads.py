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
) -> tuple[LinearInputs, LinearOptions, str]:
    """The operator's inputs and options, and when it makes the gradients, of checked arguments."""
    hidden, *_ = student
    autocast = autocast_dtype(hidden.device)
    made = gradient_mode(arguments.gradient, arguments.reduction, *student, products=autocast)
    log_probs, _ = slots
    backend = choose_backend(arguments.backend, "student_hidden", *student, *teacher, log_probs)
    options = LinearOptions(
        Options.of(arguments, n_cols, backend, tail), student_options, teacher_options,
        blocks._replace(autocast=autocast),
    )  # fmt: skip
    return LinearInputs(*student, *teacher, *slots, *arguments.tensors), options, made
