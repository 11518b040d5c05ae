"""The benchmark's checks before it times: formulas, providers that are wrong, memory figures."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.core.memory import kept_above_inputs, peak_above_inputs
from benchmarks.core.timing import Budget
from benchmarks.losses.cases import LOSSES, Case, Inputs, make_inputs
from benchmarks.losses.check import Wrong, allowed, make_truth, measure_errors, require, run_once
from benchmarks.losses.eager import FORMULAS
from benchmarks.losses.harness import run_case
from benchmarks.losses.providers import PROVIDERS, Provider
from benchmarks.losses.records import COPY, WAYS
from distill_ops import reference
from distill_ops.divergences.built_in import BUILT_IN

CPU = torch.device("cpu")
MIB = 1 << 20


def test_every_built_in_divergence_has_an_eager_formula():
    assert set(FORMULAS) == set(LOSSES) == set(BUILT_IN)


@pytest.mark.parametrize("loss", LOSSES)
def test_eager_formula_is_the_references(loss):
    student, teacher = make_inputs(Case(loss, 5, 41, "float64"), CPU)
    value = run_once(lambda s, t: FORMULAS[loss](s, t, torch.float64), student, teacher)
    expected_student = student.detach().requires_grad_()
    expected = run_once(
        lambda s, t: reference.distillation_loss(s, t, divergence=loss), expected_student, teacher
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    scale = expected_student.grad.abs().max().item()
    torch.testing.assert_close(student.grad, expected_student.grad, rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_eager_formula_upcasts_half_precision(loss):
    case = Case(loss, 5, 41, "bfloat16")
    student, teacher = make_inputs(case, CPU)
    upcast = FORMULAS[loss](student, teacher, torch.float32)
    native = FORMULAS[loss](student, teacher, None)
    exact = reference.distillation_loss(student.double(), teacher.double(), divergence=loss)
    assert (upcast.dtype, native.dtype) == (torch.float32, torch.bfloat16)
    assert abs(upcast.item() - exact.item()) < 1e-5 * exact.item()


def test_a_loss_in_place_gets_the_same_logits_in_every_run():
    case = Case("reverse_kl", 6, 50, "float32")
    student, teacher = make_inputs(case, CPU)
    logits = student.detach().clone()
    inputs = Inputs(student, teacher, overwritten=True)
    fresh = run_once(PROVIDERS["ours"].build(case, CPU), student, teacher)
    gradient = student.grad.clone()
    function = PROVIDERS["ours_inplace"].build(case, CPU)
    for _ in range(3):
        inputs.reset()
        assert student.grad is None
        given = inputs.student_for(inplace=True)
        assert torch.equal(given, logits)
        assert torch.equal(run_once(function, given, teacher), fresh)
        assert torch.equal(student.grad, gradient)
        assert student.grad.data_ptr() == given.data_ptr()  # no copy on its way to the leaf
        assert torch.equal(student, logits)
    assert inputs.student_for(inplace=False) is student


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_ways_to_hold_the_gradient():
    case = Case("soft_cross_entropy", 256, 32768, "float32")
    providers = [PROVIDERS[name] for name in WAYS]
    records = run_case(case, providers, CPU, Budget(0.0, 1, 1), step=lambda text: None)
    peak = {r.provider: r.peak_bytes for r in records if r.mode == "train"}
    kept = {r.provider: r.kept_bytes for r in records if r.mode == "train"}
    gradient = case.logits_bytes
    assert gradient <= peak["ours"] + MIB < gradient + 17 * MIB
    assert gradient <= peak["ours_backward"] + MIB < gradient + 17 * MIB
    assert 0 < peak["ours_inplace"] < gradient / 2
    assert kept["ours"] == pytest.approx(gradient, abs=MIB)
    assert abs(kept["ours_backward"]) < MIB
    assert abs(kept["ours_inplace"]) < MIB


def flip(column):
    """The total variation with the other sign of one column's slope; its value is right."""

    def loss(student, teacher):
        distances = (student.softmax(-1) - teacher.softmax(-1)).abs() / 2
        flipped = distances[:, column]
        return (distances.sum(-1) + 2 * (flipped.detach() - flipped)).mean()

    return loss


def test_either_sign_is_right_where_rounding_decides_the_total_variation():
    case = Case("total_variation", 16, 512, "float32")
    student, teacher = make_inputs(case, CPU, distinct=8)
    largest = student.detach().softmax(-1).mean(0).argmax().item()
    column = (largest + 1) % 512

    def check(flipped, teacher):
        truth = make_truth(case, student, teacher)
        inputs = Inputs(student, teacher, overwritten=False)
        require(measure_errors(flip(flipped), inputs, truth), allowed(truth, False, None))

    with pytest.raises(Wrong, match="gradient error"):
        check(column, teacher)
    equal = teacher.double()
    for _ in range(20):  # until q = p in this column
        log_q, log_p = (x.detach().double().log_softmax(-1)[:, column] for x in (student, equal))
        equal[:, column] += log_q - log_p
    check(column, equal.float())
    with pytest.raises(Wrong, match="gradient error"):
        check(largest, equal.float())
    assert not make_truth(replace(case, loss="forward_kl"), student, equal.float()).undecided.any()


def corrupt_gradient(change):
    """Ours, with the student's gradient changed on its way out."""

    def build(case, device):
        right = PROVIDERS["ours"].build(case, device)

        def loss(student, teacher):
            if student.requires_grad and torch.is_grad_enabled():
                student = student.view_as(student)
                student.register_hook(change)
            return right(student, teacher)

        return loss

    return build


def corrupt_value(case, device):
    right = PROVIDERS["ours"].build(case, device)
    return lambda student, teacher: right(student, teacher) + 0.01


def another_divergence(case, device):
    return PROVIDERS["ours"].build(replace(case, loss="reverse_kl"), device)


WRONG = {
    "zero gradient": corrupt_gradient(torch.zeros_like),
    "gradient 5% too large": corrupt_gradient(lambda g: g * 1.05),
    "gradient of the next row": corrupt_gradient(lambda g: g.roll(1, 0)),
    "NaN in the gradient": corrupt_gradient(
        lambda g: g.index_fill(0, torch.tensor([9]), torch.nan)
    ),
    "value off by 0.01": corrupt_value,
    "another divergence": another_divergence,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", WRONG.values(), ids=WRONG)
def test_check_rejects_a_wrong_provider(build, dtype):
    case = Case("forward_kl", 16, 512, dtype)
    student, teacher = make_inputs(case, CPU, distinct=8)
    truth = make_truth(case, student, teacher)
    inputs = Inputs(student, teacher, overwritten=False)

    def errors(builder):
        return measure_errors(builder(case, CPU), inputs, truth)

    yardstick = errors(PROVIDERS["eager"].build)
    require(yardstick, allowed(truth, False, None))
    limits = allowed(truth, False, yardstick)
    require(errors(PROVIDERS["ours"].build), limits)
    with pytest.raises(Wrong, match="error"):
        require(errors(build), limits)


@pytest.mark.full
def test_a_provider_that_fails_is_reported_and_not_timed():
    def broken(case, device):
        return lambda student, teacher: student.no_such_method()

    bad = [
        Provider("wrong", "wrong", corrupt_value),
        Provider("broken", "broken", broken),
    ]
    case = Case("jensen_shannon", 10, 32, "float32")  # 10 is no multiple of the distinct rows
    records = run_case(
        case, [*bad, PROVIDERS["ours"]], CPU, Budget(0.0, 3, 3), step=lambda text: None
    )
    by_provider = {r.provider: r for r in records}
    assert set(by_provider) == {"wrong", "broken", "ours", COPY}
    assert by_provider["wrong"].reason.startswith("Wrong: value error")
    assert by_provider["broken"].reason.startswith("AttributeError")
    assert {r.provider for r in records if r.measured} == {"ours", COPY}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mebibytes", [4, 100])
def test_peak_memory_of_known_tensors(mebibytes):
    def run():
        return torch.ones(mebibytes * MIB, dtype=torch.uint8) + 1  # two at once

    run()
    peaks = [peak_above_inputs(run, CPU) for _ in range(3)]
    assert sorted(peaks)[1] == pytest.approx(2 * mebibytes * MIB, abs=MIB)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_kept_of_known_tensors():
    def forward():
        return torch.ones(60 * MIB, dtype=torch.uint8) + 1  # the first is dropped

    forward()
    assert kept_above_inputs(forward, CPU) == pytest.approx(60 * MIB, abs=MIB)
