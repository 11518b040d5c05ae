"""Registration with PyTorch: opaque operators and their shapes for tracing.

``dense_loss`` computes the loss and, where a gradient will be wanted, either the gradient itself
(made in the forward) or what ``dense_gradient`` needs to make it in the backward. ``dense_loss_``
and ``dense_gradient_`` write the gradient over the student's logits; they have no formula for
autograd, as no operator that mutates its input can (``autograd.py``).

The options travel in three lists, because PyTorch's own cost of a call grows with the square of
the number of arguments (86 of 330 microseconds with 18 of them).
"""

import torch

from .paths import (
    Inputs,
    Options,
    device_of,
    host_gradient,
    host_loss,
    triton_gradient,
    triton_loss,
)

NO_GRADIENT, FORWARD, BACKWARD = "none", "forward", "backward"

N_TENSORS = len(Inputs._fields)
N_SHARED = N_TENSORS + 3

_OTHERS = (
    "Tensor? teacher, Tensor? loss_mask, Tensor? labels, Tensor? normalizer, "
    "Tensor[] parameters, str[] choices, float[] numbers, SymInt[] sizes"
)

library = torch.library.Library("distill_ops", "DEF")
for _schema in (
    f"dense_loss(Tensor student, {_OTHERS}, str gradient, bool components)"
    " -> (Tensor loss, Tensor components, Tensor kept)",
    f"dense_gradient(Tensor student, {_OTHERS}, Tensor statistics, Tensor upstream) -> Tensor",
    f"dense_loss_(Tensor(a!) student, {_OTHERS}, bool components)"
    " -> (Tensor loss, Tensor components)",
    f"dense_gradient_(Tensor(a!) student, {_OTHERS}, Tensor statistics, Tensor upstream) -> ()",
):
    library.define(_schema)


def empty_gradient(student: torch.Tensor) -> torch.Tensor:
    # On Linux most of a fresh CPU buffer's cost is its page faults. Asking for huge pages
    # (MADV_HUGEPAGE) was tried: 20 ms less of 80 at the median, but 200 ms more in every third call
    # of a virtual machine that returns freed memory to its host.
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def parse(arguments) -> tuple[Inputs, Options]:
    return Inputs(*arguments[:N_TENSORS]), Options.unpack(*arguments[N_TENSORS:N_SHARED])


def _loss(inputs: Inputs, options: Options, gradient, statistics, with_components: bool):
    """Loss and components; fills ``gradient`` or ``statistics`` where given."""
    with_components = with_components and options.hard_label_weight > 0
    if options.backend == "triton":
        with device_of(inputs.student):
            loss, components = triton_loss(inputs, options, gradient, statistics, with_components)
    else:
        loss, components = host_loss(inputs, options, gradient, with_components)
    if not with_components:
        components = inputs.student.new_empty(0, dtype=loss.dtype)
    return loss, components


def dense_loss(*arguments):
    inputs, options = parse(arguments)
    return loss_and_kept(inputs, options, *arguments[N_SHARED:])


def loss_and_kept(inputs: Inputs, options: Options, mode: str, with_components: bool):
    """The loss; its components where asked for; and what is kept for the backward, the gradient
    (made in the forward) or the statistics of the Triton path."""
    new = inputs.student.new_empty
    gradient = empty_gradient(inputs.student) if mode == FORWARD else None
    statistics = None
    if options.backend == "triton" and mode == BACKWARD:
        statistics = new(inputs.statistics_shape, dtype=torch.float32)
    loss, components = _loss(inputs, options, gradient, statistics, with_components)
    kept = statistics if gradient is None else gradient
    return loss, components, new(0) if kept is None else kept


def dense_loss_(*arguments):
    """The loss and its components; the gradient overwrites the student's logits."""
    inputs, options = parse(arguments)
    result = _loss(inputs, options, inputs.student, None, arguments[N_SHARED])
    increment_version(inputs.student)
    return result


def _loss_fakes(inputs: Inputs, options: Options, with_components: bool):
    new, dtype = inputs.student.new_empty, inputs.dtype()
    shape = inputs.student.shape[:-1] if options.reduction == "none" else ()
    parts = (2, *shape) if with_components and options.hard_label_weight > 0 else 0
    return new(shape, dtype=dtype), new(parts, dtype=dtype)


def _dense_loss_fake(*arguments):
    inputs, options = parse(arguments)
    return loss_and_kept_fake(inputs, options, *arguments[N_SHARED:])


def loss_and_kept_fake(inputs: Inputs, options: Options, mode: str, with_components: bool):
    if mode == BACKWARD and options.backend == "triton":
        kept = inputs.student.new_empty(inputs.statistics_shape, dtype=torch.float32)
    else:
        kept = inputs.student.new_empty(inputs.student.shape if mode == FORWARD else 0)
    return *_loss_fakes(inputs, options, with_components), kept


def _dense_loss_inplace_fake(*arguments):
    return _loss_fakes(*parse(arguments), arguments[N_SHARED])


def fill_gradient(inputs: Inputs, options: Options, statistics, upstream, gradient) -> None:
    if options.backend == "triton":
        with device_of(inputs.student):
            triton_gradient(inputs, options, statistics, upstream, gradient)
    else:
        host_gradient(inputs, options, upstream, gradient)


def dense_gradient(student, *others):
    gradient = empty_gradient(student)
    fill_gradient(*parse((student, *others)), *others[N_SHARED - 1 :], gradient)
    return gradient


def dense_gradient_(student, *others) -> None:
    fill_gradient(*parse((student, *others)), *others[N_SHARED - 1 :], student)
    increment_version(student)


def increment_version(tensor: torch.Tensor) -> None:
    """Tell autograd that the tensor has changed: Triton and ``out=`` views do not."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _dense_gradient_fake(student, *_):
    return student.new_empty(student.shape)


for _name, _function, _fake in [
    ("dense_loss", dense_loss, _dense_loss_fake),
    ("dense_gradient", dense_gradient, _dense_gradient_fake),
    ("dense_loss_", dense_loss_, _dense_loss_inplace_fake),
    ("dense_gradient_", dense_gradient_, lambda *_: None),
]:
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=library)

dense_loss_op = torch.ops.distill_ops.dense_loss.default
dense_gradient_op = torch.ops.distill_ops.dense_gradient.default
dense_loss_inplace_op = torch.ops.distill_ops.dense_loss_.default
dense_gradient_inplace_op = torch.ops.distill_ops.dense_gradient_.default
