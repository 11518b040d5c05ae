"""Checks of logits: one tensor of them, a student's and a teacher's, and one that is overwritten."""

import torch

from ..arguments import LossArguments
from ..scalars import integer, shown
from .values import LOGIT_DTYPES, TokenRows, check_plain, of_teacher


def check_logits(name: str, logits: torch.Tensor, least: int = 1) -> None:
    """``least``: columns that there must be."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [..., vocab], got {type(logits).__name__}")
    check_plain(name, logits)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64 logits, got {logits.dtype}"
        )
    if logits.dim() == 0 or logits.shape[-1] < least:
        raise ValueError(
            f"{name} must be [..., vocab] with at least one column, got shape {tuple(logits.shape)}"
        )


def check_vocabulary(vocab_size: int | None, *widths: int) -> int:
    """The number of columns used of logits of these widths."""
    widest = min(widths)
    if vocab_size is None:
        return widest
    return integer("vocab_size", vocab_size, 1, widest)


def check_teacher_given(
    name: str, teacher: torch.Tensor | None, arguments: LossArguments, instead: str = ""
) -> None:
    """``instead``: what else may be given."""
    if teacher is None and arguments.soft:
        weight, share = arguments.hard_label_weight, arguments.soft_weight
        needed = f"hard_label_weight=1{instead}, got {weight}"
        if share is not None:
            needed = f"soft_weight=0{instead}, got {share}"
        raise ValueError(f"{name} is None, which needs {needed}")
    if teacher is None and arguments.teacher_rows is not None:
        raise ValueError(
            f"teacher_rows is unused where {name} is None, got {shown(arguments.teacher_rows)}: "
            f"leave it out"
        )


def check_teacher_logits(
    rows: TokenRows,
    teacher_logits: torch.Tensor,
    teacher_rows: torch.Tensor | None = None,
    least: int = 1,
) -> None:
    """Check the logits that a teacher's forward gave, for these tokens."""
    check_logits("teacher_logits", teacher_logits, least)
    rows.check_device("teacher_logits", teacher_logits)
    of_teacher("teacher_logits", teacher_logits)
    rows.check_teacher_leading("teacher_logits", teacher_logits.shape[:-1], teacher_rows)


def check_pair(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    vocab_size: int | None,
    teacher_rows: torch.Tensor | None = None,
) -> int:
    """Check two tensors of logits; returns the number of columns used."""
    check_logits("student_logits", student_logits)
    width = student_logits.shape[-1]
    check_teacher_logits(TokenRows("student_logits", student_logits), teacher_logits, teacher_rows)
    if vocab_size is None and teacher_logits.shape[-1] != width:
        raise ValueError(
            f"student_logits have {width} columns and teacher_logits "
            f"{teacher_logits.shape[-1]}: pass vocab_size= to use the first columns of both "
            f"(heads padded to different widths)"
        )
    return check_vocabulary(vocab_size, width, teacher_logits.shape[-1])


def check_parts(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    teacher_rows: torch.Tensor | None = None,
) -> int:
    """Check this rank's columns, which may be none; how the widths fit the ranks learn from each other."""
    check_logits("student_logits", student_logits, 0)
    if teacher_logits is not None:
        rows = TokenRows("student_logits", student_logits)
        check_teacher_logits(rows, teacher_logits, teacher_rows, 0)
    return student_logits.shape[-1]


def check_alone(name: str, logits: torch.Tensor, vocab_size: int | None) -> int:
    """Check a tensor of logits; returns the number of columns used."""
    check_logits(name, logits)
    return check_vocabulary(vocab_size, logits.shape[-1])


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether there are bytes of its own: not of a tensor without entries, on meta or in a transform."""
    plain = type(tensor) is torch.Tensor and not tensor.is_meta
    return (
        plain and tensor.numel() > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes that a tensor spans: from, to."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_inplace(student_logits: torch.Tensor, teacher_logits: torch.Tensor | None) -> None:
    """The gradient may overwrite the student's logits, which require grad: they are no leaf, and share
    no memory with themselves or the teacher's."""
    base = student_logits._base
    if student_logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf that requires grad (a parameter), or "
            "a view of one: pass the output of the model, or inplace=False"
        )
    if torch.compiler.is_compiling() or not has_memory(student_logits):
        return
    if any(
        s == 0 and n > 1 for n, s in zip(student_logits.shape, student_logits.stride(), strict=True)
    ):
        raise ValueError(
            f"inplace=True needs student_logits without repeated memory, got strides "
            f"{student_logits.stride()} (expanded): pass .contiguous(), or inplace=False"
        )
    if teacher_logits is None or not has_memory(teacher_logits):
        return
    (start, end), (other_start, other_end) = _extent(student_logits), _extent(teacher_logits)
    if start < other_end and other_start < end:
        raise ValueError(
            "inplace=True would overwrite teacher_logits, which share memory with student_logits: "
            "pass teacher_logits.clone(), or inplace=False"
        )
