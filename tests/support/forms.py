"""Every function that makes a loss or a number of a token, called with a table of small tensors."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch

import distill_ops
from distill_ops.operators.functions import OPERATORS

N, V, D, K = 4, 11, 5, 3
R = 3  # rows of a teacher that tokens share


class Form(NamedTuple):
    """A public function, and its tensors by the names that it gives them."""

    function: Callable
    positional: tuple[str, ...]
    named: tuple[str, ...]
    students: tuple[str, ...]
    outputs: int = 0  # how many of its results are differentiable; 0: it has but one
    of_token: bool = False  # a result a token, whose gradient is made in the backward

    def __call__(self, tensors: dict[str, torch.Tensor], **options):
        """What it gives of tensors: one that is differentiable, if several are their sum."""
        given = [tensors[name] for name in self.positional]
        more = {name: tensors[name] for name in self.named if name in tensors}
        found = self.function(*given, **more, **options)
        return sum(found[: self.outputs]) if self.outputs else found

    def gradients(self, tensors: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
        """Of the sum of what it gives, one a student."""
        leaves = {name: tensors[name].detach().clone().requires_grad_() for name in self.students}
        self({**tensors, **leaves}, **options).sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    def used(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those that it takes."""
        return {name: tensors[name] for name in (*self.positional, *self.named)}


LOGITS = "student_logits", "teacher_logits"
SLOTS = "teacher_log_probs", "teacher_ids"
HEADS = "student_hidden", "student_weight", "teacher_hidden", "teacher_weight"
BIASES = "student_bias", "teacher_bias"
COUNTED = "loss_mask", "labels"
HEAD = "student_hidden", "student_weight", "student_bias"
FORMS = {
    "distillation_loss": Form(distill_ops.distillation_loss, LOGITS, COUNTED, LOGITS[:1]),
    "topk_distillation_loss": Form(
        distill_ops.topk_distillation_loss, ("student_logits", *SLOTS), COUNTED, LOGITS[:1]
    ),
    "linear_distillation_loss": Form(
        distill_ops.linear_distillation_loss, HEADS, (*BIASES, *COUNTED), HEAD
    ),
    "linear_topk_distillation_loss": Form(
        distill_ops.linear_topk_distillation_loss, (*HEADS[:2], *SLOTS),
        ("student_bias", *COUNTED), HEAD,
    ),
    "support_distillation_loss": Form(
        partial(distill_ops.support_distillation_loss, k=K), LOGITS, COUNTED, LOGITS[:1]
    ),
    "linear_support_distillation_loss": Form(
        partial(distill_ops.linear_support_distillation_loss, k=K), HEADS, (*BIASES, *COUNTED), HEAD
    ),
    "token_log_probs": Form(
        partial(distill_ops.token_log_probs, return_entropy=True), ("logits", "token_ids"), (),
        ("logits",), outputs=2, of_token=True,
    ),
    "linear_token_log_probs": Form(
        partial(distill_ops.linear_token_log_probs, return_entropy=True),
        ("hidden", "weight", "token_ids"), ("bias",), ("hidden", "weight", "bias"), outputs=2,
        of_token=True,
    ),
    "linear_distillation_statistics": Form(
        distill_ops.linear_distillation_statistics, (*HEADS, "token_ids"), BIASES, HEAD, outputs=4,
        of_token=True,
    ),
    "mixture_token_log_probs": Form(
        distill_ops.mixture_token_log_probs, (*LOGITS, "token_ids", "teacher_weight"), (),
        LOGITS[:1], of_token=True,
    ),
    "distillation_statistics": Form(
        distill_ops.distillation_statistics, (*LOGITS, "token_ids"), (), LOGITS[:1], outputs=4,
        of_token=True,
    ),
}  # fmt: skip
# the same functions with a teacher whose rows an index chooses, or whose logits stand for its head
SHARED_ROWS = {
    f"{name}/rows": form._replace(named=(*form.named, "teacher_rows"))
    for name, form in FORMS.items()
    if name.endswith("distillation_loss") and "support" not in name  # which has none
}  # fmt: skip
SHARED_ROWS["linear_distillation_loss/logits"] = Form(
    partial(distill_ops.linear_distillation_loss, teacher_hidden=None, teacher_weight=None),
    HEADS[:2], ("student_bias", "teacher_logits", "teacher_rows", *COUNTED), HEAD,
)  # fmt: skip
FORMS |= SHARED_ROWS
CALLED = FORMS | {
    "distillation_metrics": Form(distill_ops.distillation_metrics, LOGITS, (), (), outputs=7),
    "student_topk": Form(partial(distill_ops.student_topk, k=K), ("logits",), (), ()),
    "linear_student_topk": Form(
        partial(distill_ops.linear_student_topk, k=K), ("hidden", "weight"), ("bias",), ()
    ),
    "gather_log_probs": Form(
        distill_ops.gather_log_probs, ("logits", "ids"), ("loss_mask",), ()
    ),
    "linear_gather_log_probs": Form(
        distill_ops.linear_gather_log_probs, ("hidden", "weight", "ids"), ("bias", "loss_mask"), ()
    ),
}  # fmt: skip
LOSSES = [name for name in FORMS if name.endswith("distillation_loss")]


def function_of(name: str) -> str:
    """What the user calls."""
    return name.split("/")[0]


def tensors_of(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors for a form, those that have one entry a token or slot included."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    log_probs, ids = normal(N, V).log_softmax(-1).topk(K)
    tensors = {
        "student_logits": normal(N, V), "teacher_logits": normal(N, V), "logits": normal(N, V),
        "student_hidden": normal(N, D), "student_weight": normal(V, D), "student_bias": normal(V),
        "teacher_hidden": normal(N, D), "teacher_weight": normal(V, D), "teacher_bias": normal(V),
        "hidden": normal(N, D), "weight": normal(V, D), "bias": normal(V),
        "teacher_log_probs": log_probs, "teacher_ids": ids, "ids": ids,
        "token_ids": torch.tensor([1, 0, 10, 7]), "labels": torch.tensor([3, -100, 0, 10]),
        "loss_mask": torch.tensor([1.0, 1.0, 0.5, 2.0]),
    }  # fmt: skip
    if name == "mixture_token_log_probs":
        tensors["teacher_weight"] = torch.tensor([0.1, 0.5, 0.2, 0.9])
    if name in SHARED_ROWS:
        tensors["teacher_rows"] = torch.tensor([2, 0, 2, 1])
        shared = "teacher_logits", "teacher_hidden", *SLOTS
        tensors |= {key: tensors[key][:R] for key in shared}
    return CALLED[name].used(tensors)


@contextlib.contextmanager
def computing(error: Exception):
    """Operators raise this where they would compute, after all checks."""
    with contextlib.ExitStack() as stack:
        for operator in OPERATORS.values():
            stack.enter_context(mock.patch.object(operator, "forward", side_effect=error))
        yield
