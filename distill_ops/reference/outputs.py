"""What a loss tells of each token beside it, from whole rows (semantics.md, section 15)."""

import torch
import torch.nn.functional as F

from ..arguments import LossArguments
from ..results import LossResult, TokenOutputs
from .rows import NEG_INF, entropy, no_maximum


def _argmax(row: torch.Tensor) -> torch.Tensor:
    return row.argmax(-1).masked_fill(no_maximum(row).squeeze(-1), -1)


def with_token_outputs(
    result: LossResult,
    arguments: LossArguments,
    weights: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor | None = None,
    slots: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LossResult:
    """The result with the token outputs that are asked for, if any are.

    Logits ``[..., V]`` are those of the loss, slots a top-k teacher's log-probabilities and ids
    ``[..., K]``, -inf and -1 where unused."""
    if not arguments.token_outputs:
        return result
    student, unread, found = student.detach(), weights == 0, {}
    log_q = F.log_softmax(student / arguments.temperature, -1)
    found["student_entropy"] = entropy(log_q)
    found["student_argmax"] = _argmax(student)
    ids = arguments.labels if arguments.token_ids is None else arguments.token_ids
    if "log_prob" in arguments.token_outputs:
        ignored = unread | (ids == arguments.ignore_index)
        of_ids = log_q.gather(-1, ids.masked_fill(ignored, 0)[..., None]).squeeze(-1)
        found["log_prob"] = of_ids.masked_fill(ignored, 0.0)
    if teacher is not None:
        log_p = F.log_softmax(teacher / arguments.temperature, -1)
        fails = torch.where(no_maximum(student), torch.nan, 0.0).squeeze(-1)
        found["teacher_entropy"] = entropy(log_p)
        found["teacher_argmax"] = _argmax(teacher)
        found["acceptance"] = torch.minimum(log_q.exp(), log_p.exp()).sum(-1)
        found["teacher_mass"] = log_p.exp().masked_fill(student == NEG_INF, 0.0).sum(-1) + fails
    if slots is not None:
        log_p, ids = slots
        top = log_p.amax(-1, keepdim=True)
        last = torch.iinfo(ids.dtype).max
        first = torch.where(log_p == top, ids, last).masked_fill(ids < 0, last).amin(-1)
        found["teacher_argmax"] = first.masked_fill(no_maximum(log_p).squeeze(-1), -1)
        found["teacher_mass"] = log_p.exp().sum(-1)
    of_unread = {"student_argmax": -1, "teacher_argmax": -1}
    outputs = {
        name: found[name].masked_fill(unread, of_unread.get(name, 0))
        for name in arguments.token_outputs
    }
    return result, TokenOutputs(**outputs)
