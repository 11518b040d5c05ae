"""What the losses of hidden states hand to their operator."""

import torch

from ..arguments import LossArguments, Tail
from ..checks.heads import check_head, check_heads, check_no_teacher
from ..checks.options import head_options
from ..checks.tokens import check_options
from ..checks.values import TokenRows
from ..groups import WHOLE, Split
from ..problem import BlockOptions, HeadOptions, LinearInputs, LinearOptions, Options
from .choices import autocast_dtype, choose_backend, gradient_mode

Head = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NO_HEAD = None, None, None


def checked_heads(
    student: Head,
    student_numbers: tuple[float, float | None],  # logit scale and softcap
    teacher: Head,
    teacher_numbers: tuple[float, float | None],
    arguments: LossArguments,
    teacher_logits: torch.Tensor | None = None,  # of a teacher without a head
    split: Split = WHOLE,
    token_ranks: int = 1,
) -> tuple[Head, HeadOptions, Head, HeadOptions, int, LossArguments]:
    """Check two heads, the teacher's perhaps absent, and what comes with their tokens: as
    :func:`linear_problem` takes them, with the number of columns used."""
    student_options = head_options("student_", *student_numbers)
    teacher_options = head_options("teacher_", *teacher_numbers)
    least = int(split.group is None)  # a rank may have no columns
    check_head("student_", *student, least=least)
    hidden, weight, bias = teacher
    if hidden is None or weight is None:
        teacher = NO_HEAD
    else:
        check_head("teacher_", *teacher, frozen=True, least=least)
        # in training no graph is made through a head
        teacher = hidden, *(x if x is None else x.detach() for x in (weight, bias))
    rows = TokenRows("student_hidden", student[0], token_ranks)
    n_cols = check_heads(rows, student[1], hidden, weight, arguments, teacher_logits, split)
    if teacher is NO_HEAD:
        check_no_teacher(bias, teacher_options)
    return (
        student, student_options, teacher, teacher_options, n_cols, check_options(rows, arguments)
    )  # fmt: skip


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
    support: str | None = None,  # whose largest logits are a row's outcomes
    support_k: int | None = None,
    split: Split = WHOLE,
) -> tuple[LinearInputs, LinearOptions, str]:
    """The operator's inputs and options, and when it makes the gradients, of checked arguments."""
    hidden, *_ = student
    autocast = autocast_dtype(hidden.device)
    made = gradient_mode(arguments.gradient, arguments.reduction, *student, products=autocast)
    log_probs, _ = slots
    of_teacher = *teacher, log_probs, teacher_logits
    backend = choose_backend(arguments.backend, "student_hidden", *student, *of_teacher)
    options = LinearOptions(
        Options.of(arguments, n_cols, backend, tail, split), student_options, teacher_options,
        blocks._replace(autocast=autocast), support, support_k,
    )  # fmt: skip
    inputs = LinearInputs(*student, *teacher, *slots, *arguments.tensors, teacher_logits)
    return inputs, options, made
