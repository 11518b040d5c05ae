"""What the operators of losses of logits do, whatever the teacher is."""

import torch

from ..checks import contents
from ..problem import BACKWARD, FORWARD, DenseInputs, Options, TopKInputs
from ..results import OutputBuffers
from ..vocab_parallel import losses as split_losses
from .path import path_of, phases_of
from .register import LossOperator, Plan

LOSS_OUTPUTS = 4  # loss, components, numbers and argmax of the tokens


def empty_gradient(student: torch.Tensor) -> torch.Tensor:
    # On Linux most of a fresh CPU buffer's cost is its page faults. Asking for huge pages
    # (MADV_HUGEPAGE) was tried: 20 ms less of 80 at the median, but 200 ms more in every third call
    # of a virtual machine that returns freed memory to its host.
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def forward(inputs: DenseInputs | TopKInputs, options: Options, plan: Plan, into=None):
    """Loss, components and token outputs; kept is the gradient, made here, or the statistics of the Triton
    path."""
    gradient = None
    if plan.made == FORWARD:
        gradient = empty_gradient(inputs.student) if into is None else into
    path = path_of(options.backend)
    if options.split.group is not None:
        outputs, (statistics, offset) = split_losses.loss(
            path, _phases(options), inputs, options, plan.made, gradient
        )
    else:
        outputs, statistics = path.loss(inputs, options, plan.made, gradient)
        offset = None
    return outputs, (statistics if gradient is None else gradient, offset)


def _phases(options: Options):
    return phases_of(options.backend, options.tail is not None)


def gradient(inputs, options: Options, plan: Plan, kept, upstreams, into=None):
    out = empty_gradient(inputs.student) if into is None else into
    path = path_of(options.backend)
    if options.split.group is not None:
        split_losses.gradient(path, _phases(options), inputs, options, kept, *upstreams, out)
    else:
        path.gradient(inputs, options, kept[0], *upstreams, out)
    return (out,)


def loss_fakes(inputs, options: Options) -> tuple[torch.Tensor | None, ...]:
    """Loss, components and token outputs of any form, for tracing."""
    shape = inputs.leading if options.reduction == "none" else ()
    new, dtype = inputs[0].new_empty, inputs.dtype()
    components = new((2, *shape), dtype=dtype) if options.components else None
    outputs = OutputBuffers.of(options.token_outputs, inputs.n_rows, inputs[0], dtype, filled=False)
    return new(shape, dtype=dtype), components, *outputs.shaped(inputs.leading)


def fake(inputs: DenseInputs | TopKInputs, options: Options, plan: Plan):
    kept, offset, new = None, None, inputs.student.new_empty
    split = options.split.group is not None
    if plan.made == FORWARD:
        kept = new(inputs.student.shape)
    elif plan.made == BACKWARD and (split or options.backend == "triton"):
        numbers = _phases(options).KEPT if split else inputs.statistics
        kept = new((inputs.n_rows, numbers), dtype=inputs.dtype())
        offset = new((), dtype=torch.int64) if split else None
    return loss_fakes(inputs, options), (kept, offset)


def loss_operator(name: str, inputs: type, **more) -> LossOperator:
    """The operator of a loss of logits with these tensors."""
    return LossOperator(
        name, inputs, Options, forward=forward, gradient=gradient, fake=fake, check=contents.of_loss,
        students=("student",), outputs=LOSS_OUTPUTS, kept=2, **more,
    )  # fmt: skip
