"""Registration of the linear loss with PyTorch, and its autograd.

``linear_loss`` computes the loss and, made in the forward, the gradients that are wanted;
``linear_gradient`` makes them in the backward. Both run the engine of ``heads.py`` with the dense
loss on each block of rows. What ``ops.py`` and ``autograd.py`` say of the dense operators holds.
"""

import contextlib
import math
from typing import NamedTuple

import torch

from .differentiation import (
    check_backward,
    keep_for_backward,
    map_in_turn,
    saved_inputs,
    scaled_gradients,
)
from .heads import (
    NO_GRADIENTS,
    Engine,
    Gradients,
    Head,
    Projection,
    Selection,
    Wanted,
    gradient_fakes,
    logits_bytes,
    product_dtype,
)
from .ops import BACKWARD, FORWARD, library
from .paths import (
    Options,
    Tokens,
    TopKTeacher,
    device_of,
    host_reduced,
    host_rows,
    host_tokens,
    triton_reduced,
    triton_rows,
    triton_tokens,
    working_dtype,
)

N_HEADS = 6  # tensors of the two heads, which come first


def dtype_name(dtype: torch.dtype | None) -> str:
    """As it travels among an operator's strings."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype | None:
    return getattr(torch, name) if name else None


class LinearInputs(NamedTuple):
    """The tensors of the linear operators."""

    student_hidden: torch.Tensor  # [..., d]
    student_weight: torch.Tensor  # [V, d]
    student_bias: torch.Tensor | None  # [V]
    teacher_hidden: torch.Tensor | None  # [..., d of its own]
    teacher_weight: torch.Tensor | None
    teacher_bias: torch.Tensor | None
    teacher_log_probs: torch.Tensor | None  # [..., K]: of a top-k teacher, who has no head
    teacher_ids: torch.Tensor | None  # [..., K]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]: those of the divergence that are tensors

    @property
    def n_rows(self) -> int:
        return math.prod(self.student_hidden.shape[:-1])

    def dtype(self) -> torch.dtype:
        return working_dtype(*self[:N_HEADS], self.teacher_log_probs)

    def slots(self, tail: str, index: torch.Tensor | None) -> TopKTeacher:
        """The top-k teacher of the tokens ``index``, or of all."""
        slots = TopKTeacher.of_tokens(self.teacher_log_probs, self.teacher_ids, tail)
        return slots if index is None else slots.rows(index)


class LinearOptions(NamedTuple):
    """The options of the linear operators; ``pack`` and ``unpack`` are each other's inverse."""

    loss: Options
    tail: str  # of a top-k teacher; empty: the teacher has a head
    logits_dtype: torch.dtype
    autocast: torch.dtype | None  # in which it has products made
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    memory_budget: int | None
    kept_tokens: int | None
    wanted: Wanted

    def pack(self) -> tuple[list[str], list[float], list[int]]:
        choices, numbers, sizes = self.loss.pack()
        dtypes = [dtype_name(x) for x in self[2:4]]
        heads = [math.nan if x is None else float(x) for x in self[4:8]]
        bounds = [0 if x is None else x for x in self[8:10]]
        return (
            [self.tail, *dtypes, *choices],
            [*heads, *numbers],
            [*bounds, *map(int, self.wanted), *sizes],
        )

    @classmethod
    def unpack(cls, choices: list[str], numbers: list[float], sizes: list[int]) -> "LinearOptions":
        dtypes = [named_dtype(name) for name in choices[1:3]]
        heads = [None if math.isnan(x) else x for x in numbers[:4]]
        bounds = [x or None for x in sizes[:2]]
        wanted = Wanted(*map(bool, sizes[2:5]))
        loss = Options.unpack(choices[3:], numbers[4:], sizes[5:])
        return cls(loss, choices[0], *dtypes, *heads, *bounds, wanted)


N_TENSORS = len(LinearInputs._fields)
N_SHARED = N_TENSORS + 3

_SHARED = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_log_probs, "
    "Tensor? teacher_ids, Tensor? loss_mask, Tensor? labels, "
    "Tensor? normalizer, Tensor[] parameters, str[] choices, float[] numbers, SymInt[] sizes"
)
_GRADIENTS = "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient"
library.define(
    f"linear_loss({_SHARED}, str gradient, bool components)"
    f" -> (Tensor loss, Tensor components, {_GRADIENTS})"
)
library.define(f"linear_gradient({_SHARED}, Tensor upstream) -> ({_GRADIENTS})")


def parse(arguments) -> tuple[LinearInputs, LinearOptions]:
    return LinearInputs(*arguments[:N_TENSORS]), LinearOptions.unpack(
        *arguments[N_TENSORS:N_SHARED]
    )


def select(
    tokens: Tokens, n_rows: int, backend: str, kept_tokens: int | None
) -> tuple[Tokens, Selection]:
    """The tokens that are computed.

    The CPU path drops those of weight 0. The kernels, whose launches the GPU's values cannot decide,
    compute all, or the first ``kept_tokens`` in an order that puts weight 0 last; were there more,
    all weights are NaN, so that the loss and gradients tell of it."""
    weights = tokens.weights
    if weights is None:
        return tokens, Selection(n_rows, None, None)
    unread = weights == 0
    if backend == "torch":
        if not unread.any():
            return tokens, Selection(n_rows, None, None)
        index = (~unread).nonzero().squeeze(-1)
        return tokens.rows(index), Selection(len(index), index, None)
    bound = kept_tokens
    if bound is None or bound >= n_rows:
        return tokens, Selection(n_rows, None, unread)
    index = unread.to(torch.uint8).argsort(stable=True)[:bound]
    poison = torch.where((~unread).sum() > bound, math.nan, 1.0)
    tokens = tokens.rows(index)
    weights = tokens.weights * poison
    return tokens._replace(weights=weights), Selection(bound, index, weights == 0)


def with_upstream(tokens: Tokens, upstream: torch.Tensor, n_rows: int, dtype) -> Tokens:
    """Tokens whose weights hold the incoming gradients, ``[...]`` or ``[]``."""
    upstream = upstream.to(dtype).reshape(-1).expand(n_rows)
    if tokens.weights is None:
        return tokens._replace(weights=upstream.contiguous())
    weights = tokens.weights * upstream
    # a token that does not count takes no gradient, be it infinite
    return tokens._replace(weights=torch.where(tokens.weights == 0, 0.0, weights))


def head_of(hidden, weight, bias, scale: float, softcap: float | None) -> Head:
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, scale, softcap)


class _Run:
    """One pass over all tokens: what the row loss needs, and where it stores its results."""

    def __init__(
        self, inputs: LinearInputs, options: LinearOptions, tokens: Tokens, wanted: Wanted
    ):
        self.options, self.dtype = options.loss, inputs.dtype()
        self.triton = options.loss.backend == "triton"
        self.tokens, selection = select(
            tokens, inputs.n_rows, options.loss.backend, options.kept_tokens
        )
        wide = self.dtype == torch.float64
        logits_dtype = torch.float64 if wide else options.logits_dtype

        def projection(head: Head, selection: Selection) -> Projection:
            dtype = product_dtype(head.hidden, head.weight, wide, options.autocast)
            return Projection(head, selection, options.loss.n_cols, dtype, self.triton)

        student = head_of(*inputs[:3], options.student_scale, options.student_softcap)
        self.teacher, self.slots, teacher_bytes = None, None, 0
        if options.tail:
            self.slots = inputs.slots(options.tail, selection.index)
        elif options.loss.hard_label_weight < 1:
            head = head_of(*inputs[3:6], options.teacher_scale, options.teacher_softcap)
            # the loss does not read the logits of tokens of weight 0: they may be NaN
            self.teacher = projection(head, selection._replace(unread=None))
            teacher_bytes = logits_bytes(self.teacher, logits_dtype)
        self.engine = Engine(
            projection(student, selection),
            logits_dtype,
            wanted,
            options.memory_budget,
            teacher_bytes,
        )
        n_rows, new = selection.n_rows, inputs.student_hidden.new_empty
        n_under_work = min(self.engine.blocks.rows, n_rows)
        self.index = selection.index
        if self.teacher is not None:
            self.teacher_logits = self.engine.buffer(n_under_work, logits_dtype)
        self.losses = new(n_rows, dtype=self.dtype)
        parts = 2 if options.loss.hard_label_weight > 0 else 0
        self.components = new((parts, n_rows), dtype=self.dtype)
        self.parts = new((parts, n_under_work), dtype=self.dtype) if self.triton else None

    def row_loss(self, student, rows: slice, gradient) -> None:
        n_rows, teacher = len(student), None
        if self.slots is not None:
            teacher = self.slots.rows(rows)
        elif self.teacher is not None:
            teacher = self.teacher_logits[:n_rows]
            self.teacher.logits(self.teacher.hidden(rows), teacher)
        tokens = self.tokens.rows(rows)
        if self.triton:
            parts = self.parts
            if parts.shape[1] != n_rows:  # the last rows; the kernel wants them contiguous
                parts = parts.new_empty((len(parts), n_rows))
            triton_rows(
                self.options, tokens, student, teacher,
                gradient=gradient, losses=self.losses[rows], components=parts,
            )  # fmt: skip
        else:
            self.losses[rows], parts = host_rows(
                self.options, tokens, student, teacher, gradient, self.dtype
            )
        if len(self.components):
            self.components[:, rows] = parts

    def gradients(self) -> Gradients:
        return self.engine.run(self.row_loss)

    def reduced(self, leading, with_components: bool):
        """The loss, and its components where asked for."""
        losses, components = self.losses, self.components[: 2 if with_components else 0]
        if self.options.reduction == "none" and self.index is not None:  # to their own places
            n_rows = math.prod(leading)
            losses = losses.new_zeros(n_rows).index_copy_(0, self.index, losses)
            zeros = components.new_zeros((len(components), n_rows))
            components = zeros.index_copy_(1, self.index, components)
        if self.triton:
            return triton_reduced(losses, components, self.options, self.tokens, leading)
        over = self.tokens.denominator
        both = [host_reduced(x, self.options, over, leading) for x in (losses, components)]
        return both if with_components else (both[0], losses.new_empty(0))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def on_device(hidden: torch.Tensor):
    """The device of the kernels; without autocast, which would cast the products once more."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(device_of(hidden))
        if autocasts(hidden.device):
            stack.enter_context(torch.autocast(hidden.device.type, enabled=False))
        yield


def _tokens(inputs: LinearInputs, options: LinearOptions) -> Tokens:
    of = triton_tokens if options.loss.backend == "triton" else host_tokens
    return of(inputs, options.loss)


def linear_loss(*arguments):
    """The loss; its components where asked for; and the gradients that the forward makes."""
    inputs, options = parse(arguments)
    mode, with_components = arguments[N_SHARED:]
    with_components = with_components and options.loss.hard_label_weight > 0
    hidden = inputs.student_hidden
    with on_device(hidden):
        wanted = options.wanted if mode == FORWARD else NO_GRADIENTS
        run = _Run(inputs, options, _tokens(inputs, options), wanted)
        gradients = run.gradients()
        loss, components = run.reduced(hidden.shape[:-1], with_components)
    if not with_components:
        components = hidden.new_empty(0, dtype=loss.dtype)
    return loss, components, *gradients.outputs(hidden)


def linear_gradient(*arguments):
    """The gradients that are wanted, for the incoming gradient ``[]`` or ``[...]``."""
    inputs, options = parse(arguments)
    hidden = inputs.student_hidden
    with on_device(hidden):
        tokens = _tokens(inputs, options)
        tokens = with_upstream(tokens, arguments[N_SHARED], inputs.n_rows, inputs.dtype())
        gradients = _Run(inputs, options, tokens, options.wanted).gradients()
    return gradients.outputs(hidden)


def _linear_loss_fake(*arguments):
    inputs, options = parse(arguments)
    mode, with_components = arguments[N_SHARED:]
    new, dtype = inputs.student_hidden.new_empty, inputs.dtype()
    shape = inputs.student_hidden.shape[:-1] if options.loss.reduction == "none" else ()
    parts = (2, *shape) if with_components and options.loss.hard_label_weight > 0 else 0
    wanted = options.wanted if mode == FORWARD else NO_GRADIENTS
    return new(shape, dtype=dtype), new(parts, dtype=dtype), *gradient_fakes(inputs[:3], wanted)


def _linear_gradient_fake(*arguments):
    inputs, options = parse(arguments)
    return gradient_fakes(inputs[:3], options.wanted)


for _name, _function, _fake in [
    ("linear_loss", linear_loss, _linear_loss_fake),
    ("linear_gradient", linear_gradient, _linear_gradient_fake),
]:
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=library)

linear_loss_op = torch.ops.distill_ops.linear_loss.default
linear_gradient_op = torch.ops.distill_ops.linear_gradient.default


def _setup_context(ctx, inputs, output) -> None:
    keep_for_backward(ctx, inputs, output, N_TENSORS)


def _student_gradients(ctx, upstream) -> tuple[torch.Tensor, ...]:
    check_backward(ctx, "linear_distillation_loss")
    if ctx.mode == BACKWARD:
        inputs, _ = saved_inputs(ctx)
        return linear_gradient_op(*inputs, *ctx.options, upstream)
    return scaled_gradients(ctx, upstream, LinearOptions.unpack(*ctx.options).loss.backend)


def _backward(ctx, upstream, *_):
    others = [None] * (N_SHARED + 2)  # PyTorch wants an entry for each tensor of the list, too
    others[N_TENSORS - 1] = [None] * ctx.n_parameters
    if upstream is not None:
        wanted = LinearOptions.unpack(*ctx.options).wanted
        gradients = _student_gradients(ctx, upstream)
        others[:3] = [x if want else None for x, want in zip(gradients, wanted, strict=True)]
    return tuple(others)


torch.library.register_autograd(
    "distill_ops::linear_loss", _backward, setup_context=_setup_context, lib=library
)
torch.library.register_vmap("distill_ops::linear_loss", map_in_turn(linear_loss_op), lib=library)
