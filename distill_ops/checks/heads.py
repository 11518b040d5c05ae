"""Checks of the linear form: hidden states and the heads that make logits of them."""

import torch

from ..arguments import LossArguments
from ..groups import WHOLE as WHOLE_VOCABULARY
from ..groups import Split
from ..problem import HeadOptions
from ..scalars import shown
from .logits import check_teacher_given, check_teacher_logits, check_vocabulary
from .values import TokenRows, check_float_dtype, check_plain, of_teacher

WHOLE = {
    "teacher": "pass {name}.full_tensor()",
    "hidden": "pass this rank's tokens as a plain tensor",
    "weight": "under FSDP2, read it inside the forward of the fully_shard module that holds it, or "
    "after lm_head.unshard(), or pass {name}.full_tensor(grad_placements=[Partial('avg')]); plain "
    "full_tensor() leaves its gradient unreduced over the ranks (docs/linear.md). Of a column-parallel "
    "head, whose vocabulary the ranks split, pass group= (docs/vocab-parallel.md)",
}


def check_head(
    side: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    frozen: bool = False,
    least: int = 1,
) -> None:
    """Check hidden states and the head that makes logits of them; ``side`` begins their names, ``least`` is
    the number of rows that the head must have.

    Hidden states that get no gradient (``frozen``) may require one only while gradients are
    disabled; a head's weight and bias may (any unfrozen model's do), and are the caller's to detach."""
    tensors = {f"{side}hidden": hidden, f"{side}weight": weight}
    if bias is not None:
        tensors[f"{side}bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        part = "teacher" if frozen else "hidden" if tensor is hidden else "weight"
        check_plain(name, tensor, WHOLE[part])
        check_float_dtype(name, tensor)
        TokenRows(f"{side}hidden", hidden).check_device(name, tensor)
    if frozen:
        of_teacher(f"{side}hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] < least or weight.shape[1] == 0:
        raise ValueError(f"{side}weight must be [vocab, dim], got shape {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}hidden must be [..., {weight.shape[1]}] for {side}weight of shape "
            f"{tuple(weight.shape)}, got shape {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")


def check_heads(
    rows: TokenRows,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    arguments: LossArguments,
    teacher_logits: torch.Tensor | None = None,
    split: Split = WHOLE_VOCABULARY,
) -> int:
    """Check what two heads must share, each having passed :func:`check_head`, or a head and the logits
    that stand for the teacher's; ``rows`` are the student's hidden states. Returns the number of columns
    used; of a ``split`` vocabulary all that this rank has: how the widths fit the ranks learn from each
    other."""
    vocab_size, of_teacher = arguments.vocab_size, {
        "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight
    }  # fmt: skip
    if teacher_logits is not None:
        return _check_logits_of_teacher(
            rows, student_weight, of_teacher, teacher_logits, arguments, split
        )
    for name, tensor in of_teacher.items():
        check_teacher_given(name, tensor, arguments, " (or teacher_logits=)")
    widths = [student_weight.shape[0]]
    if teacher_hidden is not None and teacher_weight is not None:
        leading, like = teacher_hidden.shape[:-1], rows._replace(ranks=1)
        like.check_teacher_leading("teacher_hidden", leading, arguments.teacher_rows)
        rows.check_device("teacher_hidden", teacher_hidden)
        widths.append(teacher_weight.shape[0])
        if vocab_size is None and widths[0] != widths[1] and split.group is None:
            raise ValueError(
                f"student_weight has {widths[0]} rows and teacher_weight {widths[1]}: pass "
                f"vocab_size= to use the first rows of both (heads padded to different widths)"
            )
    if split.group is not None:
        return widths[0]
    return check_vocabulary(vocab_size, *widths)


def _check_logits_of_teacher(
    rows: TokenRows,
    student_weight: torch.Tensor,
    head: dict[str, torch.Tensor | None],
    teacher_logits: torch.Tensor,
    arguments: LossArguments,
    split: Split,
) -> int:
    """Logits in place of a teacher's head."""
    for name, tensor in head.items():
        if tensor is not None:
            raise ValueError(
                f"teacher_logits stand for the teacher's head, but {name} is given too, "
                f"{shown(tensor)}: pass None for it, or leave teacher_logits out"
            )
    whole = split.group is None
    check_teacher_logits(rows, teacher_logits, arguments.teacher_rows, int(whole))
    widths = student_weight.shape[0], teacher_logits.shape[-1]
    if not whole:
        return widths[0]
    if arguments.vocab_size is None and widths[0] != widths[1]:
        raise ValueError(
            f"student_weight has {widths[0]} rows and teacher_logits {widths[1]} columns: pass "
            f"vocab_size= to use the first of both (heads padded to different widths)"
        )
    return check_vocabulary(arguments.vocab_size, *widths)


def check_no_teacher(bias: torch.Tensor | None, options: HeadOptions) -> None:
    """Without hidden states or weight of a teacher nothing else of one is used."""
    scale = None if options.logit_scale == 1 else options.logit_scale
    given = {"bias": bias, "logit_scale": scale, "softcap": options.softcap}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"teacher_{name} is unused where teacher_hidden or teacher_weight is None, "
                f"got {shown(value)}: leave it out"
            )
