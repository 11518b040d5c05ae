"""What the losses of hidden states hand to their operator."""

import torch

from ..arguments import LossArguments
from ..checks.heads import check_block_options
from ..divergences.base import Divergence
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
    tail: str | None,
    divergence: Divergence,
    n_cols: int,
    arguments: LossArguments,
    logits_dtype: torch.dtype,
    memory_budget: int | None,
    kept_tokens: int | None,
) -> tuple[LinearInputs, LinearOptions, str]:
    """The operator's inputs and options, and when it makes the gradients, of arguments that are
    checked but for those of the blocks."""
    check_block_options(logits_dtype, memory_budget, kept_tokens, arguments.counted)
    hidden, *_ = student
    autocast = autocast_dtype(hidden.device)
    made = gradient_mode(arguments.gradient, arguments.reduction, *student, products=autocast)
    log_probs, _ = slots
    backend = choose_backend(arguments.backend, "student_hidden", *student, *teacher, log_probs)
    options = LinearOptions(
        Options.of(divergence, n_cols, backend, arguments, tail), student_options, teacher_options,
        BlockOptions(logits_dtype, autocast, memory_budget, kept_tokens),
    )  # fmt: skip
    inputs = LinearInputs(*student, *teacher, *slots, *arguments.tensors, divergence.tensors)
    return inputs, options, made
