"""A chunk of rows on the CPU: its losses and gradient by whole-tensor PyTorch operations.

Every divergence runs its own ``value_and_slope`` (``kernels/divergences.py``) on tensors; the four
most used have a closed form here as well, with fewer passes over the chunk. Neither has guards at
first: an infinite logit shows as a loss that is not finite. Then a chunk's closed form runs again
with GUARDS, which drop terms by the rules of semantics.md, section 3, and leave rows without
infinities the same bits; what is still not finite, ``general`` does row by row with all its rules.

With ``D = sum(slope)`` the gradient ``slope - q D`` is the backward of log_softmax, and where
``slope = q h`` it is the backward of softmax, ``q (h - sum(q h))``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .divergences import Divergence

BUFFERS = 5
NEG_INF = float("-inf")

softmax_backward = torch.ops.aten._softmax_backward_data.out
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.out


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of the rows: the same bits for a row alone, which PyTorch would split across threads."""
    if values.shape[0] == 1:
        return values.expand(2, -1).sum(-1)[:1]
    return values.sum(-1)


# How a chunk is done: as if every logit were finite; its closed form with guards; row by row
UNGUARDED, GUARDS, ROW_BY_ROW = range(3)


class Terms(NamedTuple):
    """What is computed of a row: the options of the loss that reach this far."""

    divergence: type[Divergence] | None  # None: the hard label alone
    hard: bool
    temperature: float
    propagate: bool
    dtype: torch.dtype  # float32, or float64 for float64 logits

    @property
    def has_guards(self) -> bool:
        """Whether the closed form serves rows with infinities. Below temperature 1 the division
        may overflow, which takes more care."""
        closed = self.divergence is not None and self.divergence.name in CLOSED_FORMS
        return closed and self.temperature >= 1 and not self.propagate


@dataclass(slots=True)
class Chunk:
    """Rows under work. ``scale`` and ``hard_scale``, the factors of the two gradients, and the
    divergence's parameters are numbers, ``[]`` or ``[rows, 1]``; ``buffers`` are BUFFERS matrices in
    the working dtype."""

    terms: Terms
    student: torch.Tensor  # [rows, V]
    teacher: torch.Tensor | None  # [rows, V]
    labels: torch.Tensor | None  # [rows]
    scale: float | torch.Tensor
    hard_scale: float | torch.Tensor
    parameters: list[float | torch.Tensor]
    buffers: tuple[torch.Tensor, ...]
    guards: int

    def losses(self, gradient: torch.Tensor | None):
        """Divergence and cross-entropy of each row (None where not asked for); fills ``gradient``."""
        divergence_loss = hard_loss = out = None
        if gradient is not None:
            # PyTorch's backward of softmax ignores the strides of its ``out``
            direct = gradient.dtype == self.terms.dtype and gradient.is_contiguous()
            out = gradient if direct else self.buffers[0]
        if self.terms.divergence is not None:
            form = CLOSED_FORMS.get(self.terms.divergence.name, Chunk.general)
            if self.guards == ROW_BY_ROW:
                form = Chunk.general
            divergence_loss = form(self, out)
        if self.terms.hard:
            alone = divergence_loss is None
            hard_loss = self.cross_entropy(out if alone or out is None else self.buffers[3])
            if out is not None and not alone:
                out.add_(self.buffers[3])
        if out is not gradient:
            gradient.copy_(out)
        return divergence_loss, hard_loss

    def logits(
        self, logits: torch.Tensor, temperature: float, buffer: torch.Tensor
    ) -> torch.Tensor:
        """``logits / temperature`` in the working dtype; copied only where it must be."""
        if temperature == 1:
            return logits if logits.dtype == buffer.dtype else buffer.copy_(logits)
        if logits.dtype == buffer.dtype:
            return torch.div(logits, temperature, out=buffer)
        return buffer.copy_(logits).div_(temperature)

    def student_logits(self) -> torch.Tensor:
        return self.logits(self.student, self.terms.temperature, self.buffers[0])

    def teacher_logits(self) -> torch.Tensor:
        return self.logits(self.teacher, self.terms.temperature, self.buffers[0])

    def finite_log(self, log: torch.Tensor) -> torch.Tensor:
        """Logarithms of zeros as the lowest number: their probability makes them 0."""
        return log.clamp_(min=torch.finfo(log.dtype).min) if self.guards else log

    def without_student_zeros(self, values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill_(self.student == NEG_INF, 0.0) if self.guards else values

    def cross_entropy(self, gradient: torch.Tensor | None) -> torch.Tensor:
        _, work, log_q, *_ = self.buffers
        torch.log_softmax(self.logits(self.student, 1.0, work), -1, out=log_q)
        labels = self.labels[:, None]
        loss = -log_q.gather(-1, labels).squeeze(-1)
        if gradient is not None:
            slope = work.zero_().scatter_(-1, labels, -1.0).mul_(self.hard_scale)
            log_softmax_backward(slope, log_q, -1, slope.dtype, out=gradient)
        return loss

    def soft_cross_entropy(self, gradient: torch.Tensor | None) -> torch.Tensor:
        work, log_q, p, *_ = self.buffers
        torch.log_softmax(self.student_logits(), -1, out=log_q)
        torch.softmax(self.teacher_logits(), -1, out=p)
        self.finite_log(log_q)
        self.without_student_zeros(p)
        loss = row_sums(torch.mul(p, log_q, out=work)).neg_()
        if gradient is not None:
            log_softmax_backward(p.mul_(-self.scale), log_q, -1, p.dtype, out=gradient)
        return loss

    def forward_kl(self, gradient: torch.Tensor | None) -> torch.Tensor:
        _, log_q, log_p, p, _ = self.buffers
        torch.log_softmax(self.student_logits(), -1, out=log_q)
        teacher = self.teacher_logits()
        torch.log_softmax(teacher, -1, out=log_p)
        torch.softmax(teacher, -1, out=p)
        self.without_student_zeros(p)
        loss = row_sums(self.finite_log(log_p).sub_(self.finite_log(log_q)).mul_(p))
        if gradient is not None:
            log_softmax_backward(p.mul_(-self.scale), log_q, -1, p.dtype, out=gradient)
        return loss

    def reverse_kl(self, gradient: torch.Tensor | None) -> torch.Tensor:
        work, log_q, log_p, q, restricted = self.buffers
        student = self.student_logits()
        if self.guards:  # the student restricted to the teacher's support
            student = restricted.copy_(student).masked_fill_(self.teacher == NEG_INF, NEG_INF)
        torch.log_softmax(student, -1, out=log_q)
        torch.softmax(student, -1, out=q)
        torch.log_softmax(self.teacher_logits(), -1, out=log_p)
        log_ratio = self.finite_log(log_q).sub_(self.finite_log(log_p))
        self.without_student_zeros(log_ratio)
        loss = row_sums(torch.mul(q, log_ratio, out=work))
        if gradient is not None:  # the slope is q log_ratio + q, and its second term cancels
            softmax_backward(log_ratio.mul_(self.scale), q, -1, q.dtype, grad_input=gradient)
        return loss

    def jensen_shannon(self, gradient: torch.Tensor | None) -> torch.Tensor:
        work, log_q, q, log_p, p = self.buffers
        (beta,) = self.parameters
        student = self.student_logits()
        torch.log_softmax(student, -1, out=log_q)
        torch.softmax(student, -1, out=q)
        teacher = self.teacher_logits()
        torch.log_softmax(teacher, -1, out=log_p)
        torch.softmax(teacher, -1, out=p)
        log_m = torch.lerp(q, p, beta, out=work).clamp_(min=torch.finfo(work.dtype).tiny).log_()
        log_ratio = self.without_student_zeros(self.finite_log(log_q).sub_(log_m))
        of_teacher = self.finite_log(log_p).sub_(log_m).mul_(p)
        loss = row_sums(torch.mul(q, log_ratio, out=work).lerp_(of_teacher, beta))
        if gradient is not None:
            log_ratio.mul_(self.scale * (1 - beta))
            softmax_backward(log_ratio, q, -1, q.dtype, grad_input=gradient)
        return loss

    def general(self, gradient: torch.Tensor | None) -> torch.Tensor:
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
            no_softmax = ~(student_max + teacher_max).isfinite()
            value = value.masked_fill(dead, 0.0).masked_fill(no_softmax, math.nan)
            slope = slope.masked_fill(dead, 0.0).masked_fill(no_softmax, math.nan)
        if gradient is not None:
            log_softmax_backward(slope * self.scale, log_q, -1, log_q.dtype, out=gradient)
        return row_sums(value)


CLOSED_FORMS = {
    "soft_cross_entropy": Chunk.soft_cross_entropy,
    "forward_kl": Chunk.forward_kl,
    "reverse_kl": Chunk.reverse_kl,
    "jensen_shannon": Chunk.jensen_shannon,
}
