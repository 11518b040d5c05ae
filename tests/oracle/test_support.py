"""The reference of K tokens a row, against values and formulas by hand."""

import math

import pytest
import torch

from distill_ops.reference import (
    distillation_loss,
    gather_log_probs,
    support_distillation_loss,
    topk_distillation_loss,
)

INF, NAN = math.inf, math.nan
STUDENT = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.5, 1.5, 0.0, -0.5, 2.0]], dtype=torch.float64)


def softmax(row, temperature=1.0):
    """Of a list of numbers, by the math module."""
    weights = [math.exp(x / temperature) for x in row]
    return [w / sum(weights) for w in weights]


Q, P = softmax(STUDENT[0].tolist()), softmax(TEACHER[0].tolist())


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def test_log_probs_by_hand():
    found = gather_log_probs(TEACHER, torch.tensor([[4, 1, -1, 4]]), temperature=2.0)
    p = softmax(TEACHER[0].tolist(), 2.0)
    expected = [math.log(p[4]), math.log(p[1]), -INF, math.log(p[4])]
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
    few = gather_log_probs(TEACHER, torch.tensor([[1]]), vocab_size=3)
    p = softmax(TEACHER[0, :3].tolist())
    assert few.item() == pytest.approx(math.log(p[1]), abs=1e-14)
    half = gather_log_probs(TEACHER.half(), torch.tensor([[1]]))
    assert half.dtype == torch.float32


def test_rows_without_a_softmax_and_rows_that_are_not_read():
    logits = TEACHER.repeat(5, 1)
    logits[0, 2], logits[1, 2], logits[2], logits[3, 1] = NAN, INF, -INF, -INF
    ids = torch.tensor([[1, -1]]).repeat(5, 1)
    found = gather_log_probs(logits, ids)
    assert found[:3, 0].isnan().all()
    assert found[3, 0] == -INF
    assert (found[:, 1] == -INF).all()
    mask = torch.tensor([0.0, 0, 0, 1, 1])
    masked = gather_log_probs(logits, ids, loss_mask=mask)
    assert (masked[:4] == -INF).all()
    assert masked[4, 0] == found[4, 0]


def test_the_student_s_two_by_hand():
    """Ids 1 and 0, and the rest as one outcome; with the teacher's two, 4 and 1."""
    for support, (i, j) in (("student", (1, 0)), ("teacher", (4, 1))):
        q, p = ([x[i], x[j], 1 - x[i] - x[j]] for x in (Q, P))
        for divergence, expected in (("reverse_kl", kl(q, p)), ("forward_kl", kl(p, q))):
            loss = support_distillation_loss(
                STUDENT, TEACHER, k=2, support=support, divergence=divergence
            )
            assert loss.item() == pytest.approx(expected, abs=1e-14)
    q, p = ([x[1] / (x[1] + x[0]), x[0] / (x[1] + x[0])] for x in (Q, P))
    within = support_distillation_loss(
        STUDENT, TEACHER, k=2, tail="renormalize", divergence="reverse_kl"
    )
    assert within.item() == pytest.approx(kl(q, p), abs=1e-14)


def test_no_gradient_flows_through_the_choice():
    """It is that of the top-k loss with the K as constants; the teacher's logits get none."""
    grads = []
    for given in (
        None,
        (gather_log_probs(TEACHER, torch.tensor([[1, 0, 3]])), torch.tensor([[1, 0, 3]])),
    ):
        leaf = STUDENT.clone().requires_grad_()
        if given is None:
            loss = support_distillation_loss(leaf, TEACHER, k=3, divergence="jensen_shannon")
        else:
            loss = topk_distillation_loss(leaf, *given, divergence="jensen_shannon")
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_every_column_is_the_dense_loss():
    for divergence in ("reverse_kl", "total_variation"):
        loss = support_distillation_loss(STUDENT, TEACHER, k=5, divergence=divergence)
        dense = distillation_loss(STUDENT, TEACHER, divergence=divergence)
        torch.testing.assert_close(loss, dense, rtol=1e-13, atol=0)


def test_columns_that_cannot_be_chosen():
    """-inf: fewer outcomes; beyond the vocabulary: none."""
    student = torch.cat([STUDENT, torch.full((1, 1), 9.0)], -1)
    student[0, 1] = -INF
    teacher = torch.cat([TEACHER, torch.full((1, 1), NAN)], -1)
    loss = support_distillation_loss(student, teacher, k=5, vocab_size=5, divergence="reverse_kl")
    dense = distillation_loss(student, teacher, vocab_size=5, divergence="reverse_kl")
    torch.testing.assert_close(loss, dense, rtol=1e-13, atol=0)
