"""Wrong calls are refused before anything is computed; right ones of another library's types are taken."""

import math
from collections import Counter
from inspect import signature

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distill_ops
from distill_ops import JensenShannon, reference
from distill_ops.checks import values
from tests.interface.hostile import CASES
from tests.support.forms import CALLED, FORMS, LOSSES, V, computing, tensors_of

IDS = [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_hostile_calls(case):
    with computing(AssertionError("something is computed")):
        with pytest.raises(case.error, match=f"(?s){case.words}"):
            case.call()


@pytest.fixture(scope="module")
def mesh():
    """Of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("form", CALLED)
def test_distributed_tensors(form, mesh):
    """A split vocabulary is not put together unasked, nor are a rank's tokens."""
    tensors = tensors_of(form)
    hard = {"hard_label_weight": 0.5} if "labels" in tensors else {}
    function = getattr(distill_ops, form.split("/")[0])
    splits = ("student_logits", "logits") if "group" in signature(function).parameters else ()
    for name, tensor in tensors.items():
        whole, split = (
            tensors | {name: distribute_tensor(tensor, mesh, [placement])}
            for placement in (Replicate(), Shard(tensor.dim() - 1))
        )
        if name in splits:
            with pytest.raises(ValueError, match=f"{name} is a DTensor of .* must be sharded on"):
                CALLED[form](whole, **hard)
            CALLED[form](split, **hard)
            continue
        for changed in (whole, split):
            with pytest.raises(TypeError, match=f"{name} is a DTensor, but must be whole: .*"):
                CALLED[form](changed, **hard)


def test_the_table():
    assert len(CASES) >= 250
    assert [name for name, n in Counter(IDS).items() if n > 1] == []
    told = {name.split(":")[0].removeprefix("reference.") for name in IDS}
    functions = {name for name in distill_ops.__all__ if callable(getattr(distill_ops, name))} - {
        "reference"
    }
    results = {
        "DistillationMetrics", "DistillationStatistics", "LossComponents", "StatisticsCoefficients",
        "TeacherTopK", "TokenOutputs",
    }  # fmt: skip
    elsewhere = {"check_divergence", "DivergenceReport"}  # tests/losses/test_declared.py
    stored = {name for name in functions if "teacher" in name.lower() or name in STORES}
    parameterless = {
        "ForwardKL",
        "ReverseKL",
        "SoftCrossEntropy",
        "TotalVariation",
        "SkewReverseKL",
    }
    assert functions - told - results - elsewhere - stored - parameterless == set()


STORES = {"rows_written", "BlockSampler"}  # tests/teacher


NUMBERS = {
    "python": (2.0, 0.25, 3, 7, -100),
    "numpy": (np.float32(2), np.float64(0.25), np.int64(3), np.int32(7), np.int64(-100)),
    "numpy half": (np.float16(2), np.float16(0.25), np.uint8(3), np.int16(7), np.int8(-100)),
    "0-d": tuple(torch.tensor(x) for x in (2.0, 0.25, 3, 7, -100)),
}


@pytest.mark.parametrize("kind", ["numpy", "numpy half", "0-d"])
@pytest.mark.parametrize("form", LOSSES)
def test_numbers_of_other_libraries(form, kind):
    """Temperature, hard-label weight, normalizer, vocabulary size and ignored label, as the same bits."""

    def call(kind):
        names = ("temperature", "hard_label_weight", "normalizer", "vocab_size", "ignore_index")
        options = dict(zip(names, NUMBERS[kind], strict=True))
        tensors = tensors_of(form)
        tensors["labels"] = tensors["labels"].clamp(max=6)
        if "teacher_ids" in tensors:
            tensors["teacher_ids"] = torch.arange(3).expand(4, 3)
        return FORMS[form](tensors, **options)

    assert torch.equal(call(kind), call("python"))


def test_numbers_of_heads_and_divergences():
    tensors = tensors_of("linear_distillation_loss")
    call = lambda *numbers: FORMS["linear_distillation_loss"](
        tensors, student_softcap=numbers[0], teacher_logit_scale=numbers[1], kept_tokens=numbers[2],
        memory_budget=numbers[3], divergence=JensenShannon(numbers[4]),
    )  # fmt: skip
    found = call(np.float32(2), np.int64(3), np.int64(4), np.int64(10**6), np.float32(0.25))
    assert torch.equal(found, call(2.0, 3, 4, 10**6, 0.25))
    assert JensenShannon(np.float64(0.25)) == JensenShannon(0.25)
    assert type(JensenShannon(np.float32(0.25)).beta) is float
    logits = tensors["teacher_hidden"]
    for k in (np.int64(2), torch.tensor(2)):
        assert torch.equal(distill_ops.teacher_topk(logits, k).ids, logits.topk(2).indices)


@pytest.mark.parametrize("form", CALLED)
def test_integers_of_32_bits(form):
    tensors = tensors_of(form)
    options = {"hard_label_weight": 0.5} if "labels" in tensors else {}
    narrow = {name: x.int() if x.dtype == torch.int64 else x for name, x in tensors.items()}
    assert torch.equal(CALLED[form](narrow, **options), CALLED[form](tensors, **options))
    if form in FORMS:
        both = (FORMS[form].gradients(x, **options) for x in (narrow, tensors))
        for one, other in zip(*both, strict=True):
            assert torch.equal(one, other)


MASKS = {  # masks and labels that are right, and the weights that they are
    "labels beyond the vocabulary only mask": ({"labels": torch.tensor([V, -100, 10**6, -7])}, [1, 0, 1, 1]),
    "an integer weight of -1": ({"loss_mask": torch.tensor([1, -1, 2, 5])}, [1, -1, 2, 5]),
    "bytes": ({"loss_mask": torch.tensor([1, 0, 200, 1], dtype=torch.uint8)}, [1, 0, 200, 1]),
    "ignore_index 0 and a mask of zeros": (
        {"loss_mask": torch.tensor([1, 0, 1, 1]), "ignore_index": 0}, [1, 0, 1, 1],
    ),
    "ignore_index 1 and a mask of ones": (
        {"loss_mask": torch.tensor([1, 0, 1, 1]), "ignore_index": 1}, [1, 0, 1, 1],
    ),
    "float weights of -100": ({"loss_mask": torch.tensor([1.0, -100, 0, 1])}, [1, -100, 0, 1]),
    "no token and a normalizer of 0": (
        {"loss_mask": torch.zeros(4), "normalizer": torch.tensor(0.0)}, [0, 0, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("name", MASKS)
def test_right_numbers(name, form):
    options, weights = MASKS[name]
    options = {"reduction": "sum", **options}
    if "normalizer" in options:
        options["reduction"] = "mean"
    tensors = {k: x for k, x in tensors_of(form).items() if k not in ("labels", "loss_mask")}
    each = FORMS[form](tensors, reduction="none")
    expected = (each * torch.tensor(weights)).sum()
    torch.testing.assert_close(FORMS[form](tensors, **options), expected, rtol=1e-5, atol=1e-5)


PIPELINES = {  # how teachers' log-probabilities come about, from logits in half precision
    "log_softmax, widened": lambda x: x.log_softmax(-1).float(),
    "softmax, widened": lambda x: x.softmax(-1).float().log(),
    "less logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "float32, rounded": lambda x: x.float().log_softmax(-1).to(x.dtype),
    "float32": lambda x: x.float().log_softmax(-1),
    "float64": lambda x: x.double().log_softmax(-1),
    "in decimals": lambda x: (x.float().log_softmax(-1) * 100).round() / 100,
    "renormalised": lambda x: x.log_softmax(-1).topk(8).values.log_softmax(-1).float(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_log_probabilities_as_they_come_are_taken(pipeline, dtype):
    generator = torch.Generator().manual_seed(3)
    for scale, height in ((0.01, 0.0), (1.0, 0.0), (3.0, 14.0), (10.0, 30.0)):
        logits = scale * torch.randn(64, 2000, generator=generator)
        logits[:, 0] += height
        log_probs, ids = PIPELINES[pipeline](logits.to(dtype)).topk(8)
        found = distill_ops.topk_distillation_loss(logits, log_probs, ids, divergence="forward_kl")
        assert found.isfinite()


def test_the_sum_of_rescaled_slots_is_their_own():
    log_probs = torch.full((4, 8), -1.0)  # of a sum of 2.9
    student, ids = torch.zeros(4, V), torch.arange(8).expand(4, 8)
    tail = {"tail": "renormalize"}
    found = distill_ops.topk_distillation_loss(student, log_probs, ids, **tail)
    expected = distill_ops.topk_distillation_loss(student, log_probs - 3, ids, **tail)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="add up to at most 1, got 2.9"):
        distill_ops.topk_distillation_loss(student, log_probs, ids)


TRACED = {
    "a mask of labels": {"loss_mask": torch.tensor([3, -100, 0, 10])},
    "an infinite weight": {"loss_mask": torch.tensor([1.0, math.inf, 0, 1])},
    "a label beyond": {"labels": torch.tensor([3, V, 0, 1]), "hard_label_weight": 0.5},
    "a negative normalizer": {"normalizer": torch.tensor(-3.0)},
}


@pytest.mark.covering("form", "name")
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("form", LOSSES)
def test_values_under_compile_and_vmap(form, name):
    """The operator that the graph calls sees what they hold."""
    options = dict(TRACED[name])
    tensors = {k: x for k, x in tensors_of(form).items() if k not in ("labels", "loss_mask")}
    numbers = {k: options.pop(k) for k in list(options) if not isinstance(options[k], torch.Tensor)}

    def call(students, given):
        return FORMS[form]({**tensors, **students}, **given, **numbers)

    students = {k: tensors[k] for k in FORMS[form].students}
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    words = f"^{next(iter(options))} must"
    with pytest.raises(ValueError, match=words):
        compiled(students, options)
    with pytest.raises(ValueError, match=words):
        torch.func.vmap(call)(
            {k: x[None] for k, x in students.items()}, {k: x[None] for k, x in options.items()}
        )


@pytest.mark.parametrize("name", ["DistillationLoss", "LinearDistillationLoss"])
def test_modules_keep_numbers_as_python_s(name):
    temperature = torch.tensor(2.0)
    module = getattr(distill_ops, name)(temperature=temperature, normalizer=np.float32(3))
    temperature.fill_(-1)
    tensors = tensors_of("linear_distillation_loss")
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    given = [tensors[k] for k in names]
    if name == "DistillationLoss":
        given = [given[0], given[2][:, :5]]
    torch.compiler.reset()
    found = torch.compile(module, fullgraph=True, backend="eager")(*given)
    assert torch.equal(found, module(*given))
    assert torch.equal(found, module(*given, temperature=2.0, normalizer=3))


def test_a_temperature_without_a_value():
    with FakeTensorMode():
        tensors = {name: x.clone() for name, x in tensors_of("distillation_loss").items()}
        with pytest.raises(TypeError, match="temperature must be .*pass a Python number"):
            FORMS["distillation_loss"](tensors, temperature=torch.empty(()))


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_environment_switches_debugging(value, expected, monkeypatch):
    monkeypatch.delenv("DISTILL_OPS_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("DISTILL_OPS_DEBUG", value)
    assert values.debug_of_environment() is expected


@pytest.mark.parametrize("value", ["false", "yes", "2"])
def test_another_word_in_the_environment(value, monkeypatch):
    monkeypatch.setenv("DISTILL_OPS_DEBUG", value)
    with pytest.raises(ValueError, match=f"DISTILL_OPS_DEBUG must be 0 or 1, got '{value}'"):
        values.debug_of_environment()


def test_the_reference_has_the_same_hints():
    with pytest.raises(ValueError, match="'jsd': pass 'jensen_shannon'"):
        reference.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), divergence="jsd")
