"""Which gradients the linear loss makes, when, and over micro-batches."""

import pytest
import torch

from distill_ops import linear_distillation_loss
from tests.support.cases import FLOAT_MASK, LABELS
from tests.support.linear_cases import check, count_products, make_pair, run

pytest.importorskip("triton")


FROZEN = {
    (): 2,
    ("student_hidden",): 3,
    ("student_weight",): 3,
    ("student_bias",): 2,
    ("student_hidden", "student_weight", "student_bias"): 4,
}


@pytest.mark.parametrize("names", FROZEN, ids=str)
def test_only_wanted_gradients_are_made(names, backend, device, monkeypatch):
    """Four products; six where the backward forms the logits again; two without a gradient."""
    pair = make_pair(bias=True, device=device)
    if not names:
        calls = count_products(monkeypatch)
        linear_distillation_loss(*pair[:4], backend=backend)
        assert len(calls) == 2
        return
    check(pair, names, backend=backend)
    calls = count_products(monkeypatch)
    run(linear_distillation_loss, pair, names, backend=backend)
    assert len(calls) == FROZEN[names]
    calls.clear()
    run(linear_distillation_loss, pair, names, backend=backend, gradient="backward")
    assert len(calls) == 2 + FROZEN[names]


def test_no_products_of_a_teacher_that_has_no_share(backend, device, monkeypatch):
    pair, calls = make_pair(device=device), count_products(monkeypatch)
    labels = LABELS.to(device)
    ours = run(
        linear_distillation_loss, pair, labels=labels, hard_label_weight=1.0, backend=backend
    )
    assert len(calls) == 3
    alone = pair._replace(teacher_hidden=None, teacher_weight=None)
    expected = run(
        linear_distillation_loss, alone, labels=labels, hard_label_weight=1.0, backend=backend
    )
    assert torch.equal(ours.loss, expected.loss)


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_both_gradient_modes_give_the_same_bits(masked, factor, backend, device):
    pair = make_pair(bias=True, device=device)
    options = {"loss_mask": FLOAT_MASK.to(device)} if masked else {}
    results = []
    for mode in ("forward", "backward"):
        leaves = pair.trained(pair.student)
        loss = linear_distillation_loss(
            *leaves[:4], student_bias=leaves.student_bias, gradient=mode, backend=backend, **options
        )
        (loss * factor).backward()
        results.append([loss.detach(), *(getattr(leaves, name).grad for name in pair.student)])
    (loss, *forward), (other_loss, *backward) = results
    assert all(torch.equal(x, y) for x, y in zip(forward, backward, strict=True))
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=0)  # its sweep differs


def test_without_a_gradient_the_loss_is_the_same(backend, device):
    pair = make_pair(bias=True, device=device)
    expected = run(
        linear_distillation_loss, pair, divergence="jensen_shannon", backend=backend
    ).loss
    leaves = pair.trained(pair.student)
    with torch.no_grad():
        loss = linear_distillation_loss(
            *leaves[:4], student_bias=leaves.student_bias, teacher_bias=leaves.teacher_bias,
            divergence="jensen_shannon", backend=backend,
        )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert not loss.requires_grad


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_backward_twice(mode, backend, device):
    leaves = make_pair(device=device).trained(("student_hidden", "student_weight"))
    loss = linear_distillation_loss(*leaves[:4], gradient=mode, backend=backend)
    loss.backward(retain_graph=True)
    once = leaves.student_hidden.grad.clone()
    if mode == "forward":
        with pytest.raises(
            RuntimeError, match="linear_distillation_loss was .* gradient='backward'"
        ):
            loss.backward()
    else:
        loss.backward()
        torch.testing.assert_close(leaves.student_hidden.grad, 2 * once)


@pytest.mark.parametrize("normalizer", [7, torch.tensor(7.0)], ids=["number", "tensor"])
def test_accumulation_over_micro_batches_equals_one_batch(normalizer, backend, device):
    pair = make_pair((8,), device=device)
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    options = {"normalizer": normalizer, "backend": backend}
    whole = run(linear_distillation_loss, pair, upstream_seed=None, **options)
    total = torch.zeros_like(pair.student_weight)
    for rows in (slice(0, 3), slice(3, 8)):
        part = pair._replace(
            student_hidden=pair.student_hidden[rows], teacher_hidden=pair.teacher_hidden[rows]
        )
        total += run(linear_distillation_loss, part, upstream_seed=None, **options).gradients[
            "student_weight"
        ]
    torch.testing.assert_close(total, whole.gradients["student_weight"], rtol=1e-5, atol=1e-7)


def test_float16_gradients_survive_a_loss_scale(backend, device):
    pair = make_pair((8,), 128, dtype=torch.float16, device=device)
    options = {"normalizer": 8192.0 * 512, "backend": backend}
    leaves = pair.trained(("student_hidden", "student_weight"))
    (linear_distillation_loss(*leaves[:4], **options) * 2.0**20).backward()
    wide = pair.map(torch.Tensor.double).trained(("student_hidden", "student_weight"))
    (linear_distillation_loss(*wide[:4], normalizer=options["normalizer"]) * 2.0**20).backward()
    for name in ("student_hidden", "student_weight"):
        expected = getattr(wide, name).grad
        error = (getattr(leaves, name).grad.double() - expected).norm() / expected.norm()
        assert error < torch.finfo(torch.float16).eps
