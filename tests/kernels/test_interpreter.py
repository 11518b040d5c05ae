"""The quicker interpreter of ``support/interpreter.py`` against Triton's own."""

import pytest
import torch

from distill_ops import distillation_loss, topk_distillation_loss
from tests.conftest import INTERPRETING
from tests.support.helpers import make_logits, run, topk_of
from tests.support.interpreter import CHANGES

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="of the interpreter"),
]


@pytest.fixture
def own(monkeypatch):
    """Call it for Triton's own interpreter."""

    def give_back():
        for owner, name, what_triton_has in CHANGES:
            monkeypatch.setattr(owner, name, what_triton_has)

    return give_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_the_same_bits(dtype, own):
    student, teacher = make_logits((3, 700), dtype=dtype)
    top = topk_of(teacher, 5)
    calls = [
        lambda: run(
            distillation_loss, student, teacher, backend="triton", divergence="reverse_kl"
        ),
        lambda: run(
            topk_distillation_loss, student, top[0], teacher_ids=top[1], backend="triton",
            divergence="jensen_shannon",
        ),
    ]  # fmt: skip
    assert CHANGES
    quick = [x for call in calls for x in call()]
    own()
    assert all(map(torch.equal, quick, [x for call in calls for x in call()]))


@triton.jit
def add(result, a, b):
    tl.store(result, tl.load(a) + tl.load(b))


def test_nothing_stays_replaced_after_a_launch():
    before = [{**vars(x)} for x in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
    numbers = [torch.tensor([x], dtype=torch.int32) for x in (0, 1, 2)]
    add[(1,)](*numbers)
    assert numbers[0].item() == 3
    assert before == [{**vars(x)} for x in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
