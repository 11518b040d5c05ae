"""A chunk of rows on the CPU: its losses and gradient by whole-tensor PyTorch operations.

Every divergence runs its own ``value_and_slope`` (``kernels/divergences.py``) on tensors; the
built-in ones have a closed form as well (``closed_forms.py``), with fewer passes over the chunk and
no temporaries. Neither has guards at first: an infinite logit shows as a loss that is not finite.
Then a chunk's closed form runs again with GUARDS, which drop terms by the rules of semantics.md,
section 3, and leave rows without infinities the same bits; what is still not finite, ``general``
does row by row with all its rules.

The losses come first and the gradient after them, where the losses serve: it may overwrite the
student's logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..divergences.base import Divergence
from .outputs import ChunkOutputs
from .rows import exponents, row_sums
from .slopes import Slope, SlopeOfSoftmax, log_softmax_backward

NEG_INF = float("-inf")

Write = Callable[[torch.Tensor], object]
ClosedForm = Callable[["Chunk"], tuple[torch.Tensor | None, Slope | SlopeOfSoftmax]]


class Row(NamedTuple):
    """How rows are normalised of whose columns the chunk has a part, ``[rows, 1]`` each.

    Exponentials are relative to the row's maximum: ``maximum``, of the chunk's columns, goes before a
    division by a temperature, and then ``left`` is what is left of it (all of it without a division).
    ``log_sum`` is the logarithm of their sum, and ``share`` the probability of the chunk's columns."""

    maximum: torch.Tensor
    left: torch.Tensor
    log_sum: torch.Tensor
    share: torch.Tensor


def probabilities(logits: torch.Tensor, prob: torch.Tensor, row: Row | None) -> torch.Tensor:
    """Those of a :class:`Row` are over their own sum: PyTorch's loses the small ones of a peaked row."""
    torch.softmax(logits, -1, out=prob)
    return prob if row is None else prob.mul_(row.share / row_sums(prob)[:, None])


def free_logarithms(
    logits: torch.Tensor, prob: torch.Tensor | None, log: torch.Tensor, row: Row | None
) -> torch.Tensor:
    """Logarithms of ``prob``, by subtraction, but for a constant of each row, which is returned; a
    :class:`Row` gives it without the probabilities."""
    if row is not None:
        torch.sub(logits, row.left, out=log)
        return -row.log_sum
    torch.sub(logits, logits.amax(-1, True), out=log)
    return prob.amax(-1, True).log_()


def softmax(
    logits: torch.Tensor, prob: torch.Tensor, log: torch.Tensor, row: Row | None
) -> torch.Tensor:
    """Probabilities and their logarithms, the latter by subtraction: in less time than PyTorch takes to
    make both, or an exponential of one. Returns ``prob``."""
    probabilities(logits, prob, row)
    log.add_(free_logarithms(logits, prob, log, row))
    return prob


# How a chunk is done: as if every logit were finite; its closed form with guards; row by row
UNGUARDED, GUARDS, ROW_BY_ROW = range(3)


class Terms(NamedTuple):
    """What is computed of a row: the options of the loss that reach this far."""

    divergence: type[Divergence] | None  # None: the hard label alone
    hard: bool
    temperature: float
    propagate: bool
    dtype: torch.dtype  # float32, or float64 for float64 logits


@dataclass(slots=True)
class Chunk:
    """Rows under work. ``scale`` and ``hard_scale``, the factors of the two gradients, and the
    divergence's parameters are numbers, ``[]`` or ``[rows, 1]``; ``buffers`` are matrices in
    the working dtype.

    The columns may be a part of the rows', without guards and outputs: then ``student_row`` and
    ``teacher_row`` normalise them, and a form may leave its losses out where ``lossless``."""

    terms: Terms
    student: torch.Tensor  # [rows, V]
    teacher: torch.Tensor | None  # [rows, V]
    labels: torch.Tensor | None  # [rows]
    scale: float | torch.Tensor
    hard_scale: float | torch.Tensor
    parameters: list[float | torch.Tensor]
    buffers: tuple[torch.Tensor, ...]
    guards: int
    outputs: ChunkOutputs | None
    student_row: Row | None = None
    teacher_row: Row | None = None
    lossless: bool = False
    filled: bool = False  # whether the second buffer holds the softmax of the teacher's columns

    def divergence(self, form: ClosedForm | None) -> tuple[torch.Tensor, Write]:
        """Divergence of each row, by its closed form or else its own text, and what writes the
        gradient."""
        return self.general() if form is None or self.guards == ROW_BY_ROW else form(self)

    def finish(
        self, write: Write | None, gradient: torch.Tensor | None, inplace: bool
    ) -> torch.Tensor | None:
        """Fill ``gradient`` (inplace: it is the student's memory); returns the cross-entropy of
        each row, where it is asked for."""
        if self.terms.divergence is not None:
            self.store_outputs()
        out = None
        if gradient is not None:
            # PyTorch's backward of softmax ignores the strides of its ``out``
            direct = gradient.dtype == self.terms.dtype and gradient.is_contiguous()
            early = inplace and self.terms.hard and write is not None  # logits are read once more
            out = gradient if direct and not early else self.buffers[0]
            if write is not None:
                write(out)
        hard_loss = None
        if self.terms.hard:
            hard_loss, write_hard = self.cross_entropy()
            if self.terms.divergence is None:
                self.store_outputs()
            if out is not None:
                write_hard(out if write is None else self.buffers[3])
                if write is not None:
                    out.add_(self.buffers[3])
        if out is not gradient:
            gradient.copy_(out)
        return hard_loss

    def logits(
        self, logits: torch.Tensor, temperature: float, buffer: torch.Tensor, row: Row | None = None
    ) -> torch.Tensor:
        """``logits / temperature`` in the working dtype; copied only where it must be."""
        if temperature == 1:
            return logits if logits.dtype == buffer.dtype else buffer.copy_(logits)
        if row is not None:  # finite where a quotient is not
            return exponents(logits, row.maximum[:, 0], temperature, buffer)
        if logits.dtype == buffer.dtype:
            return torch.div(logits, temperature, out=buffer)
        return buffer.copy_(logits).div_(temperature)

    def student_logits(self) -> torch.Tensor:
        logits = self.logits(
            self.student, self.terms.temperature, self.buffers[0], self.student_row
        )
        return self._see_argmax("student_argmax", self.student, logits)

    def teacher_logits(self) -> torch.Tensor:
        logits = self.logits(
            self.teacher, self.terms.temperature, self.buffers[0], self.teacher_row
        )
        return self._see_argmax("teacher_argmax", self.teacher, logits)

    def _see_argmax(self, name: str, raw: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Of the logits as they came: a quotient may be the same of two. Of half precision it is not.
        Rows without a softmax come again, by their loss."""
        if self.seen is not None:
            self.outputs.argmax(name, raw if raw.dtype == logits.dtype else logits)
        return logits

    def store_outputs(self) -> None:
        """Where all forms have shown what they show, and no gradient is over the logits yet."""
        if self.outputs is not None:
            self.outputs.store(self.student, self.teacher, self.terms.dtype)

    @property
    def seen(self) -> ChunkOutputs | None:
        """Where token outputs go that a form without guards shows."""
        return None if self.guards else self.outputs

    def log_softmax(
        self,
        logits: torch.Tensor,
        log: torch.Tensor,
        room: torch.Tensor,
        entropy: str,
        row: Row | None,
    ) -> torch.Tensor | None:
        """Into ``log``; where the output ``entropy`` or another needs the probabilities, those too, in
        ``room``, which is returned then."""
        if self.seen is not None and self.seen.wants(entropy, "acceptance"):
            return softmax(logits, room, log, row)
        if row is None:
            torch.log_softmax(logits, -1, out=log)
        else:
            log.add_(free_logarithms(logits, None, log, row))
        return None

    def see_student(
        self, log_q: torch.Tensor, q: torch.Tensor | None, scratch: torch.Tensor, shift=0.0
    ) -> None:
        """Tell of the student's logarithms, less ``shift``, and probabilities, which may be None where
        :meth:`log_softmax` found that no output needs them. ``scratch`` is written over."""
        if self.seen is not None:
            self.seen.log_prob(log_q, shift)
            self.seen.entropy("student_entropy", log_q, q, shift, scratch)

    def see_teacher(
        self, log_p: torch.Tensor, p: torch.Tensor | None, scratch: torch.Tensor, shift=0.0
    ) -> None:
        """As :meth:`see_student`."""
        if self.seen is not None:
            self.seen.entropy("teacher_entropy", log_p, p, shift, scratch)

    def see_both(
        self, q: torch.Tensor | None, p: torch.Tensor | None, scratch: torch.Tensor
    ) -> None:
        """Tell of both probabilities."""
        if self.seen is not None:
            self.seen.both(q, p, self.student, scratch)

    def finite_log(self, log: torch.Tensor) -> torch.Tensor:
        """Logarithms of zeros as the lowest number: their probability makes them 0."""
        return log.clamp_(min=torch.finfo(log.dtype).min) if self.guards else log

    def without_student_zeros(self, values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill_(self.student == NEG_INF, 0.0) if self.guards else values

    def cross_entropy(self) -> tuple[torch.Tensor, Write]:
        _, work, log_q, *_ = self.buffers
        logits = self.logits(self.student, 1.0, work)
        alone = self.terms.divergence is None and self.terms.temperature == 1
        if alone:
            q = self.log_softmax(logits, log_q, self.buffers[3], "student_entropy", None)
        else:
            torch.log_softmax(logits, -1, out=log_q)
        labels = self.labels[:, None]
        loss = -log_q.gather(-1, labels).squeeze(-1)
        if alone and self.seen is not None and math.isfinite(loss.sum()):
            self._see_argmax("student_argmax", self.student, logits)
            self.see_student(log_q, q, self.buffers[4])

        def write(out):
            slope = work.zero_().scatter_(-1, labels, -1.0).mul_(self.hard_scale)
            log_softmax_backward(slope, log_q, -1, slope.dtype, out=out)

        return loss, write

    def general(self) -> tuple[torch.Tensor, Write]:
        """Any divergence by its own text; ROW_BY_ROW adds every rule for infinite logits."""
        guarded = self.guards == ROW_BY_ROW
        divergence, propagate = self.terms.divergence, self.terms.propagate
        student, teacher = self.student.to(self.terms.dtype), self.teacher.to(self.terms.dtype)
        if guarded:
            student_zero, teacher_zero = student == NEG_INF, teacher == NEG_INF
            dead = student_zero & teacher_zero
            if divergence.infinite_at_teacher_zero and not propagate:
                student = student.masked_fill(teacher_zero, NEG_INF)
                dead = dead | teacher_zero
            if divergence.infinite_at_student_zero and not propagate:
                dead = dead | student_zero
            # the maximum goes first: the division could overflow
            student_max, teacher_max = student.amax(-1, True), teacher.amax(-1, True)
            student, teacher = student - student_max, teacher - teacher_max
        log_q = torch.log_softmax(student / self.terms.temperature, -1)
        log_p = torch.log_softmax(teacher / self.terms.temperature, -1)
        lowest = torch.finfo(log_q.dtype).min if guarded else None
        finite = [log.clamp(min=lowest) if guarded else log for log in (log_q, log_p)]
        value, slope = divergence.on_columns(*finite, self.parameters)
        if guarded:
            if divergence.infinite_at_student_zero and propagate:
                value = value.masked_fill(student_zero, math.inf)
            if divergence.infinite_at_teacher_zero and propagate:
                value = value.masked_fill(teacher_zero, math.inf)
                slope = slope.masked_fill(teacher_zero, math.inf)
            # a row without a finite maximum must not vanish among the terms that are dropped
            no_softmax = ~(student_max.isfinite() & teacher_max.isfinite())
            value = value.masked_fill(dead, 0.0).masked_fill(no_softmax, math.nan)
            slope = slope.masked_fill(dead, 0.0).masked_fill(no_softmax, math.nan)
        return row_sums(value), lambda out: log_softmax_backward(
            slope * self.scale, log_q, -1, log_q.dtype, out=out
        )
