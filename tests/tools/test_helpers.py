"""The numeric rule itself: what it must reject, in every dtype."""

import pytest
import torch

from distill_ops import JensenShannon, distillation_loss
from tests.support.helpers import Result, assert_close_to_reference, make_logits, run, run_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(dtype, **options):
    student, teacher = make_logits((6, 257), dtype=dtype)
    options = {"divergence": JensenShannon(0.2), **options}
    ours = run(distillation_loss, student, teacher, **options)
    eager = run_reference(student, teacher, double=False, **options)
    truth = run_reference(student, teacher, double=True, **options)
    return ours, eager, truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_right_result_passes(dtype):
    assert_close_to_reference(*results(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r._replace(gradient=torch.zeros_like(r.gradient)),
        lambda r: r._replace(gradient=r.gradient * 1.05),
        lambda r: r._replace(gradient=r.gradient.roll(1, 0)),
        lambda r: r._replace(gradient=r.gradient[:-1]),
        lambda r: r._replace(gradient=r.gradient.index_fill(1, torch.tensor([3]), float("nan"))),
        lambda r: r._replace(gradient=r.gradient.index_fill(1, torch.tensor([256]), 0.01)),
        lambda r: r._replace(loss=r.loss * 1.001),
        lambda r: r._replace(loss=torch.zeros_like(r.loss)),
    ],
    ids=["zero", "scaled", "shifted row", "shape", "nan", "one column", "loss", "zero loss"],
)
def test_a_spoiled_result_is_rejected(dtype, spoil):
    ours, eager, truth = results(dtype)
    with pytest.raises(AssertionError):
        assert_close_to_reference(spoil(ours), eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapped_student_and_teacher_are_rejected(dtype):
    student, teacher = make_logits((6, 257), dtype=dtype)
    for divergence in (JensenShannon(0.2), "forward_kl", "reverse_kl", "soft_cross_entropy"):
        swapped = run(distillation_loss, teacher, student, divergence=divergence)
        _, eager, truth = results(dtype, divergence=divergence)
        with pytest.raises(AssertionError):
            assert_close_to_reference(swapped, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_minus_beta_is_rejected(dtype):
    student, teacher = make_logits((6, 257), dtype=dtype)
    other = run(distillation_loss, student, teacher, divergence=JensenShannon(0.8))
    _, eager, truth = results(dtype)
    with pytest.raises(AssertionError):
        assert_close_to_reference(other, eager, truth)
    with pytest.raises(AssertionError):
        assert_close_to_reference(Result(truth.loss.float(), other.gradient), eager, truth)
