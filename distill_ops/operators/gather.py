"""The operators of K tokens a row: whose logits are largest, their log-probabilities, and both as the
slots of a teacher on a support. None has a derivative."""

import torch

from ..checks import contents
from ..problem import DenseInputs
from ..rows import TopKTeacher
from ..selection import largest_ids
from ..support import GatherInputs, GatherOptions, SupportOptions, TopInputs, TopOptions
from .path import path_of
from .register import LossOperator, Plan


def top_forward(inputs: TopInputs, options: TopOptions, plan: Plan):
    """Ids ``[..., k]``."""
    ids = largest_ids(inputs.logits, options.k, options.n_cols)
    return (ids.view(*inputs.leading, options.k),), ()


def top_fake(inputs, options, plan: Plan):
    k = getattr(options, "top", options).k
    return (inputs[0].new_empty((*inputs.leading, k), dtype=torch.int64),), ()


def gather_forward(inputs: GatherInputs, options: GatherOptions, plan: Plan):
    """Log-probabilities ``[..., K]``."""
    shape, mask = inputs.ids.shape, inputs.loss_mask
    found = path_of(options.backend).log_probs_at(
        inputs.logits, inputs.ids.reshape(inputs.n_rows, shape[-1]),
        None if mask is None else mask.reshape(-1), options.temperature, options.n_cols, inputs.dtype(),
    )  # fmt: skip
    return (found.view(shape),), ()


def gather_fake(inputs, options, plan: Plan):
    return (inputs[0].new_empty(inputs.ids.shape, dtype=inputs.dtype()),), ()


def slots_of(
    student: torch.Tensor,  # [..., V]
    teacher: torch.Tensor,  # [..., V]
    weights: torch.Tensor | None,  # [n]
    options: SupportOptions,  # or others that have its fields
    dtype: torch.dtype,
) -> TopKTeacher:
    """The teacher's log-probabilities at the ids of the largest logits. What the slots of rows of weight
    0 hold does not matter."""
    loss = options.loss
    source = student if options.support == "student" else teacher
    # of which rows count the kernels' host knows nothing: all are gone through
    skips = weights is not None and loss.backend == "torch"
    ids = largest_ids(source, options.support_k, loss.n_cols, weights != 0 if skips else None)
    log_probs = path_of(loss.backend).log_probs_at(
        teacher, ids, weights, loss.temperature, loss.n_cols, dtype
    )
    return TopKTeacher(log_probs, ids)


def slots_forward(inputs: DenseInputs, options: SupportOptions, plan: Plan):
    """Log-probabilities and ids ``[..., k]``."""
    weights = path_of(options.loss.backend).tokens(inputs, options.loss).weights
    slots = slots_of(inputs.student, inputs.teacher, weights, options, inputs.dtype())
    return tuple(x.view(*inputs.leading, options.support_k) for x in slots), ()


def slots_fake(inputs: DenseInputs, options: SupportOptions, plan: Plan):
    shape, new = (*inputs.leading, options.support_k), inputs.student.new_empty
    return (new(shape, dtype=inputs.dtype()), new(shape, dtype=torch.int64)), ()


top_ids = LossOperator("top_ids", TopInputs, TopOptions, forward=top_forward, fake=top_fake)
gather_log_probs = LossOperator(
    "gather_log_probs", GatherInputs, GatherOptions, forward=gather_forward, fake=gather_fake,
    check=contents.of_gather,
)  # fmt: skip
# the student is named for the transforms that would differentiate the loss: they are refused here
support_slots = LossOperator(
    "support_slots", DenseInputs, SupportOptions, forward=slots_forward, fake=slots_fake,
    check=contents.of_support, students=("student",), outputs=2,
)  # fmt: skip
