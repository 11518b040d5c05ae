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
from .packing import code_of, pack, unpack
from .transforms import map_in_turn, refuse_transforms

library = torch.library.Library("distill_ops", "DEF")

PLAIN = (torch.Tensor, torch.nn.Parameter)


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
        students: fields of ``inputs`` that get gradients.
        outputs, kept: how many; the first ``differentiable`` outputs take upstream gradients.
        inplace: ``forward`` and ``gradient`` take ``into=``, the first input, and write the gradient
            there: ``{name}_`` and ``{name}_gradient_`` are operators too.
        references: for a function without a namesake in ``distill_ops.reference``, what serves.
    """

    def __init__(
        self,
        name: str,
        inputs: type,
        options: type,
        *,
        forward: Callable,
        fake: Callable,
        gradient: Callable | None = None,
        students: tuple[str, ...] = (),
        outputs: int = 1,
        kept: int = 0,
        differentiable: int = 1,
        inplace: bool = False,
        references: dict[str, str] | None = None,
        namespace: str = "distill_ops",
    ):
        self.name, self.inputs, self.options = name, inputs, options
        self.forward, self.gradient, self.fake = forward, gradient, fake
        self.students, self.n_outputs, self.n_kept = students, outputs, kept
        self.differentiable, self.references = differentiable, references or {}
        self.namespace = namespace
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
        if inplace:
            if not torch.compiler.is_compiling() and self._refuse(plan, students):
                raise NotImplementedError("inplace=True cannot be used under torch.func transforms")
            called = function, self._reference(plan), made, backend_of(options)
            if torch.compiler.is_compiling() or dispatches(saving.flattened(inputs)):
                direct, lists = None, self.packed(options, plan)
            else:
                direct, lists = (options, plan), ()
            return _InPlace.apply(self.name, called, direct, *inputs, *lists)
        if self._watched(plan, inputs, students):
            return as_tuple(self.op(*inputs, *self.packed(options, plan)))[: self.n_outputs]
        if made == NO_GRADIENT:
            return self.forward(inputs, options, plan)[0]
        return _Direct.apply(self, inputs, options, plan, *students)

    def plan(self, function: str, students: list[torch.Tensor | None], made: str) -> Plan:
        wanted = [False] * len(students)
        if made != NO_GRADIENT:
            wanted = [x is not None and x.requires_grad for x in students]
        return Plan(function, made, tuple(wanted))

    def _refuse(self, plan: Plan, students: list[torch.Tensor | None]) -> bool:
        """Whether a transform is active that does not differentiate; the others are refused."""
        return refuse_transforms(students, plan.function, self._reference(plan))

    def _watched(self, plan: Plan, inputs: NamedTuple, students: list) -> bool:
        """Whether something watches the dispatcher: tracing, a transform or a mode, a tensor's
        class."""
        if torch.compiler.is_compiling():
            return True
        return self._refuse(plan, students) or dispatches(saving.flattened(inputs))

    def _reference(self, plan: Plan) -> str:
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

    def _forward(self, *arguments):
        inputs, options, plan, _ = self.unpacked(arguments)
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
        outputs, _ = self.forward(inputs, options, plan, into=inputs[0])
        saving.increment_version(inputs[0])
        return filled(inputs[0], outputs)

    def _inplace_fake(self, *arguments):
        inputs, options, plan, _ = self.unpacked(arguments)
        return filled(inputs[0], self.fake(inputs, options, plan)[0])

    def _inplace_gradient(self, *arguments) -> None:
        inputs, options, plan, others = self.unpacked(arguments)
        kept, upstreams = others[: self.n_kept], others[self.n_kept :]
        self.gradient(inputs, options, plan, kept, upstreams, into=inputs[0])
        saving.increment_version(inputs[0])

    def _setup_context(self, ctx, inputs, output) -> None:
        problem, options, plan, _ = self.unpacked(inputs)
        output = as_tuple(output)
        self.keep(ctx, problem, options, plan, output[: self.n_outputs], output[self.n_outputs :])
        ctx.mark_non_differentiable(*output[self.differentiable :])

    def _backward(self, ctx, *upstreams):
        found = dict(zip(self.students, self.differentiate(ctx, upstreams), strict=True))
        fields = zip(self.inputs._fields, ctx.lengths, strict=True)
        # PyTorch wants an entry for each tensor of a list, too
        gradients = [found.get(name) if n is None else [None] * n for name, n in fields]
        return *gradients, None, None, None

    def keep(self, ctx, inputs, options, plan: Plan, outputs, kept) -> None:
        """Save what the backward needs."""
        ctx.set_materialize_grads(False)
        ctx.options, ctx.plan, ctx.spent = options, plan, False
        if plan.made == NO_GRADIENT:
            raise RuntimeError(
                f"{plan.function} makes no gradient under torch.func.vmap, which hides that a tensor "
                "requires grad: detach it, or call without vmap"
            )
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
        plan = ctx.plan
        saving.check_backward(ctx, plan.function, self._reference(plan))
        if plan.made == FORWARD:
            gradients = saving.scaled(ctx, upstreams[0], ctx.plan.wanted, backend_of(ctx.options))
        else:
            inputs, kept = saving.saved(ctx, self.inputs)
            tensors = *saving.flattened(inputs), *upstreams
            if torch.compiler.is_compiling() or dispatches(tensors) or batched(upstreams):
                gradients = as_tuple(
                    self.gradient_op(*inputs, *self.packed(ctx.options, plan), *kept, *upstreams)
                )
            else:
                gradients = self.gradient(inputs, ctx.options, plan, kept, upstreams)
        return tuple(x if want else None for x, want in zip(gradients, plan.wanted, strict=True))


OPERATORS: dict[str, LossOperator] = {}


def filled(like: torch.Tensor, results) -> tuple[torch.Tensor, ...] | torch.Tensor:
    """Results as an operator returns them: an empty tensor where there is none."""
    found = tuple(like.new_empty(0) if x is None else x for x in results)
    return found[0] if len(found) == 1 else found


def as_tuple(results) -> tuple[torch.Tensor, ...]:
    """Results of an operator, which returns one of them alone."""
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def dispatches(tensors) -> bool:
    """Whether a call on these tensors must go through the dispatcher."""
    for t in tensors:
        if t is not None and type(t) not in PLAIN:
            return True
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or bool(torch._C._len_torch_dispatch_stack())


def batched(upstreams) -> bool:
    """Whether autograd maps a backward over a batch of upstreams (``is_grads_batched``, a vectorized
    jacobian): of old, not as a transform of torch.func."""
    return any(u is not None and torch._C._functorch.is_legacy_batchedtensor(u) for u in upstreams)


def backend_of(options: NamedTuple) -> str:
    """Of options, or of those of the loss among them."""
    return options.backend if hasattr(options, "backend") else backend_of(options[0])


def mark_constant(ctx, operator: LossOperator, outputs) -> None:
    """Those that have no derivative."""
    constant = [x for x in outputs[operator.differentiable :] if x is not None]
    ctx.mark_non_differentiable(*constant)


class _Direct(torch.autograd.Function):
    """An operator's forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx, operator, inputs, options, plan, *students):
        outputs, kept = operator.forward(inputs, options, plan)
        operator.keep(ctx, inputs, options, plan, outputs, kept)
        ctx.operator = operator
        mark_constant(ctx, operator, outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *upstreams):
        return None, None, None, None, *ctx.operator.differentiate(ctx, upstreams)


class _InPlace(torch.autograd.Function):
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
        else:  # options and plan: nothing watches the dispatcher
            into = inputs[0] if made == FORWARD else None
            outputs, kept = operator.forward(inputs, *direct, into=into)
            if made == FORWARD:
                saving.increment_version(into)
        if made == FORWARD:
            ctx.save_for_backward(inputs[0])
        else:
            saving.save(ctx, inputs, kept)
        mark_constant(ctx, operator, outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, upstream, *_):
        operator, others = OPERATORS[ctx.name], (None,) * ctx.n_others
        if upstream is None:
            return None, None, None, None, *others
        function, reference, made, backend = ctx.called
        saving.check_backward(ctx, function, reference)
        traced = torch.compiler.is_compiling() or type(upstream) is not torch.Tensor
        if made == BACKWARD:
            inputs, kept = saving.saved(ctx, operator.inputs)
            ctx.spent = not traced
            if ctx.direct is not None and not traced and not dispatches((upstream,)):
                operator.gradient(inputs, *ctx.direct, kept, (upstream,), into=inputs[0])
                saving.increment_version(inputs[0])
            else:
                lists = ctx.lists or operator.packed(*ctx.direct)
                arguments = *inputs, *lists, *kept, upstream
                if traced:  # the compiler plans the memory
                    return None, None, None, operator.gradient_op(*arguments), *others
                operator.inplace_gradient_op(*arguments)
            return None, None, None, inputs[0].detach(), *others
        (student,) = ctx.saved_tensors
        if traced:
            return None, None, None, student * upstream, *others
        ctx.spent = True
        gradient = student.detach()
        saving.scale_(gradient, upstream, backend)
        saving.increment_version(student)
        return None, None, None, gradient, *others
