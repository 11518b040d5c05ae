"""The linear loss against a teacher whose rows an index chooses, or whose logits stand for its head; and
what is computed of it."""

import pytest
import torch

from distill_ops import (
    LinearDistillationLoss,
    SymmetricKL,
    linear_distillation_loss,
    linear_topk_distillation_loss,
    reference,
)
from distill_ops.heads import engine, projection, teachers
from distill_ops.heads.blocks import Blocks
from distill_ops.rows import within_teacher
from tests.support import declared
from tests.support.cases import DIVERGENCES, LABELS, TOKENS, VIEWS
from tests.support.helpers import assert_close, moved, to_float64, topk_of
from tests.support.linear_cases import (
    CAPPED,
    N_COLS,
    loss_condition,
    make_pair,
    run,
    run_reference,
)

pytest.importorskip("triton")

HALF = torch.bfloat16
EVERY = [*DIVERGENCES, declared.chi_squared()]
by_divergence = pytest.mark.parametrize("divergence", EVERY, ids=lambda d: str(d)[:40])
# of the rows [2, 3]: fewer than tokens, as many in another order, more of them
INDICES = {"fewer": [[3, 0, 3], [0, 2, 3]], "permuted": [[5, 3, 0], [1, 4, 2]], "more": [[8, 0, 5], [2, 7, 8]]}  # fmt: skip
N_ROWS = {"fewer": 4, "permuted": 6, "more": 9}


def make_shared(index, *, device="cpu", **more):
    """Heads whose teacher has hidden states of its own rows, and the index."""
    pair = make_pair(device=device, **more)
    others = make_pair((N_ROWS[index],), device=device, seed=3, **more)
    rows = torch.tensor(INDICES[index], device=device)
    return pair._replace(teacher_hidden=others.teacher_hidden), rows


def hold(ours, gathered, divergence=None, **options):
    """The outcome of a call, against the oracle on the gathered teacher."""
    options = {"divergence": divergence or SymmetricKL(0.3), **options}
    eager = run_reference(gathered, double=False, **options)
    truth = run_reference(gathered, double=True, **options)
    assert_close("loss", ours.loss, eager.loss, truth.loss, loss_condition(gathered, options))
    assert ours.gradients.keys() == truth.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert_close(name, gradient, eager.gradients[name], truth.gradients[name])


def check_rows(pair, rows, unread=None, **options):
    """The loss with ``teacher_rows``, against the oracle."""
    options = {"divergence": SymmetricKL(0.3), **moved(options, rows.device)}
    index = rows if unread is None else rows.masked_fill(unread, -77)
    ours = run(linear_distillation_loss, pair, teacher_rows=index, **options)
    hidden = pair.teacher_hidden
    gathered = pair._replace(teacher_hidden=hidden.reshape(-1, hidden.shape[-1])[rows])
    hold(ours, gathered, **options)
    return ours


def blocks_of(monkeypatch, tokens, rows):
    monkeypatch.setattr(engine, "split", lambda *_, **__: Blocks(tokens, rows))


@pytest.mark.covering("divergence.operands", "index gradient")
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@by_divergence
def test_rows_against_the_oracle(divergence, gradient, index, backend, device):
    pair, rows = make_shared(index, device=device)
    check_rows(pair, rows, divergence=divergence, gradient=gradient, backend=backend)


# all rows of the teacher kept, where a GPU keeps them, and a row a token where they take too much
BUDGETS = {"one block": None, "several": 1500, "a token": 1000}


@pytest.mark.covering("budget", "reduction")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_blocks_of_rows(budget, reduction, backend, device):
    pair, rows = make_shared("fewer", bias=True, device=device)
    options = {"reduction": reduction, "memory_budget": BUDGETS[budget], "backend": backend}
    check_rows(pair, rows, **CAPPED, **options)


OPTIONS = {
    "hard": {"labels": LABELS, "hard_label_weight": 0.4, "temperature": 2.0},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "mask": {"loss_mask": LABELS > 0, "gradient": "backward", "reduction": "none"},
    "kept": {"labels": LABELS, "kept_tokens": 5},
    "vocab_size": {"vocab_size": N_COLS - 4},
}


@pytest.mark.covering("option", "kind")
@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, kind, backend, device):
    """What a token of weight 0 has for an index is not looked at; leading dimensions are the teacher's."""
    options = OPTIONS[option]
    unread = LABELS == -100 if "labels" in options else LABELS <= 0 if "mask" in option else None
    if unread is not None:
        unread = unread.to(device)
    wider = N_COLS + 2 if option == "vocab_size" else N_COLS
    pair, rows = make_shared("fewer", device=device, teacher_cols=wider)
    pair = pair._replace(teacher_hidden=pair.teacher_hidden.view(2, 2, -1))
    if kind == "hidden":
        check_rows(pair, rows, unread, backend=backend, **options)
    else:
        check_logits(pair, rows, unread, backend=backend, **options)


# --- the teacher's logits -------------------------------------------------------------------------------


def logits_of(pair):
    """The teacher's, as its head makes them."""
    return pair.teacher_hidden @ pair.teacher_weight.t()


def without_head(pair):
    return pair._replace(teacher_hidden=None, teacher_weight=None, teacher_bias=None)


def outcome_of_logits(function, pair, teacher, **options):
    return run(function, without_head(pair), teacher_logits=teacher, **options)


def check_logits(pair, rows=None, unread=None, view=None, **options):
    """The loss with ``teacher_logits``, and perhaps ``teacher_rows``, against the oracle on logits."""
    options = {"divergence": SymmetricKL(0.3), **moved(options, pair.student_hidden.device)}
    teacher = logits_of(pair) if view is None else view
    given = {} if rows is None else {"teacher_rows": rows}
    if unread is not None:
        given["teacher_rows"] = rows.masked_fill(unread, -77)
    ours = outcome_of_logits(linear_distillation_loss, pair, teacher, **given, **options)
    gathered = teacher if rows is None else teacher.reshape(-1, teacher.shape[-1])[rows]
    for name in ("memory_budget", "kept_tokens", "gradient", "backend"):
        options.pop(name, None)
    oracle = reference.linear_distillation_loss
    eager = outcome_of_logits(oracle, pair, gathered, **options)
    wide = {name: to_float64(x) for name, x in options.items()}
    truth = outcome_of_logits(oracle, pair.map(to_float64), gathered.double(), **wide)
    assert_close("loss", ours.loss, eager.loss, truth.loss, 4.0)
    for name, gradient in ours.gradients.items():
        assert_close(name, gradient, eager.gradients[name], truth.gradients[name])
    return ours


@pytest.mark.covering("divergence.operands", "gradient dtype")
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@by_divergence
def test_logits_against_the_oracle(divergence, gradient, dtype, backend, device):
    pair = make_pair(device=device)
    options = {"divergence": divergence, "gradient": gradient, "backend": backend}
    check_logits(pair, view=logits_of(pair).to(dtype), memory_budget=1500, **options)


@pytest.mark.covering("view", "masked")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("view", ["shifted", "padded", "three_strides", "strided_columns"])
def test_views_of_logits(view, masked, backend, device):
    whole = logits_of(make_pair((2, 6), device=device))
    teacher = VIEWS[view](whole)
    pair = make_pair(teacher.shape[:-1], device=device)
    options = {"memory_budget": 1500, "backend": backend}
    if masked:
        options["loss_mask"] = torch.arange(teacher[..., 0].numel()).view(teacher.shape[:-1]) % 3
        options["kept_tokens"] = 8
    check_logits(pair, view=teacher, **options)


def test_float64_of_either():
    pair = make_pair()
    teacher = logits_of(pair).double()
    ours = outcome_of_logits(linear_distillation_loss, pair, teacher)
    assert ours.loss.dtype == torch.float64
    truth = outcome_of_logits(reference.linear_distillation_loss, pair, teacher)
    torch.testing.assert_close(ours.loss, truth.loss)


# --- what is computed ------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """The rows of the products of each head, which are told apart by the dimension: ``[student, teacher,
    gradients]``."""
    counted, original = [0, 0, 0], projection.multiply
    dims = {16: 0, 24: 1}

    def multiply(out, a, b, *more, **options):
        of_gradient = a.shape[1] not in dims or a.shape[0] == N_COLS
        counted[2 if of_gradient else dims[a.shape[1]]] += 1 if of_gradient else len(out)
        return original(out, a, b, *more, **options)

    monkeypatch.setattr(projection, "multiply", multiply)
    return counted


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_steps_over_one_teacher_s_rows(gradient, products, backend, device):
    """Four steps of a draft model: the teacher's product has its rows, not theirs."""
    steps, n_rows = 4, 2
    pair = make_pair((steps, n_rows), device=device)
    pair = pair._replace(teacher_hidden=pair.teacher_hidden[0])
    rows = torch.arange(n_rows, device=device).repeat(steps, 1)
    run(linear_distillation_loss, pair, teacher_rows=rows, gradient=gradient, backend=backend)
    passes = 1 if gradient == "forward" else 2
    assert products == [steps * n_rows * passes, n_rows * passes, 2]


def test_a_cpu_forms_each_row_once(products, monkeypatch):
    """Whatever the blocks, in whatever order: rows that no token uses not at all, nor those of tokens of
    weight 0."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (57,), generator=generator)
    mask = torch.rand(57, generator=generator) > 0.3
    pair = make_pair((57,))._replace(teacher_hidden=make_pair((40,), seed=3).teacher_hidden)
    for tokens, under_work in ((57, 57), (20, 7), (7, 7), (3, 1)):
        blocks_of(monkeypatch, tokens, under_work)
        products[1] = 0
        check_rows(pair, rows, loss_mask=mask)
        assert products[1] == len(rows[mask].unique())


@pytest.mark.interpreter
@pytest.mark.parametrize("budget", [10_000, 2_000])
def test_a_gpu_keeps_all_rows_within_half_of_the_budget(
    budget, products, monkeypatch, kernel_device
):
    """No value decides there: the shapes and the budget do."""
    used, original = [], teachers.FormedByIndex.prepare
    monkeypatch.setattr(
        teachers.FormedByIndex, "prepare",
        lambda self, *more: (original(self, *more), used.append((self.keeps, self.buffer))),
    )  # fmt: skip
    pair, _ = make_shared("fewer", device=kernel_device("triton"))
    rows = torch.tensor([[2, 0, 2], [0, 0, 2]], device=pair.student_hidden.device)
    with torch.no_grad():
        linear_distillation_loss(
            *pair[:4], teacher_rows=rows, memory_budget=budget, backend="triton"
        )
    ((keeps, buffer),) = used
    n_bytes = 4 * (
        40 * 4 + 24 * 4
    )  # of logits, whose rows begin at multiples of 16 bytes, and hidden
    assert keeps == (n_bytes <= budget // 2)
    assert products == ([6, 4, 0] if keeps else [6, 6, 0])
    assert len(buffer) == 4 or not keeps


@pytest.mark.parametrize(("gradients", "n"), [(True, 2), (False, 0)])
def test_products_beside_given_logits(gradients, n, products, backend, device):
    """Three where the forward makes the gradients, one without: none of a teacher's head."""
    pair = make_pair(device=device)
    teacher = logits_of(pair)
    if gradients:
        outcome_of_logits(linear_distillation_loss, pair, teacher, backend=backend)
    else:
        linear_distillation_loss(*pair[:2], None, None, teacher_logits=teacher, backend=backend)
    assert products == [6, 0, n]


def test_given_logits_are_not_copied(monkeypatch, backend, device):
    """What the loss of rows gets is their own memory."""
    from distill_ops import gpu
    from distill_ops.cpu import forms

    seen, path = [], gpu if backend == "triton" else forms
    original = path.rows

    def rows(options, tokens, student, teacher, *more, **others):
        seen.append(teacher)
        return original(options, tokens, student, teacher, *more, **others)

    monkeypatch.setattr(path, "rows", rows)
    whole = logits_of(make_pair((2, 4), device=device))
    pair = make_pair((2, 3), device=device)
    for teacher in (whole[:, :-1], whole[:, :-1].contiguous()):
        options = {"loss_mask": LABELS.to(device) > 0, "backend": backend, "memory_budget": 1500}
        outcome_of_logits(linear_distillation_loss, pair, teacher, **options)
        outcome_of_logits(linear_distillation_loss, pair, teacher, backend=backend)
        assert seen
        memory = teacher.untyped_storage().data_ptr()
        assert all(x.untyped_storage().data_ptr() == memory for x in seen)
        seen.clear()


def test_indices_that_nobody_looked_at():
    """As on a GPU: within the teacher, and weights that tell."""
    rows = torch.tensor([3, -1, 4, 2**40, 0])
    index, weights = within_teacher(rows, 4, torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5]), torch.float32)
    assert index.tolist() == [3, 0, 3, 3, 0]
    assert weights.isnan().tolist() == [False, True, False, True, False]
    assert weights[[0, 2, 4]].tolist() == [1.0, 0.0, 0.5]
    assert within_teacher(rows, 2**41, None, torch.float64)[1][2:].tolist() == [1.0, 1.0, 1.0]


# --- top-k, modules ----------------------------------------------------------------------------------------


@pytest.mark.covering("tail", "masked gradient")
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_topk_rows(tail, masked, gradient, backend, device):
    """The same bits as of gathered slots."""
    pair, rows = make_shared("more", device=device)
    log_probs, ids = topk_of(logits_of(pair), 5)
    options = {"tail": tail, "gradient": gradient, "backend": backend, "memory_budget": 1500}
    options["divergence"] = SymmetricKL(0.3)
    index = rows
    if masked:
        options["loss_mask"] = LABELS.to(device) > 0
        index = rows.masked_fill(LABELS.to(device) <= 0, 9)
    found = []
    for slots, given in (
        ((log_probs, ids.int()), {"teacher_rows": index}),
        ((log_probs[rows], ids[rows]), {}),
    ):
        leaves = [x.clone().requires_grad_() for x in pair[:2]]
        loss = linear_topk_distillation_loss(*leaves, *slots, **given, **options)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_the_module():
    pair, rows = make_shared("fewer")
    loss = LinearDistillationLoss(divergence="forward_kl")
    found = loss(*pair[:4], teacher_rows=rows)
    of_logits = loss(*pair[:2], None, None, teacher_logits=logits_of(pair), teacher_rows=rows)
    torch.testing.assert_close(found, of_logits)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_no_token(kind, backend, device):
    pair = make_pair((0,), device=device)
    rows = torch.zeros(0, dtype=torch.int64, device=device)
    for n_rows in (0, 3):
        pair = pair._replace(teacher_hidden=make_pair((n_rows,), device=device).teacher_hidden)
        given = {"teacher_rows": rows, "backend": backend}
        if kind == "hidden":
            ours = run(linear_distillation_loss, pair, **given)
        else:
            ours = outcome_of_logits(linear_distillation_loss, pair, logits_of(pair), **given)
        assert ours.loss == 0
        assert not any(x.any() for x in ours.gradients.values())


def test_tokens_and_shapes():
    assert TOKENS == tuple(torch.tensor(INDICES["fewer"]).shape)
