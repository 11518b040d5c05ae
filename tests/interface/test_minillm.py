"""The drop-in against MiniLLM's own formula, restated in eager PyTorch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from distill_ops.integrations.minillm import get_distil_loss, get_mixed_loss

BATCH, SEQ, VOCAB = 2, 6, 50
NOT_PARALLEL = SimpleNamespace(model_parallel=False, kd_ratio=0.7)


class Teacher(torch.nn.Module):
    """An embedding table of logits; notes how it was called."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Embedding(VOCAB, VOCAB)
        self.dropout = torch.nn.Dropout(0.5)
        self.calls = []

    def forward(self, input_ids, use_cache=True):
        self.calls.append((self.training, torch.is_grad_enabled(), use_cache))
        return SimpleNamespace(logits=self.dropout(self.logits(input_ids)))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    teacher = Teacher().train()
    ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    labels = torch.randint(0, VOCAB, (BATCH, SEQ))
    labels[0, :3] = labels[1, -1] = -100
    logits = torch.randn(BATCH, SEQ, VOCAB)
    logits[0, 4, 7] = float("-inf")
    labels[0, 4] = 8  # not the column above
    return teacher, {"input_ids": ids}, {"label": labels}, logits.requires_grad_()


def eager_distil_loss(teacher, model_batch, no_model_batch, logits):
    probs = F.softmax(teacher.logits(model_batch["input_ids"]).detach().float(), -1)
    log_probs = F.log_softmax(logits.float(), -1)
    terms = torch.masked_fill(probs * log_probs, torch.isinf(logits), 0)
    mask = (no_model_batch["label"] != -100).int()
    return -(terms.sum(-1) * mask).sum() / mask.sum()


def test_get_distil_loss(problem):
    teacher, model_batch, no_model_batch, logits = problem
    loss = get_distil_loss(NOT_PARALLEL, None, None, teacher, model_batch, no_model_batch, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert teacher.calls == [(False, False, False)]  # eval mode, no_grad, no cache
    expected = eager_distil_loss(teacher, model_batch, no_model_batch, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    # the eager backward leaves NaN where 0 * -inf was masked after the fact; ours is 0 there
    kept = logits.isfinite()
    torch.testing.assert_close(gradient[kept], expected_gradient[kept], rtol=1e-5, atol=1e-8)
    assert gradient[0, 4, 7] == 0


def test_get_mixed_loss(problem):
    teacher, model_batch, no_model_batch, logits = problem
    result = get_mixed_loss(NOT_PARALLEL, teacher, model_batch, no_model_batch, logits)
    distil = eager_distil_loss(teacher, model_batch, no_model_batch, logits)
    lm = F.cross_entropy(logits.flatten(0, 1), no_model_batch["label"].flatten())
    torch.testing.assert_close(result.divergence, distil.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.hard_label, lm.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.loss, 0.3 * lm + 0.7 * distil, rtol=1e-6, atol=0)
    result.loss.backward()
    assert logits.grad.isfinite().all()


def test_the_teacher_rests_where_only_labels_count(problem):
    teacher, model_batch, no_model_batch, logits = problem
    result = get_mixed_loss(
        SimpleNamespace(kd_ratio=0.0), teacher, model_batch, no_model_batch, logits
    )
    assert teacher.calls == []
    assert result.loss == result.hard_label


def test_no_labelled_token(problem):
    teacher, model_batch, _, logits = problem
    labels = {"label": torch.full((BATCH, SEQ), -100)}
    loss = get_distil_loss(NOT_PARALLEL, None, None, teacher, model_batch, labels, logits)
    assert loss == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_model_parallel_needs_a_group(problem):
    """What it computes: tests/vocab_parallel."""
    teacher, model_batch, no_model_batch, logits = problem
    batch = model_batch, no_model_batch, logits
    args = SimpleNamespace(model_parallel=True, kd_ratio=0.5)
    with pytest.raises(ValueError, match=r"args.model_parallel is true, and .* pass group="):
        get_distil_loss(args, None, None, teacher, *batch)
    with pytest.raises(ValueError, match=r"args.model_parallel is true, and .* pass group="):
        get_mixed_loss(args, teacher, *batch)
    with pytest.raises(ValueError, match="group is given, but args.model_parallel is false"):
        get_distil_loss(NOT_PARALLEL, None, None, teacher, *batch, group=object())
    with pytest.raises(ValueError, match=r"kd_ratio must lie in \[0, 1\], got 2"):
        get_mixed_loss(SimpleNamespace(kd_ratio=2), teacher, model_batch, no_model_batch, logits)
