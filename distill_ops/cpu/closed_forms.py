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
from .chunk import NEG_INF, Chunk, log_softmax_backward, row_sums, softmax_backward


def _subtract_mean_slope(slope: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> None:
    """``slope - q D``, of which no rounding of q's sum is left: the row sums to 0."""
    mean = row_sums(slope).div_(row_sums(q))[:, None]
    torch.addcmul(slope, q, mean, value=-1, out=out)


def soft_cross_entropy(chunk: Chunk):
    work, log_q, p, *_ = chunk.buffers
    torch.log_softmax(chunk.student_logits(), -1, out=log_q)
    torch.softmax(chunk.teacher_logits(), -1, out=p)
    chunk.finite_log(log_q)
    chunk.without_student_zeros(p)
    loss = row_sums(torch.mul(p, log_q, out=work)).neg_()
    return loss, lambda out: log_softmax_backward(p.mul_(-chunk.scale), log_q, -1, p.dtype, out=out)


def forward_kl(chunk: Chunk):
    _, log_q, log_p, p, _ = chunk.buffers
    torch.log_softmax(chunk.student_logits(), -1, out=log_q)
    teacher = chunk.teacher_logits()
    torch.log_softmax(teacher, -1, out=log_p)
    torch.softmax(teacher, -1, out=p)
    chunk.without_student_zeros(p)
    loss = row_sums(chunk.finite_log(log_p).sub_(chunk.finite_log(log_q)).mul_(p))
    return loss, lambda out: log_softmax_backward(p.mul_(-chunk.scale), log_q, -1, p.dtype, out=out)


def _restricted_student(chunk: Chunk, buffer: torch.Tensor) -> torch.Tensor:
    """The student's logits; with guards, restricted to the teacher's support."""
    student = chunk.student_logits()
    if not chunk.guards:
        return student
    return buffer.copy_(student).masked_fill_(chunk.teacher == NEG_INF, NEG_INF)


def reverse_kl(chunk: Chunk):
    work, log_q, log_p, q, other = chunk.buffers
    student = _restricted_student(chunk, other)
    torch.log_softmax(student, -1, out=log_q)
    torch.softmax(student, -1, out=q)
    torch.log_softmax(chunk.teacher_logits(), -1, out=log_p)
    log_ratio = chunk.finite_log(log_q).sub_(chunk.finite_log(log_p))
    chunk.without_student_zeros(log_ratio)
    loss = row_sums(torch.mul(q, log_ratio, out=work))
    return loss, lambda out: softmax_backward(
        log_ratio.mul_(chunk.scale), q, -1, q.dtype, grad_input=out
    )


def symmetric_kl(chunk: Chunk):
    work, log_q, log_p, q, p = chunk.buffers
    (weight,) = chunk.parameters
    torch.log_softmax(_restricted_student(chunk, p), -1, out=log_q)
    torch.log_softmax(chunk.teacher_logits(), -1, out=log_p)
    torch.exp(log_q, out=q)
    torch.exp(log_p, out=p)
    chunk.without_student_zeros(p)
    log_ratio = chunk.finite_log(log_q).sub_(chunk.finite_log(log_p))
    chunk.without_student_zeros(log_ratio)
    mixed = p.mul_(weight - 1).add_(torch.mul(q, weight, out=work))
    loss = row_sums(torch.mul(mixed, log_ratio, out=work))

    def write(out):
        slope = mixed.add_(log_ratio.mul_(q).mul_(weight)).mul_(chunk.scale)
        _subtract_mean_slope(slope, q, out)

    return loss, write


def _paired(chunk: Chunk, of_teacher, of_student) -> tuple[torch.Tensor, ...]:
    """``max(log(p / q), 0)`` and ``min(log(p / q), 0)``, the mixture
    ``(of_teacher p + of_student q) / max(p, q)``, q and p: the mixture from the ratio of p and q, as
    ``kernels/divergences.py`` has it."""
    m, log_q, log_p, q, p = chunk.buffers
    torch.log_softmax(chunk.student_logits(), -1, out=log_q)
    torch.log_softmax(chunk.teacher_logits(), -1, out=log_p)
    torch.exp(log_q, out=q)
    torch.exp(log_p, out=p)
    log_ratio = chunk.finite_log(log_p).sub_(chunk.finite_log(log_q))
    if is_number(of_teacher, 0.5):
        above, below = torch.clamp(log_ratio, min=0, out=log_q), log_ratio.clamp_(max=0)
        torch.sub(below, above, out=m).exp_().add_(1).mul_(0.5)
        return above, below, m, q, p
    # 1 - weight (1 - ratio), where the weight is the smaller one's: of two terms, one is exactly 0
    # (torch.where, which would choose, takes twenty times as long as a product)
    teacher = torch.clamp(log_ratio, max=0, out=log_q).exp_().sub_(1).mul_(of_teacher)
    student = torch.clamp(log_ratio, min=0, out=m).neg_().exp_().sub_(1).mul_(of_student)
    student.add_(teacher).add_(1)
    return torch.clamp(log_ratio, min=0, out=teacher), log_ratio.clamp_(max=0), m, q, p


def jensen_shannon(chunk: Chunk):
    (beta,) = chunk.parameters
    above, below, m, q, p = _paired(chunk, beta, 1 - beta)
    log_m = m.log_()
    of_student = above.add_(log_m)  # log(m / q)
    chunk.without_student_zeros(of_student)
    of_teacher = torch.sub(log_m, below, out=below)  # log(m / p)
    values = torch.lerp(of_teacher.mul_(p), torch.mul(q, of_student, out=m), 1 - beta, out=m)
    loss = row_sums(values).neg_()
    return loss, lambda out: softmax_backward(
        of_student.mul_((beta - 1) * chunk.scale), q, -1, q.dtype, grad_input=out
    )


def skew_forward_kl(chunk: Chunk):
    (alpha,) = chunk.parameters
    free, below, m, q, p = _paired(chunk, alpha, 1 - alpha)
    log_p_over_m = below.sub_(torch.log(m.clamp_(min=1e-35), out=free))
    loss = row_sums(torch.mul(p, log_p_over_m, out=m))

    def write(out):
        slope = log_p_over_m.exp_().mul_(q).mul_((alpha - 1) * chunk.scale)
        _subtract_mean_slope(slope, q, out)

    return loss, write


def skew_reverse_kl(chunk: Chunk):
    (alpha,) = chunk.parameters
    above, free, m, q, _ = _paired(chunk, 1 - alpha, alpha)
    log_q_over_m = above.add_(m.clamp_(min=1e-35).log_()).neg_()
    chunk.without_student_zeros(log_q_over_m)
    loss = row_sums(torch.mul(q, log_q_over_m, out=m))

    def write(out):
        share = torch.exp(log_q_over_m, out=free).mul_(alpha)
        softmax_backward(log_q_over_m.sub_(share).mul_(chunk.scale), q, -1, q.dtype, grad_input=out)

    return loss, write


def total_variation(chunk: Chunk):
    work, q, p, *_ = chunk.buffers
    torch.softmax(chunk.student_logits(), -1, out=q)
    torch.softmax(chunk.teacher_logits(), -1, out=p)
    difference = torch.sub(q, p, out=p)
    loss = row_sums(torch.abs(difference, out=work)).mul_(0.5)
    return loss, lambda out: softmax_backward(
        difference.sign_().mul_(0.5 * chunk.scale), q, -1, q.dtype, grad_input=out
    )


def alpha_beta(chunk: Chunk):
    cross, log_q, log_p, student, _ = chunk.buffers
    alpha, beta = chunk.parameters
    total = alpha + beta
    torch.log_softmax(chunk.student_logits(), -1, out=log_q)
    torch.log_softmax(chunk.teacher_logits(), -1, out=log_p)
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
