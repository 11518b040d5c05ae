"""Checks of values on a GPU: in debug mode they raise on every path; without it nothing is read, and what
is wrong shows in the result."""

import contextlib
import math
from unittest import mock

import pytest
import torch

import distill_ops
from distill_ops import JensenShannon
from distill_ops.checks import contents, tokens
from tests.support.forms import FORMS, LOSSES, SHARED_ROWS, K, R, V, computing, tensors_of
from tests.support.helpers import make_logits


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it lies on a GPU."""

    device = torch.device("cuda")
    is_cpu = False


class Computed(Exception):
    """No check has raised."""


def on_gpu(value):
    return value.as_subclass(OnGpu) if isinstance(value, torch.Tensor) else value


IDS = tensors_of("topk_distillation_loss")["teacher_ids"]
HALF = {"hard_label_weight": 0.5}
WRONG = {  # what is wrong, and words of the error
    "weight nan": ({"loss_mask": torch.tensor([1, 1, 0, math.nan])}, "loss_mask must hold finite"),
    "weight inf": ({"loss_mask": torch.tensor([1, 1, 0, math.inf])}, "loss_mask must hold finite"),
    "mask of labels": ({"loss_mask": torch.tensor([3, -100, 0, 1])}, "loss_mask .* as token ids"),
    "label beyond": ({"labels": torch.tensor([3, V, 0, 1]), **HALF}, "labels must lie in"),
    "label below": ({"labels": torch.tensor([3, -5, 0, 1]), **HALF}, "labels must lie in"),
    "normalizer 0": ({"normalizer": torch.tensor(0.0)}, "normalizer must be positive"),
    "normalizer nan": ({"normalizer": torch.tensor(math.nan)}, "normalizer must be positive"),
    "parameter": ({"parameter": torch.tensor(1.5)}, "beta of jensen_shannon"),
    "parameter nan": ({"parameter": torch.tensor([0.5, 0.5, 0.5, math.nan])}, "beta of jensen_shannon"),
}  # fmt: skip
WRONG_SLOTS = {
    "slot beyond": ({"teacher_ids": IDS + V}, "teacher_ids must lie in"),
    "slot below": ({"teacher_ids": IDS * 0 - 2}, "teacher_ids must lie in"),
    "slots repeated": ({"teacher_ids": IDS * 0}, "teacher_ids must be unique"),
    "logits": ({"teacher_log_probs": torch.full((4, K), 5.0)}, "teacher_log_probs must be log"),
    "sum": ({"teacher_log_probs": torch.full((4, K), math.log(0.5))}, "add up to at most 1"),
}
WRONG_IDS = {
    "id beyond": ({"token_ids": torch.full((4,), V)}, "token_ids must lie in"),
    "id below": ({"token_ids": torch.full((4,), -5)}, "token_ids must lie in"),
}
WRONG_ROWS = {
    "row beyond": (
        {"teacher_rows": torch.tensor([2, 0, R, 1])},
        rf"teacher_rows .*{R}\), .* got {R}$",
    ),
    "row below": (
        {"teacher_rows": torch.tensor([2, 0, -1, 1])},
        "got -1; .*needs a loss_mask of 0",
    ),
}


def wrong_of(form: str) -> dict:
    if form in SHARED_ROWS:
        return WRONG_ROWS
    found = WRONG if form in LOSSES else dict(WRONG_IDS)
    if "topk" in form:
        found = found | WRONG_SLOTS
    if form.startswith("linear") and form in LOSSES:
        found = found | {"too many": ({"kept_tokens": 2}, "kept_tokens=2 must bound")}
    if form == "mixture_token_log_probs":
        found["weight"] = {"teacher_weight": torch.full((4,), 1.5)}, "teacher_weight must lie in"
    if form.endswith("distillation_statistics"):
        found["parameter"] = WRONG["parameter"]
    return found


CASES = [(form, name) for form in FORMS for name in wrong_of(form)]


def call(form: str, name: str, of=lambda value: value, **options):
    """A form with what is wrong; the tensors are ``of`` those here."""
    changed, words = wrong_of(form)[name]
    options |= changed
    parameter = options.pop("parameter", None)
    tensors = tensors_of(form)
    tensors |= {key: options.pop(key) for key in list(options) if key in tensors}
    if parameter is not None:
        options["divergence"] = JensenShannon(of(parameter))
    given = {key: of(value) for key, value in options.items()}
    return FORMS[form]({key: of(x) for key, x in tensors.items()}, **given), words


@pytest.mark.parametrize(("form", "name"), CASES)
def test_debug_mode_raises_and_without_it_nothing_is_read(form, name):
    unread = mock.patch.object(torch.Tensor, "item", side_effect=AssertionError("it waits"))
    never = mock.patch.object(torch.Tensor, "__bool__", side_effect=AssertionError("it waits"))
    with computing(Computed()), unread, never, pytest.raises(Computed):
        call(form, name, on_gpu, backend="torch")
    words = wrong_of(form)[name][1]
    distill_ops.set_debug(True)
    try:
        with computing(Computed()), pytest.raises(ValueError, match=words):
            call(form, name, on_gpu, backend="torch")
    finally:
        distill_ops.set_debug(False)


@pytest.mark.parametrize("form", FORMS)
def test_debug_mode_lets_right_calls_pass(form):
    distill_ops.set_debug(True)
    try:
        with computing(Computed()), pytest.raises(Computed):
            FORMS[form]({key: on_gpu(x) for key, x in tensors_of(form).items()}, backend="torch")
    finally:
        distill_ops.set_debug(False)


@contextlib.contextmanager
def as_on_a_gpu():
    """Nothing is looked at, as on a GPU without debug mode."""
    with (
        mock.patch.object(contents, "readable", return_value=False),
        mock.patch.object(tokens, "readable", return_value=False),
    ):
        yield


@pytest.mark.parametrize("form", [form for form in FORMS if form.endswith("statistics")])
def test_coefficients_are_looked_at_in_debug_mode(form):
    """Without it a NaN among them shows in the loss."""
    tensors = tensors_of(form)
    values = torch.tensor([0.5, 1.0, math.nan, 1.0])
    given = lambda of: FORMS[form].function(
        *(of(tensors[key]) for key in FORMS[form].positional),
        coefficients=(None, of(values), 0.1), backend="torch",
    )  # fmt: skip
    distill_ops.set_debug(True)
    try:
        words = "coefficients.log_prob must hold finite numbers, got nan"
        with computing(Computed()), pytest.raises(ValueError, match=words):
            given(on_gpu)
    finally:
        distill_ops.set_debug(False)
    with as_on_a_gpu():
        assert given(lambda x: x)[0].isnan()


SHOWS = [  # never a finite number that is wrong
    (form, name) for form, name in CASES
    if form not in SHARED_ROWS  # below
    and name not in ("mask of labels", "slots repeated", "logits", "sum", "too many")
]  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize(("form", "name"), SHOWS)
def test_without_debug_mode_the_result_is_not_finite(form, name, kernel_device):
    on_device = lambda x: x.to(kernel_device("triton")) if isinstance(x, torch.Tensor) else x
    with as_on_a_gpu():
        found, _ = call(form, name, on_device, backend="triton")
    assert not found.isfinite().all()


@pytest.mark.parametrize("name", ["slot below"])
@pytest.mark.parametrize("form", [form for form in LOSSES if "topk" in form])
def test_the_other_path_shows_it_too(form, name):
    with as_on_a_gpu():
        found, _ = call(form, name, backend="torch")
    assert found.isnan()


@pytest.mark.interpreter
@pytest.mark.parametrize("form", SHARED_ROWS)
def test_a_row_that_does_not_exist_costs_its_token_alone(form, kernel_device):
    """On a GPU, where no index is looked at; one of a token that does not count does no harm."""
    device = kernel_device("triton")
    tensors = {name: x.to(device) for name, x in tensors_of(form).items()}
    masked = tensors["teacher_rows"].clone()
    masked[1] = -(2**40)  # its label is ignored
    students = {name: tensors[name].clone().requires_grad_() for name in FORMS[form].students}
    options = {"backend": "triton", "reduction": "none"}
    expected = FORMS[form](tensors, **options)
    found = FORMS[form]({**tensors, "teacher_rows": masked}, **options)
    assert torch.equal(found, expected)
    for gradient in ("forward", "backward"):
        wrong = tensors["teacher_rows"].clone()
        wrong[2] = R
        with as_on_a_gpu():
            each = FORMS[form]({**tensors, "teacher_rows": wrong}, **options)
            assert torch.equal(each[:2], expected[:2])
            assert torch.equal(each[3:], expected[3:])
            assert each[2].isnan()
            options_of_sum = {**options, "reduction": "sum", "gradient": gradient}
            FORMS[form]({**tensors, **students, "teacher_rows": wrong}, **options_of_sum).backward()
        leaf = next(iter(students.values()))
        assert leaf.grad[2].isnan().all()
        assert leaf.grad[[0, 1, 3]].isfinite().all()
        leaf.grad = None


def test_a_gpu_s_masked_rows_stay_unread():
    """Debug mode does not look at what a token of weight 0 holds."""
    student, teacher = make_logits((4, V))
    student[1] = math.nan
    mask = torch.tensor([1.0, 0, 1, 1])
    labels = torch.tensor([1, V, 2, 3])
    distill_ops.set_debug(True)
    try:
        with computing(Computed()), pytest.raises(Computed):
            distill_ops.distillation_loss(
                on_gpu(student), on_gpu(teacher), loss_mask=on_gpu(mask), labels=on_gpu(labels),
                hard_label_weight=0.5, backend="torch",
            )  # fmt: skip
    finally:
        distill_ops.set_debug(False)
