"""Tensors of a wrong kind in every place of every function: nested, sparse, of other dtypes, elsewhere."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from tests.support.forms import CALLED, HEADS, LOGITS, LOSSES, SHARED_ROWS, tensors_of


class Hostile(NamedTuple):
    """A call without arguments, its exception, and words that the message holds in this order."""

    name: str
    call: Callable
    error: type[Exception]
    words: str


def of_form(form: str, what: str, error, words: str, **changed) -> Hostile:
    """A form called with tensors and options changed."""
    tensors = tensors_of(form)
    tensors |= {name: changed.pop(name) for name in list(changed) if name in tensors}
    return Hostile(f"{form}: {what}", lambda: CALLED[form](dict(tensors), **changed), error, words)


# --- tensors of the wrong kind ---------------------------------------------------------------------

HIDDEN = {"student_hidden", "teacher_hidden", "hidden"}
FLOATS = {*LOGITS, "logits", *HEADS, *HIDDEN, "weight", "bias", "student_bias", "teacher_bias"}
COUNTS = {"labels", "token_ids", "teacher_ids", "ids", "teacher_rows", "loss_mask"}


def nested(x: torch.Tensor, layout=torch.jagged) -> torch.Tensor:
    return torch.nested.nested_tensor(list(x), layout=layout)


WRONG_KINDS = {  # what becomes of a tensor, and words of the error
    "jagged": (nested, "nested .*values"),
    "nested": (partial(nested, layout=torch.strided), "nested .*values"),
    "sparse": (torch.Tensor.to_sparse, "must be dense.*to_dense"),
    "float8": (lambda x: x.float().to(torch.float8_e4m3fn), "must be .*float8_e4m3fn"),
    "complex": (lambda x: x.to(torch.complex64), "must be .*complex64"),
    "a list": (torch.Tensor.tolist, "must be a tensor.* got list"),
    "an array": (torch.Tensor.numpy, "must be a tensor.* got ndarray"),
    "elsewhere": (lambda x: x.to("meta"), "meta"),
    "of other tokens": (lambda x: x[:-1], "must (be|have) .*"),
}  # fmt: skip


def kinds_of(form: str):
    for name, tensor in tensors_of(form).items():
        if form in SHARED_ROWS and name not in ("teacher_rows", "teacher_logits"):
            continue  # as of the function without
        for kind, (change, words) in WRONG_KINDS.items():
            if kind in ("jagged", "nested") and tensor.dim() < 2:
                continue
            if (
                form.endswith("student_topk")
                and kind in ("elsewhere", "of other tokens")[name != "logits" :]
            ):
                continue  # nothing else is there to tell
            first = name == CALLED[form].positional[0] or name == "teacher_hidden"
            if kind in ("elsewhere", "of other tokens") and first:
                name_of_error = ".*"  # it is what others are compared with
            else:
                name_of_error = name
            if kind == "of other tokens" and name in ("student_weight", "weight", "teacher_weight"):
                continue  # a head of other widths has an error of its own
            if kind == "of other tokens" and form in SHARED_ROWS and name == "teacher_logits":
                continue  # any number of rows will do
            if (
                name == "teacher_weight"
                and form == "mixture_token_log_probs"
                and kind in ("a list", "an array")
            ):
                words = "must be a number"
            yield of_form(
                form, f"{name} {kind}", (TypeError, ValueError), f"{name_of_error}.*({words})",
                **{name: change(tensor)},
            )  # fmt: skip
        if name in FLOATS and not name.startswith("teacher_weight"):
            yield of_form(
                form,
                f"{name} of bool",
                TypeError,
                f"{name} must be float32",
                **{name: tensor.bool()},
            )
            yield of_form(
                form, f"{name} negated", TypeError, f"{name}.*resolve_neg",
                **{name: torch._neg_view(tensor)},
            )  # fmt: skip
        if name in COUNTS - {"loss_mask"}:
            yield of_form(
                form,
                f"{name} of int16",
                TypeError,
                f"{name} must be int64",
                **{name: tensor.short()},
            )
            yield of_form(
                form,
                f"{name} of float",
                TypeError,
                f"{name} must be int64",
                **{name: tensor.float()},
            )


# the mask is looked at before the labels, which are read with it
MASK_AND_LABELS = [
    of_form(
        form, f"loss_mask {kind}, with hard labels", (TypeError, ValueError),
        f"loss_mask.*({WRONG_KINDS[kind][1]})", hard_label_weight=0.5,
        loss_mask=WRONG_KINDS[kind][0](torch.ones(4)),
    )
    for form in LOSSES
    for kind in ("sparse", "a list", "an array", "complex")
]  # fmt: skip
KINDS = [case for form in CALLED for case in kinds_of(form)]
