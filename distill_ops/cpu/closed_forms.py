"""The built-in divergences of a chunk of rows on the CPU, with as few passes over it as can be.

Each function takes a :class:`~distill_ops.cpu.chunk.Chunk` and returns the rows' losses and a function
that writes the gradient to a matrix ``out``, which may be the chunk's first buffer. What the second
needs lies in the other buffers, so the chunk itself is not read again: ``out`` may be the student's
logits, and it need not be called where a loss is not finite.

With ``D = sum(slope)`` the gradient is ``slope - q D``: the backward of log_softmax; and where
``slope = q h`` that of softmax, ``q (h - sum(q h))``. Neither changes by a constant in h.
"""

import torch

from ..divergences.base import is_number
from .chunk import NEG_INF, Chunk, log_softmax_backward, softmax, softmax_backward
from .rows import row_sums


def _subtract_mean_slope(slope: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> None:
    """``slope - q D``, of which no rounding of q's sum is left: the row sums to 0."""
    mean = row_sums(slope).div_(row_sums(q))[:, None]
    torch.addcmul(slope, q, mean, value=-1, out=out)


def _subtract_mean(h: torch.Tensor, mean: torch.Tensor, scale, q: torch.Tensor, out: torch.Tensor):
    """``scale q (h - sum(q h))``, over h. In a peaked row the two nearly cancel, and what rounded q and
    the sum would be all that is left: ``mean``, about that sum, goes first."""
    if isinstance(scale, torch.Tensor):
        h.sub_(mean[:, None]).mul_(scale)
    else:
        torch.add(mean[:, None] * -scale, h, alpha=scale, out=h)
    softmax_backward(h, q, -1, q.dtype, grad_input=out)


def _subtract_slope(
    slope: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor | None, out: torch.Tensor
) -> None:
    """``slope - q sum(slope)``, of q where a token output made it."""
    if q is None:
        log_softmax_backward(slope, log_q, -1, slope.dtype, out=out)
    else:
        torch.addcmul(slope, q, row_sums(slope)[:, None], value=-1, out=out)


def soft_cross_entropy(chunk: Chunk):
    work, log_q, p, log_p, room = chunk.buffers
    q = chunk.log_softmax(chunk.student_logits(), log_q, room, "student_entropy")
    teacher = chunk.teacher_logits()
    torch.softmax(teacher, -1, out=p)
    if chunk.seen is not None and chunk.seen.wants("teacher_entropy"):
        torch.sub(teacher, teacher.amax(-1, True), out=log_p)
        chunk.see_teacher(log_p, p, work, shift=p.amax(-1, True).log_())
    chunk.see_student(log_q, q, work)
    chunk.see_both(q, p, work)
    chunk.finite_log(log_q)
    chunk.without_student_zeros(p)
    loss = row_sums(torch.mul(p, log_q, out=work)).neg_()
    return loss, lambda out: _subtract_slope(p.mul_(-chunk.scale), log_q, q, out)


def forward_kl(chunk: Chunk):
    work, log_q, log_p, p, room = chunk.buffers
    q = chunk.log_softmax(chunk.student_logits(), log_q, room, "student_entropy")
    softmax(chunk.teacher_logits(), p, log_p)
    chunk.see_student(log_q, q, work)
    chunk.see_teacher(log_p, p, work)
    chunk.see_both(q, p, work)
    chunk.without_student_zeros(p)
    loss = row_sums(chunk.finite_log(log_p).sub_(chunk.finite_log(log_q)).mul_(p))
    return loss, lambda out: _subtract_slope(p.mul_(-chunk.scale), log_q, q, out)


def _restricted_student(chunk: Chunk, buffer: torch.Tensor) -> torch.Tensor:
    """The student's logits; with guards, restricted to the teacher's support."""
    student = chunk.student_logits()
    if not chunk.guards:
        return student
    return buffer.copy_(student).masked_fill_(chunk.teacher == NEG_INF, NEG_INF)


def reverse_kl(chunk: Chunk):
    work, log_q, log_p, q, other = chunk.buffers
    softmax(_restricted_student(chunk, other), q, log_q)
    p = chunk.log_softmax(chunk.teacher_logits(), log_p, other, "teacher_entropy")
    chunk.see_student(log_q, q, work)
    chunk.see_teacher(log_p, p, work)
    chunk.see_both(q, p, work)
    log_ratio = chunk.finite_log(log_q).sub_(chunk.finite_log(log_p))
    chunk.without_student_zeros(log_ratio)
    loss = row_sums(torch.mul(q, log_ratio, out=work))
    return loss, lambda out: _subtract_mean(log_ratio, loss, chunk.scale, q, out)


def symmetric_kl(chunk: Chunk):
    work, log_q, log_p, q, p = chunk.buffers
    (weight,) = chunk.parameters
    softmax(_restricted_student(chunk, p), q, log_q)
    softmax(chunk.teacher_logits(), p, log_p)
    chunk.see_student(log_q, q, work)
    chunk.see_teacher(log_p, p, work)
    chunk.see_both(q, p, work)
    chunk.without_student_zeros(p)
    log_ratio = chunk.finite_log(log_q).sub_(chunk.finite_log(log_p))
    chunk.without_student_zeros(log_ratio)
    mixed = p.mul_(weight - 1).add_(torch.mul(q, weight, out=work))
    loss = row_sums(torch.mul(mixed, log_ratio, out=work))

    def write(out):
        slope = mixed.add_(log_ratio.mul_(q).mul_(weight)).mul_(chunk.scale)
        _subtract_mean_slope(slope, q, out)

    return loss, write


def _softmax(logits: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Probabilities ``q`` and their logarithms but for a constant of each row, which is returned.

    PyTorch adds up the exponentials one by one and so loses the many small ones of a peaked row.
    Here q is over its own sum, and the constant the logarithm of the largest."""
    torch.softmax(logits, -1, out=q)
    q.div_(row_sums(q)[:, None])
    torch.sub(logits, logits.amax(-1, True), out=log_q)
    return q.amax(-1, True).log_()


def _paired(chunk: Chunk, of_teacher, of_student) -> tuple[torch.Tensor, ...]:
    """``max(log(p / q), 0)`` and ``min(log(p / q), 0)``, the logarithm of the mixture
    ``(of_teacher p + of_student q) / max(p, q)``, q and p: the mixture from the ratio of p and q, as
    ``kernels/divergences.py`` has it."""
    log_m, log_q, log_p, q, p = chunk.buffers
    top_q = _softmax(chunk.student_logits(), q, log_q)
    top_p = _softmax(chunk.teacher_logits(), p, log_p)
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
    above, below, log_m, q, p = _paired(chunk, beta, 1 - beta)
    of_student = above.add_(log_m)  # log(m / q)
    chunk.without_student_zeros(of_student)
    of_teacher = torch.sub(log_m, below, out=below)  # log(m / p)
    student = row_sums(torch.mul(q, of_student, out=log_m))
    teacher = row_sums(of_teacher.mul_(p))
    b = beta.squeeze(-1) if isinstance(beta, torch.Tensor) else beta
    loss = (teacher * -b).add_(student * (b - 1))
    return loss, lambda out: _subtract_mean(of_student, student, (beta - 1) * chunk.scale, q, out)


def _rest(share):
    """``1 - share``, but not 0: a mixture of 0 has no logarithm."""
    rest = 1 - share
    return rest.clamp(min=1e-35) if isinstance(rest, torch.Tensor) else max(rest, 1e-35)


def skew_forward_kl(chunk: Chunk):
    (alpha,) = chunk.parameters
    free, below, log_m, q, p = _paired(chunk, alpha, _rest(alpha))
    log_p_over_m = below.sub_(log_m)
    loss = row_sums(torch.mul(p, log_p_over_m, out=log_m))

    def write(out):
        p_over_m = log_p_over_m.exp_()
        mean = row_sums(torch.mul(q, p_over_m, out=free))
        _subtract_mean(p_over_m, mean, (alpha - 1) * chunk.scale, q, out)

    return loss, write


def skew_reverse_kl(chunk: Chunk):
    (alpha,) = chunk.parameters
    above, free, log_m, q, _ = _paired(chunk, _rest(alpha), alpha)
    log_q_over_m = above.add_(log_m).neg_()
    chunk.without_student_zeros(log_q_over_m)
    loss = row_sums(torch.mul(q, log_q_over_m, out=log_m))

    def write(out):
        share = torch.exp(log_q_over_m, out=free).mul_(alpha)
        h = log_q_over_m.sub_(share)
        _subtract_mean(h, row_sums(torch.mul(q, h, out=free)), chunk.scale, q, out)

    return loss, write


def total_variation(chunk: Chunk):
    work, q, p, log, scratch = chunk.buffers
    for see, logits, prob, names in (
        (chunk.see_student, chunk.student_logits, q, ("log_prob", "student_entropy")),
        (chunk.see_teacher, chunk.teacher_logits, p, ("teacher_entropy",)),
    ):
        x = logits()
        torch.softmax(x, -1, out=prob)
        if chunk.seen is not None and chunk.seen.wants(*names):
            torch.sub(x, x.amax(-1, True), out=log)
            see(log, prob, scratch, shift=prob.amax(-1, True).log_())
    chunk.see_both(q, p, scratch)
    difference = torch.sub(q, p, out=p)
    loss = row_sums(torch.abs(difference, out=work)).mul_(0.5)

    def write(out):
        least = (2 * loss - 1).clamp_(min=0)  # of sum(q sign(q - p))
        _subtract_mean(difference.sign_(), least, 0.5 * chunk.scale, q, out)

    return loss, write


def alpha_beta(chunk: Chunk):
    cross, log_q, log_p, student, room = chunk.buffers
    alpha, beta = chunk.parameters
    total = alpha + beta
    q = chunk.log_softmax(chunk.student_logits(), log_q, student, "student_entropy")
    p = chunk.log_softmax(chunk.teacher_logits(), log_p, room, "teacher_entropy")
    chunk.see_student(log_q, q, cross)
    chunk.see_teacher(log_p, p, cross)
    chunk.see_both(q, p, cross)
    torch.mul(log_q, beta, out=student)
    torch.mul(log_p, alpha, out=cross).add_(student).exp_()
    torch.mul(log_q, total, out=student).exp_()
    teacher = log_p.mul_(total).exp_()
    values = torch.lerp(student, teacher, alpha / total, out=teacher).sub_(cross)
    scale = alpha * beta
    loss = row_sums(values).div_(scale.squeeze(-1) if isinstance(scale, torch.Tensor) else scale)
    slope = student.sub_(cross)
    return loss, lambda out: log_softmax_backward(
        slope.mul_(chunk.scale / alpha), log_q, -1, slope.dtype, out=out
    )


CLOSED_FORMS = {
    form.__name__: form
    for form in (
        soft_cross_entropy, forward_kl, reverse_kl, symmetric_kl, jensen_shannon,
        skew_forward_kl, skew_reverse_kl, total_variation, alpha_beta,
    )
}  # fmt: skip
