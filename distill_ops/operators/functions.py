"""An operator under autograd without the dispatcher between, and where its first input is overwritten.

Both are the direct way of :class:`LossOperator` (``register.py``), which says when they are taken."""

import torch

from ..problem import BACKWARD, FORWARD
from . import saving
from .transforms import is_batched, watched

OPERATORS: dict = {}  # by their names


def as_tuple(results) -> tuple[torch.Tensor, ...]:
    """Results of an operator, which returns one of them alone."""
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


class Direct(torch.autograd.Function):
    """An operator's forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx, operator, inputs, options, plan, *students):
        operator.check(inputs, options)
        outputs, kept = operator.forward(inputs, options, plan)
        operator.keep(ctx, inputs, options, plan, outputs, kept)
        ctx.operator = operator
        ctx.mark_non_differentiable(*operator.constants(plan.made, outputs))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *upstreams):
        return None, None, None, None, *ctx.operator.differentiate(ctx, upstreams)


class InPlace(torch.autograd.Function):
    """The gradient overwrites the first input: in the forward, or in the backward. No operator that
    mutates its input can have a formula for autograd, so this has one around it."""

    @staticmethod
    def forward(ctx, name, called, direct, *arguments):
        operator = OPERATORS[name]
        n, made = len(operator.inputs._fields), called[2]
        inputs = operator.inputs(*arguments[:n])
        ctx.name, ctx.called, ctx.direct, ctx.lists = name, called, direct, arguments[n:]
        ctx.n_others, ctx.spent = len(arguments) - 1, False
        ctx.set_materialize_grads(False)
        if direct is None:
            op = operator.inplace_op if made == FORWARD else operator.op
            results = as_tuple(op(*arguments))
            outputs, kept = results[: operator.n_outputs], results[operator.n_outputs :]
        elif made == FORWARD:  # direct holds options and plan: nothing watches the dispatcher
            outputs = operator.overwrite(inputs, *direct)
        else:
            operator.check(inputs, direct[0])
            outputs, kept = operator.forward(inputs, *direct)
        if made == FORWARD:
            ctx.save_for_backward(inputs[0])
        else:
            saving.save(ctx, inputs, kept)
        ctx.mark_non_differentiable(*operator.constants(made, outputs))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, upstream, *_):
        operator, others = OPERATORS[ctx.name], (None,) * ctx.n_others
        if upstream is None:
            return None, None, None, None, *others
        function, reference, made, backend = ctx.called
        saving.check_backward(ctx, function, reference, operator.otherwise)
        if is_batched(upstream) or torch._C._functorch.is_batchedtensor(upstream):
            raise NotImplementedError(
                f"{function} with inplace=True has one gradient, which it overwrites: pass "
                "inplace=False under vmap, jacobian(vectorize=True) or is_grads_batched=True"
            )
        through = watched((upstream,))
        traced = torch.compiler.is_compiling() or type(upstream) is not torch.Tensor
        if made == BACKWARD:
            inputs, kept = saving.saved(ctx, operator.inputs)
            ctx.spent = not traced
            if ctx.direct is not None and not through:
                operator.overwrite_backward(inputs, *ctx.direct, kept, (upstream,))
            else:
                lists = ctx.lists or operator.packed(*ctx.direct)
                arguments = *inputs, *lists, *kept, upstream
                if traced:  # the compiler plans the memory
                    return None, None, None, operator.gradient_op(*arguments), *others
                operator.inplace_gradient_op(*arguments)
            return None, None, None, inputs[0].detach(), *others
        (student,) = ctx.saved_tensors
        if through:
            return None, None, None, student * upstream, *others
        ctx.spent = True
        gradient = student.detach()
        saving.scale_(gradient, upstream, backend)
        saving.increment_version(student)
        return None, None, None, gradient, *others
