"""Operators of the top-k loss, in the manner of ``ops.py``, and their differentiation.

``topk_loss`` computes the loss and what is kept for the backward, ``topk_gradient`` the gradient from
it. The tail travels as the last of the choices.
"""

from typing import NamedTuple

import torch

from . import differentiation, ops
from .kernels.launch import TOPK_STATISTICS
from .ops import NO_GRADIENT
from .paths import Inputs, Options, TopKTeacher, working_dtype

NAME = "topk_distillation_loss"


class TopKInputs(NamedTuple):
    """The tensors of the operators, and the tail."""

    student: torch.Tensor  # [..., V]
    log_probs: torch.Tensor  # [..., K]
    ids: torch.Tensor  # [..., K]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]
    tail: str

    n_rows = Inputs.n_rows
    statistics_shape = property(lambda self: (self.n_rows, TOPK_STATISTICS))

    def dtype(self) -> torch.dtype:
        return working_dtype(self.student, self.log_probs)

    @property
    def teacher(self) -> TopKTeacher:
        return TopKTeacher.of_tokens(self.log_probs, self.ids, self.tail)


N_TENSORS = len(TopKInputs._fields) - 1
N_SHARED = N_TENSORS + 3

_SHARED = (
    "Tensor student, Tensor log_probs, Tensor ids, Tensor? loss_mask, Tensor? labels, "
    "Tensor? normalizer, Tensor[] parameters, str[] choices, float[] numbers, SymInt[] sizes"
)
ops.library.define(
    f"topk_loss({_SHARED}, str gradient, bool components)"
    " -> (Tensor loss, Tensor components, Tensor kept)"
)
ops.library.define(f"topk_gradient({_SHARED}, Tensor statistics, Tensor upstream) -> Tensor")


def pack(options: Options, tail: str) -> tuple[list[str], list[float], list[int]]:
    choices, numbers, sizes = options.pack()
    return [*choices, tail], numbers, sizes


def parse(arguments) -> tuple[TopKInputs, Options]:
    (*choices, tail), numbers, sizes = arguments[N_TENSORS:N_SHARED]
    return TopKInputs(*arguments[:N_TENSORS], tail), Options.unpack(choices, numbers, sizes)


def topk_loss(*arguments):
    return ops.loss_and_kept(*parse(arguments), *arguments[N_SHARED:])


def _topk_loss_fake(*arguments):
    return ops.loss_and_kept_fake(*parse(arguments), *arguments[N_SHARED:])


def topk_gradient(*arguments):
    gradient = ops.empty_gradient(arguments[0])
    ops.fill_gradient(*parse(arguments), *arguments[N_SHARED:], gradient)
    return gradient


def _topk_gradient_fake(student, *_):
    return student.new_empty(student.shape)


for _name, _function, _fake in [
    ("topk_loss", topk_loss, _topk_loss_fake),
    ("topk_gradient", topk_gradient, _topk_gradient_fake),
]:
    ops.library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=ops.library)

topk_loss_op = torch.ops.distill_ops.topk_loss.default
topk_gradient_op = torch.ops.distill_ops.topk_gradient.default


def _setup_context(ctx, inputs, output) -> None:
    differentiation.keep_for_backward(ctx, inputs, output, N_TENSORS)


def _backward(ctx, upstream, *_):
    gradient = differentiation.student_gradient(ctx, upstream, topk_gradient_op, NAME)
    return gradient, *differentiation.no_gradients(ctx, N_TENSORS)


torch.library.register_autograd(
    "distill_ops::topk_loss", _backward, setup_context=_setup_context, lib=ops.library
)
torch.library.register_vmap(
    "distill_ops::topk_loss", differentiation.map_in_turn(topk_loss_op), lib=ops.library
)


class _TopKLoss(torch.autograd.Function):
    """The same forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx, *arguments):
        output = topk_loss(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, upstream, *_):
        gradient = differentiation.student_gradient(ctx, upstream, topk_gradient_op, NAME)
        return gradient, *(None,) * (N_SHARED + 1)


def differentiable_topk_loss(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator, called directly where nothing watches the dispatcher."""
    if differentiation.watched(NAME, *arguments[:3]):
        return topk_loss_op(*arguments)
    if arguments[N_SHARED] == NO_GRADIENT:
        return topk_loss(*arguments)
    return _TopKLoss.apply(*arguments)
