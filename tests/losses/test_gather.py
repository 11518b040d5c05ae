"""K tokens a row: whose logits are the largest, and their log-probabilities, against the oracle."""

import math
from unittest import mock

import pytest
import torch

from distill_ops import (
    gather_log_probs,
    linear_gather_log_probs,
    linear_student_topk,
    reference,
    selection,
    student_topk,
)
from distill_ops.checks import contents
from tests.support.cases import BOOL_MASK, FLOAT_MASK, TOKENS, VIEWS
from tests.support.helpers import assert_close, make_logits
from tests.support.linear_cases import make_pair

INF, NAN = math.inf, math.nan


def hold(logits, ids, *, backend, **options):
    """Hold the log-probabilities against their oracle; returns them."""
    ours = gather_log_probs(logits, ids, backend=backend, **options)
    eager = reference.gather_log_probs(logits, ids, **options)
    truth = reference.gather_log_probs(logits.double(), ids, **options)
    assert ours.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert ours.shape == ids.shape
    assert_close("log-probabilities", ours, eager, truth)
    return ours


def make_ids(leading, n_cols, k, device="cpu"):
    """Ids of which some are equal, and about one in four is unused."""
    ids = torch.randint(0, n_cols, (*leading, k), generator=torch.Generator().manual_seed(k))
    ids.view(-1)[2::4] = -1
    return ids.to(device)


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.covering("shape dtype", "k", "id_dtype")
@pytest.mark.parametrize("shape", [(5,), (3, 33), (2, 3, 130), (2, 4099), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 5, 1024])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
def test_log_probs(shape, dtype, k, id_dtype, backend, device):
    logits, _ = make_logits(shape, dtype=dtype, device=device)
    hold(logits, make_ids(shape[:-1], shape[-1], k, device).to(id_dtype), backend=backend)


@pytest.mark.covering("view", "temperature", "vocab_size")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("vocab_size", [None, 41])
def test_views_and_temperatures(view, temperature, vocab_size, backend, device):
    shape = (4, 3, 50) if view == "three_strides" else (2, 3, 50)
    logits, _ = make_logits(shape, offset=-3e4 if temperature == 0.5 else 0.0, device=device)
    logits = VIEWS[view](logits)
    ids = make_ids(logits.shape[:-1], 41, 4, device)
    hold(logits, ids, temperature=temperature, vocab_size=vocab_size, backend=backend)


@pytest.mark.parametrize(
    "mask", [BOOL_MASK, FLOAT_MASK, BOOL_MASK.int()], ids=lambda x: str(x.dtype)
)
def test_rows_of_weight_0_are_not_read(mask, backend, device):
    logits, _ = make_logits((*TOKENS, 33), device=device)
    mask = mask.to(device)
    ids = make_ids(TOKENS, 33, 4, device)
    ids[mask == 0] = 99  # what it holds does not matter
    logits[mask == 0] = NAN
    found = hold(logits, ids, loss_mask=mask, backend=backend)
    assert (found[mask == 0] == -INF).all()
    assert not found.isnan().any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_odd_rows(temperature, backend, device):
    """-inf, hardly less, certainty, large logits, NaN, +inf and nothing."""
    logits, _ = make_logits((8, 300), device=device)
    ids = make_ids((8,), 300, 4, device)
    logits[0, :200], ids[0, 0] = -INF, 2
    logits[1, 10:] = -2e38
    logits[2], logits[2, 5], ids[2, 1] = -INF, 3.0, 5
    logits[3, 7] = 1e38
    logits[4, 9] = NAN
    logits[5, 11] = INF
    logits[6] = -INF
    found = hold(logits, ids, temperature=temperature, backend=backend)
    assert found[0, 0] == -INF
    assert found[2, 1] == 0
    for row in (4, 5, 6):
        assert torch.equal(found[row].isnan(), ids[row] >= 0)
    assert found[7][ids[7] >= 0].isfinite().all()


@pytest.mark.parametrize("wrong", [33, -2, 10**9])
def test_an_id_outside_the_vocabulary_shows(wrong, backend, device):
    """On a GPU, where ids are not looked at; elsewhere it is refused."""
    logits, _ = make_logits((2, 40), device=device)
    ids = torch.tensor([[1, wrong, -1], [2, 3, 4]], device=device)
    options = {"vocab_size": 33, "backend": backend}
    with mock.patch.object(contents, "readable", return_value=False):
        found = gather_log_probs(logits, ids, **options)
    assert found.isnan().tolist() == [[False, True, False], [False, False, False]]
    if not logits.is_cuda:
        with pytest.raises(ValueError, match=rf"^ids must lie in \[0, 33\), .* got {wrong}"):
            gather_log_probs(logits, ids, **options)


def test_chunks_of_the_cpu_path(monkeypatch):
    """Rows that no single stride reaches, with what does not count between."""
    monkeypatch.setattr("distill_ops.cpu.rows.BUFFER_BYTES", 5 * 4 * 130)  # of two rows
    logits, _ = make_logits((5, 9, 60))
    mask = (torch.arange(40) % 3).view(5, 8)
    logits[:, :-1][mask == 0] = NAN
    hold(logits[:, :-1], make_ids((5, 8), 60, 3), loss_mask=mask, backend="torch")


def test_no_gradient():
    """The logits of a teacher with gradients are taken where no graph is made."""
    logits, _ = make_logits((3, 20))
    ids, leaf = make_ids((3,), 20, 2), logits.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(gather_log_probs(leaf, ids), gather_log_probs(logits, ids))
    for call in (gather_log_probs, reference.gather_log_probs):
        with pytest.raises(ValueError, match="^logits requires grad, but gets no gradient"):
            call(leaf, ids)
    assert not student_topk(leaf, 3).requires_grad


# --- the largest logits --------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 150, 1 << 20])
@pytest.mark.parametrize("view", VIEWS)
def test_student_topk(view, elements, monkeypatch):
    """As torch.topk, whatever the strides and the rows at a time."""
    monkeypatch.setattr(selection, "CPU_CHUNK_ELEMENTS", elements)
    logits = VIEWS[view](make_logits((4, 6, 50))[0])
    expected = logits[..., :41].topk(7).indices
    assert torch.equal(student_topk(logits, 7, vocab_size=41), expected)
    assert torch.equal(student_topk(logits.bfloat16(), 1), logits.bfloat16().topk(1).indices)


def test_student_topk_of_odd_rows():
    """Columns of -inf are unused slots; a row of NaN or +inf has ids, and a loss that is NaN."""
    logits = torch.tensor([[1.0, -INF, 2.0], [-INF] * 3, [NAN, 0.0, 1.0], [0.0, INF, NAN]])
    ids = student_topk(logits, 3)
    assert ids[:2].tolist() == [[2, 0, -1], [-1, -1, -1]]
    assert ids[2].tolist() == [0, 2, 1]
    assert sorted(ids[3].tolist()) == [0, 1, 2]
    assert student_topk(torch.zeros(0, 3), 2).shape == (0, 2)


def test_functions_without_a_gradient_under_vmap():
    logits, _ = make_logits((2, 4, 33))
    ids = make_ids((2, 4), 33, 3)
    for call, given in (
        (lambda x, _: student_topk(x, 3), (logits, ids)),
        (gather_log_probs, (logits, ids)),
        (lambda x, y: linear_student_topk(x, y, 3), (logits, logits[..., :5, :])),
        (lambda x, y: linear_gather_log_probs(x, x, y), (logits, ids % 4)),
    ):
        each = [call(*pair) for pair in zip(*given, strict=True)]
        assert torch.equal(torch.func.vmap(call)(*given), torch.stack(each))
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*(x[0] for x in given)), each[0])


# --- from hidden states --------------------------------------------------------------------------

HEADS = {
    "plain": {}, "softcap": {"softcap": 3.0}, "all": {"softcap": 5.0, "logit_scale": 1.3},
    "vocabulary": {"vocab_size": 29},
}  # fmt: skip


@pytest.mark.covering("head", "dtype", "blocks")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [{}, {"memory_budget": 700}], ids=["one", "several"])
def test_from_hidden_states(head, dtype, blocks, backend, device):
    """One row at a time or all: the ids, and the log-probabilities there, masked rows unread."""
    pair = make_pair(bias=head == "all", dtype=dtype, device=device)
    hidden, weight, bias = pair.student_hidden, pair.student_weight, pair.student_bias
    options, mask = HEADS[head], FLOAT_MASK.to(device)
    n_cols = options.get("vocab_size", len(weight))
    hidden[mask == 0] = NAN
    unread = torch.zeros(TOKENS, dtype=torch.bool, device=device)
    numbers = options.get("logit_scale", 1.0), options.get("softcap")
    logits, truth = (
        reference.linear.head_logits(hidden, weight, bias, *numbers, unread, n_cols, wide)
        for wide in (torch.float32, torch.float64)
    )
    ids = linear_student_topk(hidden, weight, 4, bias=bias, **options, **blocks)
    counts = mask != 0
    assert torch.equal(ids[counts], student_topk(logits[counts], 4))
    ids[0, 0, 3] = -1
    more = {"loss_mask": mask, "temperature": 1.7}
    found = linear_gather_log_probs(
        hidden, weight, ids, bias=bias, backend=backend, **more, **options, **blocks
    )
    eager, expected = (reference.gather_log_probs(x, ids, **more) for x in (logits, truth))
    assert found.dtype == torch.float32
    assert (found[~counts] == -INF).all()
    used = (ids >= 0) & counts[..., None]
    error, of_eager = ((x[used] - expected[used]).abs().max() for x in (found, eager))
    assert error <= 2 * of_eager + 2e-6 * expected[used].abs().max()
