"""What a public function hands to its operator."""

import contextlib
from typing import Any, NamedTuple
from unittest import mock

import torch

from distill_ops.operators.register import LossOperator, Plan


class Call(NamedTuple):
    """One call of an operator."""

    operator: LossOperator
    inputs: Any
    options: Any
    plan: Plan

    def arguments(self) -> tuple:
        """As PyTorch's dispatcher takes them."""
        return *self.inputs, *self.operator.packed(self.options, self.plan)

    def detached(self) -> "Call":
        def part(x):
            return (
                [y.detach() for y in x] if isinstance(x, list) else x if x is None else x.detach()
            )

        return self._replace(inputs=type(self.inputs)(*map(part, self.inputs)))

    def results(self) -> tuple:
        """Outputs and what is kept, of the operator's own body."""
        return self.operator.forward(*self.detached()[1:])


@contextlib.contextmanager
def recorded_calls():
    """The calls of operators inside, which run as ever."""
    calls = []
    original = LossOperator.__call__

    def call(operator, function, inputs, options, made="none", **others):
        students = [getattr(inputs, name) for name in operator.students]
        calls.append(Call(operator, inputs, options, operator.plan(function, students, made)))
        return original(operator, function, inputs, options, made, **others)

    with mock.patch.object(LossOperator, "__call__", call):
        yield calls


def call_of(function, *arguments, **options) -> Call:
    """The one call of an operator that a public function makes."""
    with recorded_calls() as calls:
        function(*arguments, **options)
    (call,) = calls
    return call


def opcheck_of_the_loss(function, *arguments, **options) -> None:
    call = call_of(function, *arguments, **options)
    torch.library.opcheck(call.operator.op, call.arguments())


def opcheck_of_the_gradient(function, *arguments, **options) -> None:
    """Of the operator that makes the gradient in the backward."""
    call = call_of(function, *arguments, **options)
    outputs, kept = call.results()
    inputs = call.detached()
    like = inputs.inputs[0].new_empty(0)
    kept = [like.clone() if x is None else x for x in kept]
    upstreams = [
        None if x is None else torch.full_like(x, 0.5)
        for x in outputs[: call.operator.differentiable]
    ]
    torch.library.opcheck(call.operator.gradient_op, (*inputs.arguments(), *kept, *upstreams))
