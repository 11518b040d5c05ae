"""A teacher whose rows an index chooses, in the losses of logits: the loss against the rows, gathered."""

import math
import sys

import pytest
import torch

from benchmarks.core.memory import peak_above_inputs
from distill_ops import (
    DistillationLoss,
    JensenShannon,
    ReverseKL,
    SymmetricKL,
    distillation_loss,
    topk_distillation_loss,
)
from distill_ops.checks import contents
from distill_ops.results import ARGMAX, OF_TEACHER, TOKEN_OUTPUTS
from tests.support import declared
from tests.support.cases import DIVERGENCES, LABELS, TOKENS, VIEWS
from tests.support.helpers import (
    assert_compiled_equals_eager,
    check,
    check_topk,
    make_logits,
    run,
    topk_of,
)

HALF = torch.bfloat16
EVERY = [*DIVERGENCES, declared.chi_squared()]
# tokens [2, 3]: repeated, permuted and unused rows, fewer or more than tokens, or one
INDICES = {
    "fewer": (4, [[3, 1, 1], [0, 3, 1]]),
    "more": (9, [[8, 0, 5], [2, 7, 6]]),
    "one": (1, [[0, 0, 0], [0, 0, 0]]),
}
SHAPES = {"fewer": (2, 2), "more": (3, 3), "one": ()}  # other leading dimensions of the same rows
by_index = pytest.mark.parametrize("index", INDICES)


def make_shared(index, n_cols, *, dtype=torch.float32, device="cpu", seed=0):
    """A student, a teacher with rows of its own, NaN where no token has one, and the index."""
    n_rows, rows = INDICES[index]
    rows = torch.tensor(rows, device=device)
    student, _ = make_logits((*TOKENS, n_cols), dtype=dtype, device=device, seed=seed)
    _, teacher = make_logits((n_rows, n_cols), dtype=dtype, device=device, seed=seed + 1)
    unused = torch.ones(n_rows, dtype=torch.bool, device=device)
    unused[rows.reshape(-1)] = False
    return student, teacher.masked_fill(unused[:, None], math.nan), rows


def of_rows(function, teacher, rows):
    """A loss of a student and of the gathered teacher, which takes the shared one instead."""
    return lambda student, gathered, **options: function(
        student, teacher, teacher_rows=rows, **options
    )


@pytest.mark.covering("divergence.operands", "gradient index")
@by_index
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("divergence", EVERY, ids=lambda d: str(d)[:40])
def test_against_the_oracle(divergence, gradient, index, backend, device):
    student, teacher, rows = make_shared(index, 29, device=device)
    options = {"divergence": divergence, "gradient": gradient, "backend": backend}
    check(of_rows(distillation_loss, teacher, rows), student, teacher[rows], **options)


OPTIONS = {
    "none": {"reduction": "none"},
    "hard": {"labels": LABELS, "hard_label_weight": 0.4, "temperature": 2.0},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "mask": {"loss_mask": LABELS > 0, "gradient": "backward"},
    "vocab_size": {"vocab_size": 27},
    "propagate": {"infinities": "propagate"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, backend, device):
    """The teacher's leading dimensions and width are its own; what a token of weight 0 has for an index
    is not looked at."""
    options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in OPTIONS[option].items()}
    student, teacher, rows = make_shared("fewer", 29, device=device)
    student[0, 0, 3] = -math.inf
    if option == "hard_only":
        student = student.nan_to_num(neginf=-5.0)
    gathered, wrong = teacher[rows], rows
    if "labels" in options or "loss_mask" in options:
        unread = LABELS == -100 if "labels" in options else LABELS <= 0
        wrong = rows.masked_fill(unread.to(device), -77)
    if "vocab_size" in options:
        teacher = torch.cat([teacher, teacher[:, :2]], -1)
    shared = teacher.view(2, 2, -1)
    loss = of_rows(distillation_loss, shared, wrong.int())
    check(loss, student, gathered, divergence=SymmetricKL(0.3), backend=backend, **options)


@pytest.mark.covering("n_cols dtype", "inplace gradient")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("n_cols", [32, 24])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_the_bits_are_those_of_the_gathered_rows(dtype, n_cols, gradient, inplace, backend, device):
    student, teacher, rows = make_shared("fewer", n_cols, dtype=dtype, device=device)
    options = {"divergence": ReverseKL(), "backend": backend, "gradient": gradient}
    function = lambda x, *given, **more: distillation_loss(
        x * 1, *given, inplace=inplace, **more, **options
    )
    ours = run(of_rows(function, teacher, rows), student, teacher)
    plain = run(function, student, teacher[rows])
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.gradient, plain.gradient)


@pytest.mark.covering("view", "student_view")
@pytest.mark.parametrize("student_view", [None, "shifted"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, student_view, backend, device):
    """Rows of a strided teacher, beside a student of other strides: every alignment meets every other."""
    _, whole = make_logits((2, 6, 21), device=device)
    teacher = VIEWS[view](whole)
    student, _ = make_logits((*TOKENS, 21), device=device, seed=5)
    if student_view:
        student = VIEWS[student_view](torch.cat([student, student[:, :1]], 1))
    n_rows = math.prod(teacher.shape[:-1])
    rows = (torch.arange(6, device=device).view(TOKENS) * 7 + 3) % n_rows
    gathered = teacher.reshape(n_rows, -1)[rows]
    loss = of_rows(distillation_loss, teacher, rows)
    check(loss, student, gathered, divergence=JensenShannon(0.3), backend=backend)


@pytest.mark.covering("n_cols", "dtype")
@pytest.mark.parametrize("n_cols", [7, 1031, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_shapes_and_dtypes(dtype, n_cols, backend, device):
    student, teacher, rows = make_shared("more", n_cols, dtype=dtype, device=device)
    teacher = teacher.float()
    options = {"divergence": SymmetricKL(0.3), "backend": backend}
    check(of_rows(distillation_loss, teacher, rows), student, teacher[rows], **options)


def test_infinite_logits(backend, device):
    """The rows that need more care are found again, in the shared teacher."""
    student, teacher, rows = make_shared("fewer", 29, device=device)
    teacher[1, 5:], teacher[3, ::2] = -math.inf, -math.inf
    student[1, 1, 2] = math.nan
    for divergence in (ReverseKL(), JensenShannon(0.3)):
        options = {"divergence": divergence, "backend": backend, "reduction": "none"}
        check(of_rows(distillation_loss, teacher, rows), student, teacher[rows], **options)


# --- top-k -------------------------------------------------------------------------------------------


@pytest.mark.covering("divergence.operands", "tail gradient", "index")
@by_index
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize("divergence", EVERY, ids=lambda d: str(d)[:40])
def test_topk(divergence, tail, gradient, index, backend, device):
    student, teacher, rows = make_shared(index, 21, device=device)
    log_probs, ids = topk_of(teacher.nan_to_num(0.0), 5)
    ids[rows[0, 0], 2] = -1
    unused = teacher.isnan().all(-1, keepdim=True)
    log_probs, ids = log_probs.masked_fill(unused, 7.0), ids.masked_fill(unused, 99)
    options = {"divergence": divergence, "tail": tail, "backend": backend, "gradient": gradient}
    gathered = log_probs[rows], ids[rows]
    plain = check_topk(student, *gathered, **options)
    leading = SHAPES[index]
    shared = (x.view(*leading, -1) for x in (log_probs, ids.int()))
    function = lambda x, log_probs, **more: topk_distillation_loss(x, log_probs, **more)
    log_probs, ids = shared
    ours = run(function, student, log_probs, teacher_ids=ids, teacher_rows=rows, **options)
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.gradient, plain.gradient)


def test_topk_of_masked_tokens(backend, device):
    student, teacher, rows = make_shared("fewer", 21, device=device)
    log_probs, ids = topk_of(teacher.nan_to_num(0.0), 5)
    options = {"labels": LABELS.to(device), "hard_label_weight": 0.4, "backend": backend}
    plain = check_topk(student, log_probs[rows], ids[rows], **options)
    wrong = rows.masked_fill(LABELS.to(device) == -100, 4)
    function = lambda x, log_probs: topk_distillation_loss(
        x, log_probs, ids, teacher_rows=wrong, **options
    )
    ours = run(function, student, log_probs)
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.gradient, plain.gradient)


# --- what the user meets -------------------------------------------------------------------------------


def test_the_module():
    student, teacher, rows = make_shared("fewer", 29)
    loss = DistillationLoss(divergence="forward_kl")
    assert torch.equal(loss(student, teacher, teacher_rows=rows), loss(student, teacher[rows]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("view", [False, True])
def test_no_copy_of_the_teacher(view):
    """A CPU holds some chunks of rows beside the gradient."""
    n_cols, steps = 4096, 4
    teacher = torch.randn(3, 513, n_cols)  # 24 MiB
    teacher = teacher[:, 1:] if view else teacher[:, :-1].contiguous()
    student = torch.randn(steps * 1536, n_cols)
    rows = torch.arange(1536).repeat(steps)

    def step():
        leaf = student.requires_grad_()
        distillation_loss(leaf.view_as(leaf), teacher, teacher_rows=rows, divergence="forward_kl")
        leaf.requires_grad_(False)

    step()
    peak = peak_above_inputs(step, torch.device("cpu"))
    mib = 1 << 20
    gradient = student.numel() * 4
    assert peak < gradient + 16 * mib  # all of the teacher's rows would be 24, gathered 96


def test_one_graph():
    """Under torch.compile, with the teacher's rows as tensors of the graph."""
    student, teacher, rows = make_shared("more", 29)
    options = {"teacher_rows": rows, "divergence": "forward_kl"}
    assert_compiled_equals_eager(distillation_loss, student, teacher, **options)


@pytest.mark.interpreter
def test_token_outputs_of_a_row_that_does_not_exist(monkeypatch):
    """On a GPU nobody looks at an index: what would be of another row is not told."""
    monkeypatch.setattr(contents, "readable", lambda *tensors: False)
    student, teacher = make_logits((3, 21))
    options = {"teacher_rows": torch.tensor([2, 3, 0]), "token_outputs": TOKEN_OUTPUTS[1:]}
    for gradient in (False, True):
        leaf = student.clone().requires_grad_(gradient)
        _, found = distillation_loss(leaf, teacher, backend="triton", **options)
        whole = teacher[torch.tensor([2, 0, 0])]
        _, expected = distillation_loss(
            student, whole, backend="triton", token_outputs=TOKEN_OUTPUTS[1:]
        )
        for name in TOKEN_OUTPUTS[1:]:
            ours, theirs = getattr(found, name), getattr(expected, name).clone()
            if name in OF_TEACHER:
                theirs[1] = -1 if name in ARGMAX else torch.nan
            torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)
