"""The top-k loss against its float64 oracle: every divergence, tail, option, shape and path."""

import pytest
import torch

from tests.support import ROOT, declared
from tests.support.cases import DIVERGENCES, OPTIONS, TOKENS, VIEWS
from tests.support.helpers import (
    assert_close,
    check_topk,
    make_logits,
    moved,
    run,
    run_reference,
    topk_of,
)

pytest.importorskip("triton")

from distill_ops import (
    AlphaBeta,
    JensenShannon,
    ReverseKL,
    SkewReverseKL,
    SymmetricKL,
    distillation_loss,
    reference,
    topk_distillation_loss,
)

TAILS = ("bucket", "renormalize", "ignore", "restrict", "drop")
EVERY = [*DIVERGENCES, declared.renyi_like(), declared.chi_squared()]
by_name = pytest.mark.parametrize("divergence", EVERY, ids=lambda d: str(d)[:40])
by_tail = pytest.mark.parametrize("tail", TAILS)
# of each way that a row can go: additive terms outside, restricted to the K, every column an outcome
SOME = [JensenShannon(0.3), SymmetricKL(0.3), AlphaBeta(0.2, 0.7)]


def make_topk(shape, k, temperature=1.0, seed=0, dtype=torch.float32, device="cpu"):
    student, teacher = make_logits(shape, seed=seed, dtype=dtype, device=device)
    return student, *topk_of(teacher.float(), k, temperature)


@pytest.mark.covering("divergence", "tail")
@by_tail
@by_name
def test_value_and_gradient(divergence, tail, backend, device):
    inputs = make_topk((3, 21), 5, device=device)
    check_topk(*inputs, divergence=divergence, tail=tail, backend=backend)


@pytest.mark.covering("divergence k", "tail")
@by_tail
@pytest.mark.parametrize("k", [1, 21])  # the latter all columns: no rest
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_one_slot_and_all(divergence, k, tail, backend, device):
    inputs = make_topk((2, 21), k, device=device)
    check_topk(*inputs, divergence=divergence, tail=tail, backend=backend)


@by_tail
@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(0.3)], ids=str)
def test_terms_of_peaked_rows_are_not_rounded(divergence, tail):
    """A gradient is small against its terms there: the CPU path's error is a fraction of eager's."""
    student, teacher = make_logits((64, 1000), scale=6.0, offset=10.0)
    log_p, ids = topk_of(teacher, 32)
    options = {"divergence": divergence, "teacher_ids": ids, "tail": tail, "reduction": "none"}
    ours = run(topk_distillation_loss, student, log_p, backend="torch", **options)
    oracle = reference.topk_distillation_loss
    eager, truth = (
        run_reference(student, log_p, double=double, oracle=oracle, **options)
        for double in (False, True)
    )
    error, of_eager = ((x.gradient - truth.gradient).norm() for x in (ours, eager))
    assert error < of_eager / 4


SHARED = {name: x for name, x in OPTIONS.items() if "infinities" not in x}


# those that meet other code in the rows' other ways
MIXED = ("low_temperature", "float_mask_none", "hard_temperature", "hard_backward", "hard_none")
CASES = [(SOME[0], "bucket", name) for name in SHARED]
CASES += [(SOME[1], "ignore", name) for name in MIXED]
CASES += [(SOME[2], "renormalize", name) for name in MIXED]
CASES += [(SOME[0], "restrict", name) for name in MIXED[::2]]
CASES += [(SOME[1], "drop", name) for name in MIXED[1::2]]


@pytest.mark.parametrize(("divergence", "tail", "option"), CASES, ids=str)
def test_options(divergence, tail, option, backend, device):
    options = moved(SHARED[option], device)
    if "ignore_index" in options:
        options["labels"] = options["labels"].clamp(min=0)
    student, log_p, ids = make_topk(
        (*TOKENS, 29), 5, options.get("temperature", 1.0), device=device
    )
    ids[0, 0, 1], ids[1, 2, 4] = -1, -1
    student = torch.cat([student, student[..., :4]], -1)  # columns that vocab_size cuts off
    n_cols = options.setdefault("vocab_size", 29)
    ours = check_topk(
        student, log_p, ids, divergence=divergence, tail=tail, backend=backend, **options
    )
    assert (ours.gradient[..., n_cols:] == 0).all()


@pytest.mark.covering("divergence tail", "tail temperature")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "ignore", "restrict", "drop"])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_labels_inside_and_outside_the_k(divergence, tail, temperature, backend, device):
    student, log_p, ids = make_topk((4, 40), 6, device=device)
    labels = torch.stack([ids[0, 2], ids[1, 5], ids[2, 0], ids[3, 1]])
    outside = [next(c for c in range(40) if c not in row) for row in ids.tolist()]
    labels[1::2] = torch.tensor(outside, device=device)[1::2]
    check_topk(
        student, log_p, ids, divergence=divergence, tail=tail, labels=labels,
        hard_label_weight=0.4, temperature=temperature, backend=backend,
    )  # fmt: skip


# V: less than a vector; one tile and a tail; several tiles and a tail, odd; whole tiles
@pytest.mark.covering("dtype n_cols", "divergence")
@pytest.mark.parametrize("n_cols", [7, 1031, 4099, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", SOME[::2], ids=str)
def test_shapes_and_dtypes(divergence, dtype, n_cols, backend, device):
    student, log_p, ids = make_topk((2, n_cols), 6, dtype=dtype, seed=n_cols, device=device)
    check_topk(student, log_p, ids, divergence=divergence, tail="ignore", backend=backend)


@pytest.mark.parametrize(
    ("divergence", "tail"), [(SOME[0], "bucket"), (SOME[2], "ignore")], ids=str
)
def test_more_rows_than_programs(divergence, tail, backend, device):
    """A program's scratch memory serves one row after the other."""
    n_rows = 19 if device == "cpu" else 4099
    student, log_p, ids = make_topk((n_rows, 40), 5, device=device)
    ids[::4, 1] = -1
    check_topk(student, log_p, ids, divergence=divergence, tail=tail, backend=backend)


@pytest.mark.parametrize("k", [63, 64, 1024])
def test_many_slots(k, backend, device):
    student, log_p, ids = make_topk((2, 2500), k, dtype=torch.bfloat16, device=device)
    ids[0, ::3] = -1
    check_topk(student, log_p, ids, divergence="skew_reverse_kl", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_teacher(dtype, backend, device):
    student, log_p, ids = make_topk((3, 50), 5, device=device)
    check_topk(student, log_p.to(dtype), ids.int(), divergence="forward_kl", backend=backend)


@pytest.mark.covering("divergence tail")
@by_tail
@by_name
def test_float64(divergence, tail):
    student, log_p, ids = (
        x.double() if x.is_floating_point() else x for x in make_topk((3, 40), 5)
    )
    log_p[1, 2], ids[2, 3] = -torch.inf, -1
    labels = torch.tensor([3, 0, 7])
    options = {"divergence": divergence, "tail": tail, "teacher_ids": ids, "temperature": 1.3}
    options |= {"labels": labels, "hard_label_weight": 0.3, "reduction": "none"}
    ours = run(topk_distillation_loss, student, log_p, **options)
    truth = run(reference.topk_distillation_loss, student, log_p, **options)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours.gradient, truth.gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_all_columns_are_the_dense_loss(divergence, tail, backend, device):
    student, teacher = make_logits((3, 17), device=device)
    log_p, ids = topk_of(teacher, 17)
    options = {"divergence": divergence, "backend": backend, "reduction": "none"}
    ours = run(topk_distillation_loss, student, log_p, teacher_ids=ids, tail=tail, **options)
    dense = run(distillation_loss, student, teacher, **options)
    eps = 20 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.loss, dense.loss, rtol=eps, atol=0)
    floor = eps * dense.gradient.abs().max().item()
    torch.testing.assert_close(ours.gradient, dense.gradient, rtol=0, atol=floor)


@pytest.mark.parametrize(("n_cols", "gradient"), [(24, "forward"), (37, "backward")])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(n_cols, gradient, view, backend, device):
    student, log_p, ids = make_topk((2, 6, n_cols), 3, device=device)
    if view == "strided_columns":
        student = VIEWS[view](student)
    else:
        student, log_p, ids = (VIEWS[view](x) for x in (student, log_p, ids))
    check_topk(student, log_p, ids, gradient=gradient, backend=backend)


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_shapes(leading, reduction, backend, device):
    inputs = make_topk((*leading, 19), 4, device=device)
    ours = check_topk(*inputs, divergence="reverse_kl", reduction=reduction, backend=backend)
    assert ours.gradient.shape == inputs[0].shape


@pytest.mark.parametrize(("shape", "tail"), [((), "bucket"), (TOKENS, "ignore")], ids=str)
@pytest.mark.parametrize("kind", [JensenShannon, SymmetricKL, SkewReverseKL, declared.renyi_like])
def test_parameters_as_tensors(kind, tail, shape, backend, device):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    student, log_p, ids = make_topk((*TOKENS, 33), 5, device=device)
    mask = torch.tensor([[1.0, 0, 2], [1, 1, 0.5]], device=device)
    check_topk(
        student, log_p, ids, divergence=kind(values.to(device)), tail=tail, loss_mask=mask,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_components(reduction, weight, backend, device):
    student, log_p, ids = make_topk((4, 33), 5, 2.0, device=device)
    options = {
        "labels": torch.tensor([0, 8, -100, 4], device=device), "hard_label_weight": weight,
        "reduction": reduction, "temperature": 2.0, "scale_by_temperature_squared": True,
        "return_components": True, "divergence": "reverse_kl",
    }  # fmt: skip
    teacher = (None, None) if weight == 1 else (log_p, ids)
    student.requires_grad_()
    ours = topk_distillation_loss(student, *teacher, backend=backend, **options)
    eager = reference.topk_distillation_loss(student, *teacher, **options)
    truth = reference.topk_distillation_loss(student.double(), *teacher, **options)
    assert ours.loss.requires_grad
    assert not ours.divergence.requires_grad
    for name, mine, theirs, true in zip(ours._fields, ours, eager, truth, strict=True):
        assert_close(name, mine.detach(), theirs.detach(), true.detach())


@pytest.mark.parametrize(
    ("divergence", "tail"),
    list(
        zip(
            [*SOME, *SOME[1:]], ("bucket", "ignore", "renormalize", "drop", "restrict"), strict=True
        )
    ),
    ids=str,
)
@pytest.mark.parametrize("hard", [{}, {"hard_label_weight": 0.4}], ids=["soft", "hard"])
def test_both_gradient_modes_give_the_same_bits(divergence, tail, hard, backend, device):
    student, log_p, ids = make_topk((4, 129), 7, dtype=torch.bfloat16, device=device)
    options = {"divergence": divergence, "tail": tail, "teacher_ids": ids, "backend": backend}
    options |= {"labels": torch.tensor([3, 9, -100, 120], device=device), **hard}
    forward, backward = (
        run(topk_distillation_loss, student, log_p, upstream_seed=None, gradient=mode, **options)
        for mode in ("forward", "backward")
    )
    assert torch.equal(forward.gradient, backward.gradient)
    assert torch.equal(forward.loss, backward.loss)
    quiet = topk_distillation_loss(student, log_p, **options)
    assert torch.equal(quiet, forward.loss)
    assert not quiet.requires_grad


@pytest.mark.parametrize("elements", [1, 1 << 9])
def test_chunks_of_the_cpu_path(elements, monkeypatch):
    """Rows a chunk, masked tokens between them, and views that no single stride reaches."""
    from distill_ops.cpu import rows
    from distill_ops.cpu import topk as cpu_topk

    monkeypatch.setattr(cpu_topk, "TOPK_ELEMENTS", elements)
    monkeypatch.setattr(cpu_topk, "GENERAL_ELEMENTS", elements)
    monkeypatch.setattr(rows, "BUFFER_BYTES", 1 << 12)
    student, log_p, ids = make_topk((5, 9, 60), 4, dtype=torch.bfloat16)
    mask = (torch.arange(40) % 3).view(5, 8).float()
    for divergence in SOME:
        check_topk(
            student[:, :-1], log_p[:, 1:], ids[:, 1:], divergence=divergence, tail="ignore",
            loss_mask=mask, labels=ids[:, 1:, 0], hard_label_weight=0.3,
        )  # fmt: skip


def test_same_bits_every_time(backend, device):
    student, log_p, ids = make_topk((3, 1001), 9, dtype=torch.bfloat16, device=device)
    results = [
        run(topk_distillation_loss, student.clone(), log_p, teacher_ids=ids, backend=backend)
        for _ in range(3)
    ]
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_the_error_of_a_wrong_tail_would_show():
    """The rule of these tests rejects another tail's numbers."""
    student, log_p, ids = make_topk((3, 21), 5)
    options = {"oracle": reference.topk_distillation_loss, "teacher_ids": ids, "double": True}
    bucket, ignore = (
        run_reference(student, log_p, tail=t, **options) for t in ("bucket", "ignore")
    )
    with pytest.raises(AssertionError):
        assert_close("loss", ignore.loss.float(), bucket.loss.float(), bucket.loss)


@pytest.mark.interpreter
def test_scratch_memory_may_hold_anything(kernel_device, monkeypatch):
    """What the allocator hands out is not zero."""
    from distill_ops.kernels import topk

    empty = torch.empty
    full = lambda *size, dtype=None, **options: (
        empty(*size, dtype=dtype, **options).fill_(-1)
        if dtype == torch.int32
        else empty(*size, dtype=dtype, **options)
    )
    monkeypatch.setattr(topk.torch, "empty", full)
    inputs = make_topk((3, 300), 5, device=kernel_device("triton"))
    check_topk(*inputs, divergence="forward_kl", backend="triton")


def test_the_page_s_example():
    page = (ROOT / "docs/topk.md").read_text()
    block = page.split("```python\n")[1]
    names = {}
    exec(block.split("```")[0], names)
    assert names["loss"].isfinite()
    assert names["student"].grad.shape == (2, 64, 1000)
