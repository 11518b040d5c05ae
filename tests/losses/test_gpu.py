"""The same cases on a GPU, at real sizes. The oracle sees only some rows: float64 is slow there."""

import pytest
import torch

from distill_ops import distillation_loss, reference, support_distillation_loss
from tests.support.cases import DIVERGENCES
from tests.support.helpers import (
    assert_close,
    assert_close_to_reference,
    condition,
    run_reference,
)

pytestmark = pytest.mark.gpu

ROWS = [0, 1, 131, 132, 1000, -1]  # the first and second row of a program, and the last of all


def logits(n_rows, n_cols, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    pair = torch.randn(2, n_rows, n_cols, generator=generator, device="cuda", dtype=dtype)
    return pair[0].mul_(3), pair[1].mul_(3)


def check_rows(student, teacher, **options):
    """Per-token losses and gradients of ROWS against the oracle on those rows alone."""
    options = {"reduction": "none", **options}
    labels = options.pop("labels", None)
    mine = {} if labels is None else {"labels": labels}
    theirs = {} if labels is None else {"labels": labels[ROWS]}
    leaf = student.detach().requires_grad_()
    loss = distillation_loss(leaf, teacher, backend="triton", **mine, **options)
    upstream = torch.rand(loss.shape, device="cuda") + 0.5
    loss.backward(upstream)

    def oracle(double):
        return run_reference(student[ROWS], teacher[ROWS], double=double, **theirs, **options)

    eager, truth = oracle(False), oracle(True)
    generator = torch.Generator().manual_seed(1)  # the upstream that ``run`` uses
    scale = (torch.rand(len(ROWS), generator=generator) + 0.5).cuda()
    ours = eager._replace(
        loss=loss.detach()[ROWS],
        gradient=(leaf.grad[ROWS].double() * (scale / upstream[ROWS])[:, None]).to(student.dtype),
    )
    assert_close_to_reference(ours, eager, truth, condition(student[ROWS], teacher[ROWS], options))


@pytest.mark.parametrize("n_cols", [32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_sizes(divergence, dtype, n_cols):
    student, teacher = logits(2048, n_cols, dtype)
    check_rows(student, teacher, divergence=divergence)
    check_rows(student, teacher, divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_hard_labels_and_infinities_at_a_real_size(divergence):
    student, teacher = logits(2048, 151936, torch.bfloat16)
    student[::2, 1000:1100] = float("-inf")
    teacher[::3, 500:90000] = float("-inf")
    labels = torch.randint(0, 500, (2048,), device="cuda")
    check_rows(student, teacher, divergence=divergence, labels=labels, hard_label_weight=0.5)


@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_more_than_two_to_the_31_elements(divergence):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    student, teacher = logits(16400, 151936, torch.bfloat16)
    check_rows(student, teacher, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_nothing_waits_for_the_gpu(divergence, gradient):
    student, teacher = logits(64, 32000, torch.bfloat16)
    student.requires_grad_()
    options = {
        "divergence": divergence, "gradient": gradient, "hard_label_weight": 0.5,
        "labels": torch.randint(0, 32000, (64,), device="cuda"),
        "loss_mask": torch.rand(64, device="cuda"),
        "normalizer": torch.tensor(64.0, device="cuda"),
    }  # fmt: skip
    distillation_loss(student, teacher, **options).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        distillation_loss(student, teacher, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_support_at_a_real_size():
    """As the three steps, which nothing waits for; and as the oracle on some rows."""
    student, teacher = logits(2048, 128256, torch.bfloat16)
    ids = student.topk(64).indices  # no two of them equal: any of equal ones may be chosen
    student.clamp_(max=5.9).scatter_(-1, ids, 6 + torch.arange(64).to(student).expand_as(ids) / 32)
    student.requires_grad_()
    options = {"divergence": "reverse_kl", "k": 64, "reduction": "none"}
    options["loss_mask"] = torch.rand(2048, device="cuda") + 0.5
    support_distillation_loss(student, teacher, **options).sum().backward()  # compiles
    student.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = support_distillation_loss(student, teacher, **options)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    options["loss_mask"] = options["loss_mask"][ROWS]
    found = []
    for double in (False, True):
        few, other = (x.detach()[ROWS] for x in (student, teacher))
        few, other = (few.double(), other.double()) if double else (few, other)
        few.requires_grad_()
        expected = reference.support_distillation_loss(few, other, **options)
        expected.sum().backward()
        found.append((expected.detach(), few.grad))
    for ours, eager, truth in zip((loss.detach(), student.grad), *found, strict=True):
        assert_close("a support", ours[ROWS], eager, truth, 8.0)


def test_cuda_graph():
    student, teacher = logits(64, 32000, torch.bfloat16)
    student.requires_grad_()

    def step():
        student.grad = None
        loss = distillation_loss(student, teacher)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = student.grad
    with torch.no_grad():
        student.copy_(logits(64, 32000, torch.bfloat16, seed=3)[0])
    graph.replay()
    fresh = student.detach().clone().requires_grad_()
    expected = distillation_loss(fresh, teacher)
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(captured, fresh.grad)


def test_memory_is_the_gradient():
    student, teacher = logits(4096, 128256, torch.bfloat16)
    student.requires_grad_()
    distillation_loss(student[:8], teacher[:8]).backward()
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distillation_loss(student, teacher).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= student.numel() * 2 + 64 * len(student)
