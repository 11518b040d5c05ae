"""A loss of logits whose vocabulary ranks split: what an operator's forward and backward do of it."""

import zlib

import torch

from ..checks.values import debug
from ..groups import Place, check_agreement, place_again, place_of
from ..problem import BACKWARD, FORWARD, DenseInputs, Options, TopKInputs
from ..rows import TopKTeacher
from . import rows, topk
from .rows import local

LOCAL = "split", "n_cols"
# of the inputs what each rank has its own part of, and what is too large to compare
PARTS = ("student", "teacher", "logits", "weight", "bias", "hidden")


def _fact(name: str, value) -> object:
    """Of an input what the ranks must agree in: all of it where it has one entry a token or slot."""
    if isinstance(value, list):
        return [_fact(name, x) for x in value]
    if value is None or name.endswith(PARTS):
        return None if value is None else str(value.dtype)
    entries = value.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
    return str(value.dtype), tuple(value.shape), zlib.crc32(entries.tobytes())


def facts_of(inputs, options) -> dict[str, object]:
    """What the ranks must agree in."""
    split = options.split
    return {
        "the number of tokens": inputs.n_rows,
        "vocab_size": split.vocab_size, "vocab_offset given": split.offset >= 0,
        **{f"the input {name}": _fact(name, x) for name, x in inputs._asdict().items()},
        **{name: getattr(options, name) for name in options._fields if name not in LOCAL},
    }  # fmt: skip


def loss(
    path, phases, inputs: DenseInputs | TopKInputs, options: Options, made: str,
    gradient: torch.Tensor | None,
):  # fmt: skip
    """Outputs as of a path's ``loss``, and what the backward needs: statistics of the rows and the offset,
    where it makes the gradient."""
    student, teacher, split = inputs.student, inputs.teacher, options.split
    if debug():
        check_agreement(split, facts_of(inputs, options), student.device, student.shape[-1])
    width = student.shape[-1]
    place = place_of(split, width, student.device, _width(teacher))
    teacher = _of_teacher(place, teacher, width, options)
    tokens, form = local(path.tokens(inputs, options), place), _form(teacher)
    columns, more = (student, teacher, place.n_cols), {}
    if form is rows and made == FORWARD and phases.fills(options, student, gradient, place.n_cols):
        more["room"] = gradient
    found = form.row_losses(phases, options, tokens, student, teacher, place, **more)
    if made == FORWARD:
        filled = {"filled": True} if more else {}
        one = found.kept.new_ones(())
        form.differentiate(phases, options, tokens, *columns, found.kept, one, gradient, **filled)
    components = (
        found.components if options.components else found.losses.new_empty((0, inputs.n_rows))
    )
    reduced = path.reduced(found.losses, components, options, tokens, inputs.leading)
    components = reduced[1] if options.components else None
    kept = (found.kept, place.kept(found.kept)) if made == BACKWARD else (None, None)
    return (reduced[0], components, None, None), kept


def gradient(
    path, phases, inputs: DenseInputs | TopKInputs, options: Options, kept, upstream, out
) -> None:
    """Fill ``out`` with the gradient of this rank's columns; no collective."""
    student, teacher = inputs.student, inputs.teacher
    width = student.shape[-1]
    of_rows, offset = kept
    place = place_again(options.split, offset, width, _width(teacher))
    teacher = _of_teacher(place, teacher, width, options)
    tokens = local(path.tokens(inputs, options), place)
    _form(teacher).differentiate(
        phases, options, tokens, student, teacher, place.n_cols, of_rows,
        upstream.to(of_rows.dtype), out,
    )  # fmt: skip


Teacher = torch.Tensor | TopKTeacher | None


def _width(teacher: Teacher) -> int | None:
    """Of a teacher's logits on this rank; the slots of a top-k teacher are whole on every rank."""
    return teacher.shape[-1] if isinstance(teacher, torch.Tensor) else None


def _of_teacher(place: Place, teacher: Teacher, width: int, options: Options):
    """What the phases take of a teacher."""
    if isinstance(teacher, TopKTeacher):
        return topk.SlotTeacher.of(teacher, place, options)
    return None if teacher is None else place.of_teacher(teacher, width)


def _form(teacher):
    """The module that has the order of the phases against such a teacher."""
    return topk if isinstance(teacher, topk.SlotTeacher) else rows
