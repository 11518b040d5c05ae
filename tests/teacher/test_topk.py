"""``teacher_topk`` against log_softmax in float64, and its memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill_ops import selection, teacher_topk
from tests.support.helpers import assert_close, make_logits

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("shape", [(5,), (3, 33), (2, 3, 130), (0, 6), (2, 0, 6)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_topk_against_log_softmax(shape, dtype, temperature):
    logits, _ = make_logits(shape, dtype=dtype, scale=3.0)
    before = logits.clone()
    log_probs, ids = teacher_topk(logits, 5, temperature=temperature)
    assert torch.equal(logits, before)
    assert log_probs.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert log_probs.shape == ids.shape == (*shape[:-1], 5)
    truth = torch.log_softmax(logits.double() / temperature, -1)
    eager = torch.log_softmax(
        logits.to(torch.promote_types(dtype, torch.float32)) / temperature, -1
    )
    assert_close("log_probs", log_probs, eager.gather(-1, ids), truth.gather(-1, ids))
    assert torch.equal(truth.gather(-1, ids), truth.topk(5).values)
    in_order = ids.sort(-1).values
    assert (in_order[..., 1:] != in_order[..., :-1]).all()


def test_topk_of_views_and_padded_heads():
    logits, _ = make_logits((4, 6, 40))
    view = logits[:, 1:-1]
    ours = teacher_topk(view, 3, vocab_size=30)
    sliced = teacher_topk(view[..., :30].contiguous(), 3)
    assert torch.equal(ours.ids, sliced.ids)
    assert torch.equal(ours.log_probs, sliced.log_probs)
    assert not torch.equal(ours.log_probs, teacher_topk(view, 3).log_probs)


def test_topk_of_far_and_large_logits():
    """A common offset costs nothing, and the division by T does not overflow."""
    logits, _ = make_logits((4, 40))
    logits = logits.mul(16).round() / 16  # exact beside the offset
    ours = teacher_topk(logits + 2.0**15, 40, temperature=0.5)
    torch.testing.assert_close(ours.log_probs, teacher_topk(logits, 40, temperature=0.5).log_probs)
    large = torch.tensor([[3e38, 3e38, -3e38]])
    log_probs, ids = teacher_topk(large, 2, temperature=1e-3)
    torch.testing.assert_close(log_probs, torch.full((1, 2), -math.log(2)))
    assert set(ids[0].tolist()) == {0, 1}


def test_topk_of_infinite_logits():
    logits, _ = make_logits((5, 6))
    logits[0, [1, 2, 4]] = -INF
    logits[1] = -INF
    logits[2, 3] = NAN
    logits[3, 3] = INF
    logits[2:4, 0] = -INF
    log_probs, ids = teacher_topk(logits, 6)
    truth = torch.log_softmax(logits[0, [0, 3, 5]], -1).sort(descending=True)
    torch.testing.assert_close(log_probs[0, :3], truth.values)
    assert ids[0].tolist() == [[0, 3, 5][i] for i in truth.indices] + [-1] * 3
    for row, n_unused in [(0, 3), (1, 6), (2, 1), (3, 1)]:
        assert (ids[row] == -1).sum() == n_unused
        assert (log_probs[row, 6 - n_unused :] == -INF).all()
    assert log_probs[2:4, :5].isnan().all()
    torch.testing.assert_close(log_probs[4], torch.log_softmax(logits[4], -1).sort().values.flip(0))


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage that an operation returns, but that of an input."""

    def __init__(self, given):
        super().__init__()
        self.given, self.nbytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != self.given:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


def test_topk_holds_no_copy_of_the_logits(monkeypatch):
    logits, _ = make_logits((2, 64, 100), dtype=torch.bfloat16)
    whole = teacher_topk(logits, 4)
    monkeypatch.setattr(selection, "CPU_CHUNK_ELEMENTS", 1500)
    with LargestTensor(logits) as largest:
        chunked = teacher_topk(logits, 4)
    assert largest.nbytes == 4 * max(1500, 128 * 4 * 2)  # float32 rows; the ids, int64
    assert torch.equal(chunked.log_probs, whole.log_probs)
    assert torch.equal(chunked.ids, whole.ids)


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor"),
        ({"logits": LOGITS.int()}, TypeError, "logits must be float32, .* got torch.int32"),
        ({"logits": torch.zeros(())}, ValueError, "logits must be .* at least one column"),
        ({"logits": LOGITS.clone().requires_grad_()}, ValueError, "logits requires grad.*detach"),
        ({"k": 0}, ValueError, r"k must be in \[1, 5\], got 0"),
        ({"k": 6}, ValueError, r"k must be in \[1, 5\], got 6"),
        ({"k": 4, "vocab_size": 3}, ValueError, r"k must be in \[1, 3\], got 4"),
        ({"k": 2.0}, TypeError, r"k must be an int in \[1, 5\], got float"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"vocab_size": 6}, ValueError, r"vocab_size must be in \[1, 5\], got 6"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0"),
    ],
)
def test_topk_validation(arguments, error, message):
    with pytest.raises(error, match=message):
        teacher_topk(**({"logits": LOGITS, "k": 2} | arguments))
