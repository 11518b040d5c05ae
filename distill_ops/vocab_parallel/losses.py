"""A loss of logits whose vocabulary ranks split: what an operator's forward and backward do of it."""

import torch

from ..checks.values import debug
from ..groups import check_agreement, place_again, place_of
from ..problem import BACKWARD, FORWARD, DenseInputs, Options
from .rows import local, row_losses


def facts_of(inputs, options) -> dict[str, object]:
    """What the ranks must agree in."""
    split = options.split
    shared = {name: getattr(options, name) for name in options._fields if name not in LOCAL}
    return {
        "the number of tokens": inputs.n_rows, "the logits' dtype": str(inputs[0].dtype),
        "vocab_size": split.vocab_size, "vocab_offset given": split.offset >= 0,
        **shared,
    }  # fmt: skip


LOCAL = "split", "n_cols"


def loss(
    path, phases, inputs: DenseInputs, options: Options, made: str, gradient: torch.Tensor | None
):
    """Outputs as of a path's ``loss``, and what the backward needs: statistics of the rows and the offset,
    where it makes the gradient."""
    student, teacher, split = inputs.student, inputs.teacher, options.split
    if debug():
        check_agreement(split, facts_of(inputs, options), student.device)
    width = student.shape[-1]
    place = place_of(split, width, student.device, None if teacher is None else teacher.shape[-1])
    if teacher is not None:
        teacher = place.of_teacher(teacher, width)
    tokens = local(path.tokens(inputs, options), place)
    found = row_losses(phases, options, tokens, student, teacher, place)
    if made == FORWARD:
        one = found.kept.new_ones(())
        phases.differentiate(
            options, tokens, student, teacher, place.n_cols, found.kept, one, gradient
        )
    components = (
        found.components if options.components else found.losses.new_empty((0, inputs.n_rows))
    )
    reduced = path.reduced(found.losses, components, options, tokens, inputs.leading)
    components = reduced[1] if options.components else None
    kept = (found.kept, place.kept(found.kept)) if made == BACKWARD else (None, None)
    return (reduced[0], components, None, None), kept


def gradient(path, phases, inputs: DenseInputs, options: Options, kept, upstream, out) -> None:
    """Fill ``out`` with the gradient of this rank's columns; no collective."""
    student, teacher = inputs.student, inputs.teacher
    width = student.shape[-1]
    of_rows, offset = kept
    place = place_again(
        options.split, offset, width, None if teacher is None else teacher.shape[-1]
    )
    if teacher is not None:
        teacher = place.of_teacher(teacher, width)
    tokens = local(path.tokens(inputs, options), place)
    phases.differentiate(
        options, tokens, student, teacher, place.n_cols, of_rows, upstream.to(of_rows.dtype), out
    )
