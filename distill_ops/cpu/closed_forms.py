"""The built-in divergences of a chunk of rows on the CPU, with as few passes over it as can be.

Each function takes a :class:`~distill_ops.cpu.chunk.Chunk` and returns the losses of its columns and
what writes the gradient to a matrix ``out`` (``slopes.py``), which may be the chunk's first buffer. What
the second needs lies in the other buffers, so the chunk itself is not read again: ``out`` may be the
student's logits, and it need not be called where a loss is not finite.

With ``D = sum(slope)`` the gradient is ``slope - q D``: the backward of log_softmax; and where
``slope = q h`` that of softmax, ``q (h - sum(q h))``. Neither changes by a constant in h, which are
left out there; a sum D of a part's columns has them.
"""

import torch

from ..divergences.base import is_number
from .chunk import NEG_INF, Chunk, Row, free_logarithms, probabilities, softmax
from .rows import row_sums
from .slopes import Slope, SlopeOfSoftmax, flat


def _student_log_softmax(chunk: Chunk, log: torch.Tensor, room: torch.Tensor):
    return chunk.log_softmax(
        chunk.student_logits(), log, room, "student_entropy", chunk.student_row
    )


def _teacher_log_softmax(chunk: Chunk, log: torch.Tensor, room: torch.Tensor):
    return chunk.log_softmax(
        chunk.teacher_logits(), log, room, "teacher_entropy", chunk.teacher_row
    )


def _minus_p(chunk: Chunk) -> Slope:
    """The slope of soft cross-entropy and forward KL alone; q lies where the gradient may go, or p where it
    was there before: that of a part is written over it."""
    q, p, *_ = chunk.buffers
    if chunk.filled:  # there lies p already, of these columns alone
        p.mul_(chunk.teacher_row.share / row_sums(p)[:, None])
    else:
        probabilities(chunk.teacher_logits(), p, chunk.teacher_row)
    probabilities(chunk.student_logits(), q, chunk.student_row)
    return Slope(lambda: p, -1.0, chunk.scale, q=q)


def soft_cross_entropy(chunk: Chunk):
    if chunk.lossless:
        return None, _minus_p(chunk)
    work, log_q, p, log_p, room = chunk.buffers
    q = _student_log_softmax(chunk, log_q, room)
    teacher = chunk.teacher_logits()
    probabilities(teacher, p, chunk.teacher_row)
    if chunk.seen is not None and chunk.seen.wants("teacher_entropy"):
        torch.sub(teacher, teacher.amax(-1, True), out=log_p)
        chunk.see_teacher(log_p, p, work, shift=p.amax(-1, True).log_())
    chunk.see_student(log_q, q, work)
    chunk.see_both(q, p, work)
    chunk.finite_log(log_q)
    chunk.without_student_zeros(p)
    loss = row_sums(torch.mul(p, log_q, out=work)).neg_()
    return loss, Slope(lambda: p, -1.0, chunk.scale, log_q, q)


def forward_kl(chunk: Chunk):
    if chunk.lossless:
        return None, _minus_p(chunk)
    work, log_q, log_p, p, room = chunk.buffers
    q = _student_log_softmax(chunk, log_q, room)
    softmax(chunk.teacher_logits(), p, log_p, chunk.teacher_row)
    chunk.see_student(log_q, q, work)
    chunk.see_teacher(log_p, p, work)
    chunk.see_both(q, p, work)
    chunk.without_student_zeros(p)
    loss = row_sums(chunk.finite_log(log_p).sub_(chunk.finite_log(log_q)).mul_(p))
    return loss, Slope(lambda: p, -1.0, chunk.scale, log_q, q)


def _restricted_student(chunk: Chunk, buffer: torch.Tensor) -> torch.Tensor:
    """The student's logits; with guards, restricted to the teacher's support."""
    student = chunk.student_logits()
    if not chunk.guards:
        return student
    return buffer.copy_(student).masked_fill_(chunk.teacher == NEG_INF, NEG_INF)


def reverse_kl(chunk: Chunk):
    work, log_q, log_p, q, other = chunk.buffers
    softmax(_restricted_student(chunk, other), q, log_q, chunk.student_row)
    p = _teacher_log_softmax(chunk, log_p, other)
    chunk.see_student(log_q, q, work)
    chunk.see_teacher(log_p, p, work)
    chunk.see_both(q, p, work)
    log_ratio = chunk.finite_log(log_q).sub_(chunk.finite_log(log_p))
    chunk.without_student_zeros(log_ratio)
    loss = None if chunk.lossless else row_sums(torch.mul(q, log_ratio, out=work))
    return loss, SlopeOfSoftmax(lambda: log_ratio, 1.0, chunk.scale, q, k=1.0, mean=loss)


def symmetric_kl(chunk: Chunk):
    work, log_q, log_p, q, p = chunk.buffers
    (weight,) = chunk.parameters
    softmax(_restricted_student(chunk, p), q, log_q, chunk.student_row)
    softmax(chunk.teacher_logits(), p, log_p, chunk.teacher_row)
    chunk.see_student(log_q, q, work)
    chunk.see_teacher(log_p, p, work)
    chunk.see_both(q, p, work)
    chunk.without_student_zeros(p)
    log_ratio = chunk.finite_log(log_q).sub_(chunk.finite_log(log_p))
    chunk.without_student_zeros(log_ratio)
    mixed = p.mul_(weight - 1).add_(torch.mul(q, weight, out=work))
    loss = None if chunk.lossless else row_sums(torch.mul(mixed, log_ratio, out=work))
    slope = lambda: mixed.add_(log_ratio.mul_(q).mul_(weight))
    return loss, Slope(slope, 1.0, chunk.scale, q=q)


def _softmax(
    logits: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, row: Row | None, asked: bool = True
) -> torch.Tensor:
    """Probabilities ``q``, of a :class:`Row` where they are asked for, and their logarithms but for a
    constant of each row, which is returned.

    PyTorch adds up the exponentials one by one and so loses the many small ones of a peaked row.
    Here q is over its own sum, and the constant the logarithm of the largest."""
    if asked or row is None:
        probabilities(logits, q, row)
    if row is None:
        q.div_(row_sums(q)[:, None])
    return free_logarithms(logits, q, log_q, row)


def _paired(chunk: Chunk, of_teacher, of_student, with_p: bool) -> tuple[torch.Tensor, ...]:
    """``max(log(p / q), 0)`` and ``min(log(p / q), 0)``, the logarithm of the mixture
    ``(of_teacher p + of_student q) / max(p, q)``, q, and p where it is asked for: the mixture from the
    ratio of p and q, as ``kernels/divergences.py`` has it."""
    log_m, log_q, log_p, q, p = chunk.buffers
    top_q = _softmax(chunk.student_logits(), q, log_q, chunk.student_row)
    top_p = _softmax(chunk.teacher_logits(), p, log_p, chunk.teacher_row, with_p)
    chunk.see_student(log_q, q, log_m, shift=top_q)
    chunk.see_teacher(log_p, p, log_m, shift=top_p)
    chunk.see_both(q, p, log_m)
    log_ratio = chunk.finite_log(log_p).sub_(chunk.finite_log(log_q)).add_(top_p.sub_(top_q))
    if is_number(of_teacher, 0.5):
        # by what the mixture is below 1: where p and q are nearly equal, it rounds to 1
        torch.abs(log_ratio, out=log_m).neg_().expm1_().mul_(0.5).log1p_()
    else:
        # the larger one's share as given: 1 less the other has fewer digits, and they are the mixture's
        # (torch.where, which would choose, takes twenty times as long as a product)
        share = torch.gt(log_ratio, 0, out=log_q).mul_(of_teacher)
        share.add_(torch.le(log_ratio, 0, out=log_m).mul_(of_student))
        torch.abs(log_ratio, out=log_m).neg_().exp_().lerp_(share.new_ones(()), share).log_()
    return torch.clamp(log_ratio, min=0, out=log_q), log_ratio.clamp_(max=0), log_m, q, p


def jensen_shannon(chunk: Chunk):
    (beta,) = chunk.parameters
    above, below, log_m, q, p = _paired(chunk, beta, 1 - beta, not chunk.lossless)
    of_student = above.add_(log_m)  # log(m / q)
    chunk.without_student_zeros(of_student)
    loss = student = None
    if not chunk.lossless:
        of_teacher = torch.sub(log_m, below, out=below)  # log(m / p)
        student = row_sums(torch.mul(q, of_student, out=log_m))
        teacher = row_sums(of_teacher.mul_(p))
        loss = (teacher * -flat(beta)).add_(student * (flat(beta) - 1))
    return loss, SlopeOfSoftmax(lambda: of_student, beta - 1, chunk.scale, q, mean=student)


def _rest(share):
    """``1 - share``, but not 0: a mixture of 0 has no logarithm."""
    rest = 1 - share
    return rest.clamp(min=1e-35) if isinstance(rest, torch.Tensor) else max(rest, 1e-35)


def skew_forward_kl(chunk: Chunk):
    (alpha,) = chunk.parameters
    free, below, log_m, q, p = _paired(chunk, alpha, _rest(alpha), not chunk.lossless)
    log_p_over_m = below.sub_(log_m)
    loss = None if chunk.lossless else row_sums(torch.mul(p, log_p_over_m, out=log_m))
    return loss, SlopeOfSoftmax(log_p_over_m.exp_, alpha - 1, chunk.scale, q, room=free)


def skew_reverse_kl(chunk: Chunk):
    (alpha,) = chunk.parameters
    above, free, log_m, q, _ = _paired(chunk, _rest(alpha), alpha, False)
    log_q_over_m = above.add_(log_m).neg_()
    chunk.without_student_zeros(log_q_over_m)
    loss = None if chunk.lossless else row_sums(torch.mul(q, log_q_over_m, out=log_m))

    def slope():  # over q, less 1
        share = torch.exp(log_q_over_m, out=free).mul_(alpha)
        return log_q_over_m.sub_(share)

    return loss, SlopeOfSoftmax(slope, 1.0, chunk.scale, q, room=free, k=1.0)


def total_variation(chunk: Chunk):
    work, q, p, log, scratch = chunk.buffers
    for see, logits, prob, row, names in (
        (chunk.see_student, chunk.student_logits, q, chunk.student_row, ("log_prob", "student_entropy")),
        (chunk.see_teacher, chunk.teacher_logits, p, chunk.teacher_row, ("teacher_entropy",)),
    ):  # fmt: skip
        x = logits()
        probabilities(x, prob, row)
        if chunk.seen is not None and chunk.seen.wants(*names):
            torch.sub(x, x.amax(-1, True), out=log)
            see(log, prob, scratch, shift=prob.amax(-1, True).log_())
    chunk.see_both(q, p, scratch)
    difference = torch.sub(q, p, out=p)
    loss = least = None
    if not chunk.lossless:
        loss = row_sums(torch.abs(difference, out=work)).mul_(0.5)
        least = (2 * loss - 1).clamp_(min=0)  # of sum(q sign(q - p))
    return loss, SlopeOfSoftmax(difference.sign_, 0.5, chunk.scale, q, room=work, near=least)


def alpha_beta(chunk: Chunk):
    cross, log_q, log_p, student, room = chunk.buffers
    alpha, beta = chunk.parameters
    total = alpha + beta
    q = _student_log_softmax(chunk, log_q, student)
    p = _teacher_log_softmax(chunk, log_p, room)
    chunk.see_student(log_q, q, cross)
    chunk.see_teacher(log_p, p, cross)
    chunk.see_both(q, p, cross)
    torch.mul(log_q, beta, out=student)
    torch.mul(log_p, alpha, out=cross).add_(student).exp_()
    torch.mul(log_q, total, out=student).exp_()
    loss = None
    if not chunk.lossless:
        teacher = log_p.mul_(total).exp_()
        values = torch.lerp(student, teacher, alpha / total, out=teacher).sub_(cross)
        loss = row_sums(values).div_(flat(alpha * beta))
    return loss, Slope(lambda: student.sub_(cross), 1 / alpha, chunk.scale, log_q)


CLOSED_FORMS = {
    form.__name__: form
    for form in (
        soft_cross_entropy, forward_kl, reverse_kl, symmetric_kl, jensen_shannon,
        skew_forward_kl, skew_reverse_kl, total_variation, alpha_beta,
    )
}  # fmt: skip
