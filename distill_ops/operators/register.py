"""One description of an operator, and from it everything that PyTorch needs.

A :class:`LossOperator` is two functions, ``forward`` and ``gradient``, of two NamedTuples: the tensors
and the options. Their annotations give the schemas; the rest follows: fakes for tracing, autograd, a
rule for vmap, the variant that overwrites its input, the refusal of transforms that differentiate, and
a direct way for plain tensors, where the dispatcher's would be 90 of 235 microseconds.

The dispatcher's own cost of a call grows with the square of the number of arguments (86 of 330
microseconds with 18 of them), so options pass through it in three lists.
"""

from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch

from ..problem import BACKWARD, FORWARD, NO_GRADIENT
from . import saving
from .functions import OPERATORS, Direct, InPlace, as_tuple
from .packing import code_of, pack, unpack
from .transforms import each_of_batch, hides_gradient, map_in_turn, refuse_transforms, watched

library = torch.library.Library("distill_ops", "DEF")


class Plan(NamedTuple):
    """What a call is to differentiate."""

    function: str  # what the user called, for messages
    made: str  # when the gradients are made: NO_GRADIENT, FORWARD or BACKWARD
    wanted: tuple[bool, ...]  # which of the students' gradients


def schema_of(inputs: type) -> list[str]:
    """The arguments that hold an operator's tensors."""
    kinds = {torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", list[torch.Tensor]: "Tensor[]"}
    return [f"{kinds[hint]} {name}" for name, hint in get_type_hints(inputs).items()]


class LossOperator:
    """An operator and its derivative, known to PyTorch.

    Args:
        name: of the operator; its derivative is ``{name}_gradient``.
        inputs: NamedTuple of the tensors, annotated ``torch.Tensor``, ``torch.Tensor | None`` or
            ``list[torch.Tensor]``.
        options: NamedTuple of str, float, int, bool, torch.dtype, of tuples and NamedTuples of them;
            each but bool may be None (an integer that is 0 and a NaN come back as None where it may).
            One, or one of the first's, is ``backend``.
        forward: ``(inputs, options, plan) -> (outputs, kept)``, tuples of ``outputs`` and ``kept``
            entries, None where there is none. What is kept for the backward are the students'
            gradients where the plan has them made in the forward, else what ``gradient`` needs.
        gradient: ``(inputs, options, plan, kept, upstreams) -> gradients``, one a student, None where
            the plan does not want it. None: the operator has no derivative.
        fake: as ``forward``, for tensors that have shapes but no values.
        check: ``(inputs, options)``: refuses what the tensors hold, where they are real, before
            anything is computed.
        students: fields of ``inputs`` that get gradients.
        outputs, kept: how many; the first ``differentiable`` outputs take upstream gradients.
        inplace: ``forward`` and ``gradient`` take ``into=``, the first input, and write the gradient
            there: ``{name}_`` and ``{name}_gradient_`` are operators too.
        references: for a function without a namesake in ``distill_ops.reference``, what serves.
        otherwise: what a user does to call the backward again where the forward makes the gradient.
    """

    def __init__(
        self,
        name: str,
        inputs: type,
        options: type,
        *,
        forward: Callable,
        fake: Callable,
        check: Callable = lambda inputs, options: None,
        gradient: Callable | None = None,
        students: tuple[str, ...] = (),
        outputs: int = 1,
        kept: int = 0,
        differentiable: int = 1,
        inplace: bool = False,
        references: dict[str, str] | None = None,
        otherwise: str = "pass gradient='backward' without inplace",
        namespace: str = "distill_ops",
    ):
        self.name, self.inputs, self.options = name, inputs, options
        self.forward, self.gradient, self.fake, self.check = forward, gradient, fake, check
        self.students, self.n_outputs, self.n_kept = students, outputs, kept
        self.differentiable, self.references = differentiable, references or {}
        self.otherwise, self.namespace = otherwise, namespace
        self.code = code_of(options), code_of(Plan)
        tensors = schema_of(inputs)
        lists = ["str[] choices", "float[] numbers", "SymInt[] sizes"]
        saved = [f"Tensor kept_{i}" for i in range(kept)]
        upstreams = [f"Tensor? upstream_{i}" for i in range(differentiable)]
        results, gradients = ["Tensor"] * (outputs + kept), ["Tensor"] * len(students)
        self.op = self._define(name, tensors + lists, results, self._forward, self._fake)
        OPERATORS[name] = self
        if gradient is None:
            return
        self.gradient_op = self._define(
            f"{name}_gradient", tensors + lists + saved + upstreams, gradients,
            self._gradient, self._gradient_fake,
        )  # fmt: skip
        torch.library.register_autograd(
            f"{namespace}::{name}", self._backward, setup_context=self._setup_context, lib=library
        )
        if inplace:
            tensors = [tensors[0].replace("Tensor", "Tensor(a!)"), *tensors[1:]]
            self.inplace_op = self._define(
                f"{name}_", tensors + lists, ["Tensor"] * outputs, self._inplace, self._inplace_fake
            )
            self.inplace_gradient_op = self._define(
                f"{name}_gradient_", tensors + lists + saved + upstreams, [],
                self._inplace_gradient, lambda *_: None,
            )  # fmt: skip

    def _define(self, name, arguments, results, function, fake):
        library.define(f"{name}({', '.join(arguments)}) -> ({', '.join(results)})")
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.namespace}::{name}", fake, lib=library)
        op = getattr(getattr(torch.ops, self.namespace), name).default
        if not name.endswith("_"):  # one that mutates a batch has no meaning in turn
            torch.library.register_vmap(f"{self.namespace}::{name}", map_in_turn(op), lib=library)
        return op

    def __call__(
        self, function: str, inputs: NamedTuple, options: NamedTuple, made: str = NO_GRADIENT,
        *, inplace: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        """The outputs, differentiable; the operator is called directly where nothing watches the
        dispatcher. An output that was not asked for is None or empty.

        Args:
            function: what the user called, for messages.
            made: when gradients are made.
            inplace: the gradient overwrites the first input, which requires grad.
        """
        students = [getattr(inputs, name) for name in self.students]
        plan = self.plan(function, students, made)
        compiled = torch.compiler.is_compiling()
        transformed = not compiled and refuse_transforms(
            students, plan.function, self.reference(plan)
        )
        if transformed and any(map(hides_gradient, students)):
            raise no_gradient(function)
        if made == BACKWARD and not compiled:
            inputs = saving.lasting(function, inputs)
        through = transformed or watched(saving.flattened(inputs))
        if inplace:
            if transformed:
                raise NotImplementedError(
                    f"{function} with inplace=True cannot be used under torch.func transforms"
                )
            called = function, self.reference(plan), made, backend_of(options)
            direct = None if through else (options, plan)
            lists = self.packed(options, plan) if through else ()
            return InPlace.apply(self.name, called, direct, *inputs, *lists)
        if through:
            return as_tuple(self.op(*inputs, *self.packed(options, plan)))[: self.n_outputs]
        if made == NO_GRADIENT:
            self.check(inputs, options)
            return self.forward(inputs, options, plan)[0]
        return Direct.apply(self, inputs, options, plan, *students)

    def plan(self, function: str, students: list[torch.Tensor | None], made: str) -> Plan:
        wanted = [False] * len(students)
        if made != NO_GRADIENT:
            wanted = [x is not None and x.requires_grad for x in students]
        return Plan(function, made, tuple(wanted))

    def reference(self, plan: Plan) -> str:
        """What serves where this operator does not."""
        return f"distill_ops.reference.{self.references.get(plan.function, plan.function)}"

    def packed(self, options: NamedTuple, plan: Plan) -> tuple[list[str], list[float], list[int]]:
        """The last arguments of the operators."""
        lists = [], [], []
        pack(self.code[0], options, lists)
        pack(self.code[1], plan, lists)
        return lists

    def unpacked(self, arguments: tuple) -> tuple[NamedTuple, NamedTuple, Plan, tuple]:
        """Inputs, options and plan again, and the arguments that follow them."""
        n = len(self.inputs._fields)
        sources = tuple(iter(source) for source in arguments[n : n + 3])
        options = unpack(self.code[0], sources)
        plan = unpack(self.code[1], sources)
        return self.inputs(*arguments[:n]), options, plan, arguments[n + 3 :]

    def overwrite(self, inputs: NamedTuple, options: NamedTuple, plan: Plan) -> tuple:
        """The outputs; the gradient, made here, overwrites the first input."""
        self.check(inputs, options)
        outputs, _ = self.forward(inputs, options, plan, into=inputs[0])
        saving.increment_version(inputs[0])
        return outputs

    def overwrite_backward(self, inputs, options, plan: Plan, kept, upstreams) -> None:
        """The gradient overwrites the first input in the backward."""
        self.gradient(inputs, options, plan, kept, upstreams, into=inputs[0])
        saving.increment_version(inputs[0])

    def _forward(self, *arguments):
        inputs, options, plan, _ = self.unpacked(arguments)
        self.check(inputs, options)
        outputs, kept = self.forward(inputs, options, plan)
        return filled(inputs[0], (*outputs, *kept))

    def _fake(self, *arguments):
        inputs, options, plan, _ = self.unpacked(arguments)
        outputs, kept = self.fake(inputs, options, plan)
        return filled(inputs[0], (*outputs, *kept))

    def _gradient(self, *arguments):
        inputs, options, plan, others = self.unpacked(arguments)
        kept, upstreams = others[: self.n_kept], others[self.n_kept :]
        return filled(inputs[0], self.gradient(inputs, options, plan, kept, upstreams))

    def _gradient_fake(self, *arguments):
        inputs, _, plan, _ = self.unpacked(arguments)
        students = (getattr(inputs, name) for name in self.students)
        gradients = (
            x.new_empty(x.shape) if want else None
            for x, want in zip(students, plan.wanted, strict=True)
        )
        return filled(inputs[0], gradients)

    def _inplace(self, *arguments):
        inputs, options, plan, _ = self.unpacked(arguments)
        return filled(inputs[0], self.overwrite(inputs, options, plan))

    def _inplace_fake(self, *arguments):
        inputs, options, plan, _ = self.unpacked(arguments)
        return filled(inputs[0], self.fake(inputs, options, plan)[0])

    def _inplace_gradient(self, *arguments) -> None:
        inputs, options, plan, others = self.unpacked(arguments)
        kept, upstreams = others[: self.n_kept], others[self.n_kept :]
        self.overwrite_backward(inputs, options, plan, kept, upstreams)

    def _setup_context(self, ctx, inputs, output) -> None:
        problem, options, plan, _ = self.unpacked(inputs)
        output = as_tuple(output)
        self.keep(ctx, problem, options, plan, output[: self.n_outputs], output[self.n_outputs :])
        ctx.mark_non_differentiable(*self.constants(plan.made, output))

    def _backward(self, ctx, *upstreams):
        found = dict(zip(self.students, self.differentiate(ctx, upstreams), strict=True))
        fields = zip(self.inputs._fields, ctx.lengths, strict=True)
        # PyTorch wants an entry for each tensor of a list, too
        gradients = [found.get(name) if n is None else [None] * n for name, n in fields]
        return *gradients, None, None, None

    def constants(self, made: str, results: tuple) -> list[torch.Tensor]:
        """Those of outputs, and of what is kept, that have no derivative: all but the first where the
        forward makes the gradient."""
        n = 1 if made == FORWARD else self.differentiable
        return [x for x in results[n:] if x is not None]

    def keep(self, ctx, inputs, options, plan: Plan, outputs, kept) -> None:
        """Save what the backward needs."""
        ctx.set_materialize_grads(False)
        ctx.options, ctx.plan, ctx.spent = options, plan, False
        if plan.made == NO_GRADIENT:  # of another transform than those that are known
            raise no_gradient(plan.function)
        if plan.made == BACKWARD:
            saving.save(ctx, inputs, kept)
        else:
            ctx.lengths = saving.lengths(inputs)
            ctx.save_for_backward(*kept)

    def differentiate(self, ctx, upstreams) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the students."""
        upstreams = upstreams[: self.differentiable]
        if all(upstream is None for upstream in upstreams):
            return (None,) * len(self.students)
        plan, options = ctx.plan, ctx.options
        saving.check_backward(ctx, plan.function, self.reference(plan), self.otherwise)
        if plan.made == FORWARD:
            gradients = saving.scaled(ctx, upstreams[0], plan.wanted, backend_of(options))
        else:
            inputs, kept = saving.saved(ctx, self.inputs)
            if watched((*saving.flattened(inputs), *upstreams)):
                gradients = as_tuple(
                    self.gradient_op(*inputs, *self.packed(options, plan), *kept, *upstreams)
                )
            else:
                make = lambda each: self.gradient(inputs, options, plan, kept, each)
                gradients = each_of_batch(make, upstreams)
        return tuple(x if want else None for x, want in zip(gradients, plan.wanted, strict=True))


def no_gradient(function: str) -> RuntimeError:
    return RuntimeError(
        f"{function} makes no gradient under torch.func transforms (vmap, functionalize), which hide that "
        "a tensor requires grad: detach it, or call without"
    )


def backend_of(options: NamedTuple) -> str:
    """Of options, or of those of the loss among them."""
    return options.backend if hasattr(options, "backend") else backend_of(options[0])


def filled(like: torch.Tensor, results) -> tuple[torch.Tensor, ...] | torch.Tensor:
    """Results as an operator returns them: an empty tensor where there is none."""
    found = tuple(like.new_empty(0) if x is None else x for x in results)
    return found[0] if len(found) == 1 else found
