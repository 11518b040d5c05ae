"""The recipes of the pages train on the next token: the losses of the logits, with Hugging Face's shift."""

import pytest
import torch
import torch.nn.functional as F

from distill_ops import distillation_loss
from tests.interface.test_pages import blocks
from tests.support import ROOT
from tests.support.recipes import READERS_OWN


def left_by(page: str, block: int) -> tuple[dict, dict]:
    """The reader's own names, made anew, and what a page's block leaves when run with them."""
    code = blocks((ROOT / page).read_text())[0][block]
    names = READERS_OWN[page]()
    exec(code, names)
    return READERS_OWN[page](), names


def head_gradient(model, loss):
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    return gradient


def next_tokens(own, student, teacher) -> tuple[torch.Tensor, ...]:
    """Logits of both models at every token but the last, and the labels of all but the first."""
    with torch.no_grad():
        of_teacher = teacher(own["ids"]).logits[:, :-1]
    return student(own["ids"]).logits[:, :-1], of_teacher, own["labels"][:, 1:]


def test_the_shift_is_that_of_hugging_face():
    own = READERS_OWN["docs/linear.md"]()
    found = own["student"](own["ids"], labels=own["labels"])
    loss = distillation_loss(
        found.logits[:, :-1], None, labels=own["labels"][:, 1:], hard_label_weight=1.0
    )
    torch.testing.assert_close(loss, found.loss)
    aligned = distillation_loss(found.logits, None, labels=own["labels"], hard_label_weight=1.0)
    assert abs(aligned - found.loss) > 1e-3


def test_minillm():
    own, left = left_by("README.md", 1)
    logits, teacher_logits, labels = next_tokens(own, own["model"], own["teacher_model"])
    kept = labels != -100
    log_q = logits.log_softmax(-1)
    per_token = -(teacher_logits.softmax(-1) * log_q).sum(-1)
    torch.testing.assert_close(left["distil_loss"], per_token[kept].mean())
    mixed = 0.5 * per_token[kept].mean() + 0.5 * F.cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(left["loss"], mixed)
    torch.testing.assert_close(
        left["model"].lm_head.weight.grad, head_gradient(own["model"], mixed)
    )


def test_a_loop_with_hidden_states():
    own, left = left_by("README.md", 2)
    student, teacher = own["student"], own["teacher"]
    for ids, _, labels in own["batches"]:
        batch = {"ids": ids, "labels": labels}
        logits, teacher_logits, labels = next_tokens(batch, student, teacher)
        loss = distillation_loss(
            logits, teacher_logits, labels=labels, divergence="reverse_kl", hard_label_weight=0.1
        )
        own["optimizer"].zero_grad()
        loss.backward()
        own["optimizer"].step()
    torch.testing.assert_close(left["loss"], loss)
    theirs, ours = (dict(x.named_parameters()) for x in (student, left["student"]))
    start = dict(READERS_OWN["README.md"]()["student"].named_parameters())
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, msg=name)
    assert (start["lm_head.weight"] - ours["lm_head.weight"]).abs().max() > 1e-3


def test_the_first_recipe_from_hidden_states():
    """Of a teacher in training, which gets no gradient."""
    own, left = left_by("docs/linear.md", 0)
    logits, teacher_logits, labels = next_tokens(own, own["student"], own["teacher"])
    loss = distillation_loss(
        logits, teacher_logits, labels=labels, divergence="jensen_shannon", hard_label_weight=0.1
    )
    torch.testing.assert_close(left["loss"], loss)
    assert all(parameter.grad is None for parameter in left["teacher"].parameters())
    ours = left["student"].lm_head.weight.grad
    torch.testing.assert_close(ours, head_gradient(own["student"], loss))


def test_the_recipe_for_sampled_tokens():
    own, left = left_by("docs/tokens.md", 0)
    log_q = own["student_logits"].log_softmax(-1)[:, :-1]
    expected = log_q.gather(-1, own["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(left["found"].student_log_prob, expected)
    assert left["loss"].item() == pytest.approx(
        (-((expected + 4).exp()) + left["found"].divergence - 0.01 * left["found"].student_entropy)
        .mean()
        .item()
    )
