"""Bad input: each gets its own clear error before anything runs."""

import math

import pytest
import torch

import distill_ops
from distill_ops import JensenShannon, distillation_loss, reference

STUDENT = torch.zeros(2, 3, 5)
TEACHER = torch.zeros(2, 3, 5)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
HALF = {"hard_label_weight": 0.5}
META = torch.zeros(2, 3, 5, device="meta")


def needs_grad(*shape):
    return torch.zeros(shape, requires_grad=True)


BAD = [
    # arguments, error, part of the message
    ({"student_logits": [1.0, 2.0]}, TypeError, "student_logits must be a tensor"),
    ({"student_logits": STUDENT.long()}, TypeError, "student_logits must be float32"),
    ({"teacher_logits": TEACHER.int()}, TypeError, "teacher_logits must be float32"),
    ({"student_logits": torch.zeros(())}, ValueError, "at least one column, got shape ()"),
    ({"student_logits": torch.zeros(3, 0)}, ValueError, "at least one column"),
    (
        {"teacher_logits": torch.zeros(2, 4, 5)},
        ValueError,
        r"leading shape .*\(2, 3\), got \(2, 4\)",
    ),
    ({"teacher_logits": torch.zeros(2, 3, 7)}, ValueError, "5 columns .* 7: pass vocab_size="),
    ({"teacher_logits": META}, ValueError, "teacher_logits is on meta, but student_logits on cpu"),
    ({"teacher_logits": needs_grad(2, 3, 5)}, ValueError, "teacher_logits requires grad.*detach"),
    ({"teacher_logits": None}, ValueError, "teacher_logits is None.*hard_label_weight=1"),
    ({"vocab_size": 6}, ValueError, r"vocab_size must be in \[1, 5\], got 6"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
    ({"vocab_size": 2.5}, TypeError, "vocab_size must be an int"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be positive and finite, got inf"),
    ({"temperature": torch.ones(1)}, TypeError, "temperature must be a positive number"),
    ({"divergence": "kl"}, ValueError, "divergence must be one of .*forward_kl.* got 'kl'"),
    ({"divergence": 3}, TypeError, "divergence must be a name or a Divergence"),
    ({"divergence": JensenShannon}, TypeError, "divergence must be a name or a Divergence"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of .* got 'batchmean'"),
    ({"infinities": "keep"}, ValueError, "infinities must be one of .* got 'keep'"),
    ({"gradient": "later"}, ValueError, "gradient must be one of .* got 'later'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    ({"labels": LABELS[:1]}, ValueError, r"labels must have the leading shape .*got \(1, 3\)"),
    ({"labels": LABELS.short()}, TypeError, "labels must be int64 or int32"),
    ({"labels": [0, 1]}, TypeError, "labels must be a tensor"),
    ({"labels": LABELS + 5, **HALF}, ValueError, r"labels must lie in \[0, 5\) .*got 5"),
    ({"labels": LABELS - 7, **HALF}, ValueError, r"labels must lie in \[0, 5\) .*got -7"),
    (
        {"labels": LABELS + 3, "vocab_size": 3, **HALF},
        ValueError,
        r"labels must lie in \[0, 3\) .*got 3",
    ),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
    ({"loss_mask": torch.ones(2, 3, 1)}, ValueError, "loss_mask must have the leading shape"),
    ({"loss_mask": needs_grad(2, 3)}, ValueError, "loss_mask requires grad.*detach"),
    ({"loss_mask": torch.ones(2, 3, device="meta")}, ValueError, "loss_mask is on meta"),
    ({"loss_mask": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "loss_mask must be bool"),
    ({"hard_label_weight": 0.5}, ValueError, "hard_label_weight=0.5 needs labels"),
    ({"hard_label_weight": 1.5, "labels": LABELS}, ValueError, r"must lie in \[0, 1\], got 1.5"),
    ({"hard_label_weight": "half"}, TypeError, r"hard_label_weight must be a number in \[0, 1\]"),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer .*reduction='sum'"),
    ({"normalizer": 3, "reduction": "none"}, ValueError, "normalizer .*reduction='none'"),
    ({"normalizer": -1}, ValueError, "normalizer must be finite and not negative, got -1"),
    ({"normalizer": math.nan}, ValueError, "normalizer must be finite and not negative, got nan"),
    ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be .* 0-d tensor, got .*\(2,\)"),
    ({"normalizer": needs_grad()}, ValueError, "normalizer requires grad.*detach"),
    ({"normalizer": "all"}, TypeError, "normalizer must be a number or a 0-d tensor"),
    (
        {"gradient": "forward", "reduction": "none"},
        ValueError,
        "gradient='forward' needs reduction='mean' or 'sum'",
    ),
    (
        {"gradient": "forward", "student_logits": STUDENT.half()},
        ValueError,
        "gradient='forward' with float16 .* underflow",
    ),
]


NAMES = [message.replace("\\", "") for *_, message in BAD]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=NAMES)
def test_bad_input(arguments, error, message):
    arguments = {"student_logits": STUDENT, "teacher_logits": TEACHER, **arguments}
    student, teacher = arguments.pop("student_logits"), arguments.pop("teacher_logits")
    with pytest.raises(error, match=message):
        distillation_loss(student, teacher, **arguments)
    if not {"gradient", "backend"} & set(arguments):  # the reference has the same checks
        with pytest.raises(error, match=message):
            reference.distillation_loss(student, teacher, **arguments)


IDS = torch.tensor([0, 4]).expand(2, 3, 2)
OF_TEACHERS = {  # functions of a teacher's tensor, and its last dimension
    "dense": (lambda x: distillation_loss(STUDENT, x), 5),
    "reference": (lambda x: reference.distillation_loss(STUDENT, x), 5),
    "topk": (lambda x: distill_ops.topk_distillation_loss(STUDENT, x, IDS), 2),
    "reference topk": (lambda x: reference.topk_distillation_loss(STUDENT, x, IDS), 2),
    "statistics": (lambda x: distill_ops.distillation_statistics(STUDENT, x, LABELS)[0], 5),
    "mixture": (lambda x: distill_ops.mixture_token_log_probs(STUDENT, x, LABELS, 0.5), 5),
    "teacher_topk": (lambda x: distill_ops.teacher_topk(x, 2).log_probs, 5),
    "estimate": (lambda x: distill_ops.reverse_kl_estimate(STUDENT, x, kind="k3"), 5),
}


@pytest.mark.parametrize("name", OF_TEACHERS)
def test_a_teacher_may_require_grad_where_gradients_are_off(name):
    function, width = OF_TEACHERS[name]
    teacher = torch.full((2, 3, width), -math.log(width)).requires_grad_()
    with pytest.raises(ValueError, match="requires grad.*detach it, or run the teacher under"):
        function(teacher)
    with torch.no_grad():
        assert torch.equal(function(teacher), function(teacher.detach()))


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        JensenShannon(beta)


@pytest.mark.parametrize("beta", ["half", None, True])
def test_beta_of_a_wrong_type(beta):
    with pytest.raises(TypeError, match="beta must be a number"):
        JensenShannon(beta)


def test_triton_on_a_cpu_tensor():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a GPU.*on cpu"):
        distillation_loss(STUDENT, TEACHER, backend="triton")


@pytest.mark.interpreter
def test_triton_on_float64():
    with pytest.raises(ValueError, match="backend='triton' takes .* got float64"):
        distillation_loss(STUDENT.double(), TEACHER, backend="triton")


def test_labels_equal_to_ignore_index_may_lie_outside():
    distillation_loss(STUDENT, TEACHER, labels=LABELS - 100, **HALF)


def test_unknown_options_of_the_module():
    with pytest.raises(
        TypeError, match="^DistillationLoss.* 'temprature': did you mean 'temperature'"
    ):
        distill_ops.DistillationLoss(temprature=2.0)


def test_module_equals_function():
    student, teacher = torch.randn(2, 4, 7).unbind(0)
    module = distill_ops.DistillationLoss(divergence="reverse_kl", temperature=2.0)
    mask = torch.tensor([1, 0, 1, 1])
    expected = distillation_loss(
        student, teacher, divergence="reverse_kl", temperature=2.0, loss_mask=mask
    )
    assert torch.equal(module(student, teacher, loss_mask=mask), expected)
    assert "reverse_kl" in repr(module)
