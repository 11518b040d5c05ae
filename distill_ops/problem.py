"""Where the dense loss is computed: its inputs and options, and the two ways to run them, the CPU
path and the Triton kernels. Both return losses and fill a gradient; neither knows of autograd.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch

from . import host, topk_host
from .chunks import Terms
from .divergences import DIVERGENCES, Divergence
from .kernels.launch import STATISTICS


def working_dtype(*logits: torch.Tensor | None) -> torch.dtype:
    """Of sums and results: float32, or float64 where logits are float64."""
    wide = any(x is not None and x.dtype == torch.float64 for x in logits)
    return torch.float64 if wide else torch.float32


class Options(NamedTuple):
    """The options of the dense operators; ``pack`` and ``unpack`` are each other's inverse."""

    divergence: str
    reduction: str
    infinities: str
    backend: str  # "triton" or "torch"
    temperature: float
    divergence_scale: float  # 1, or temperature squared
    hard_label_weight: float
    denominator: float  # of "mean", where a number was given; else NaN
    parameters: tuple[float, ...]  # of the divergence; NaN: given as a tensor
    n_cols: int
    ignore_index: int

    @classmethod
    def of(
        cls,
        divergence: Divergence,
        reduction: str,
        infinities: str,
        triton: bool,
        temperature: float,
        scale_by_temperature_squared: bool,
        hard_label_weight: float,
        normalizer: float | torch.Tensor | None,
        n_cols: int,
        ignore_index: int,
    ) -> "Options":
        """Of checked arguments as users give them."""
        temperature = float(temperature)
        given = not (normalizer is None or isinstance(normalizer, torch.Tensor))
        return cls(
            divergence.name, reduction, infinities, "triton" if triton else "torch", temperature,
            temperature**2 if scale_by_temperature_squared else 1.0, float(hard_label_weight),
            float(normalizer) if given else math.nan, divergence.numbers, n_cols, ignore_index,
        )  # fmt: skip

    def pack(self) -> tuple[list[str], list[float], list[int]]:
        return list(self[:4]), [*self[4:8], *self.parameters], list(self[9:])

    @classmethod
    def unpack(cls, choices: list[str], numbers: list[float], sizes: list[int]) -> "Options":
        return cls(*choices, *numbers[:4], tuple(numbers[4:]), *sizes)

    def kind(self) -> type[Divergence] | None:
        """The divergence's class, which has its facts; None where the hard label has all the weight."""
        return None if self.hard_label_weight == 1 else DIVERGENCES[self.divergence]


class Inputs(NamedTuple):
    """The tensors of the dense operators."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor | None  # [..., V]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]: those of the divergence that are tensors

    @property
    def n_rows(self) -> int:
        return self.student.numel() // self.student.shape[-1]

    @property
    def statistics_shape(self) -> tuple[int, int]:
        """Of what the kernel keeps for a gradient made in the backward."""
        return self.n_rows, STATISTICS

    def dtype(self) -> torch.dtype:
        return working_dtype(self.student, self.teacher)


class TopKTeacher(NamedTuple):
    """In the place of the teacher's logits: its K log-probabilities a row."""

    log_probs: torch.Tensor  # [n, K]
    ids: torch.Tensor  # [n, K]
    tail: str

    @staticmethod
    def of_tokens(log_probs: torch.Tensor, ids: torch.Tensor, tail: str) -> "TopKTeacher":
        """Of slots ``[..., K]``, which may be a view of more that are stored."""
        shape = math.prod(ids.shape[:-1]), ids.shape[-1]
        return TopKTeacher(*(x.contiguous().view(shape) for x in (log_probs, ids)), tail)

    def rows(self, rows: slice | torch.Tensor) -> "TopKTeacher":
        return TopKTeacher(self.log_probs[rows], self.ids[rows], self.tail)


class Tokens(NamedTuple):
    """What the rows of logits come with, for all of them or one entry a row."""

    labels: torch.Tensor | None  # [n]
    weights: torch.Tensor | None  # [n]; None: all 1
    denominator: float | torch.Tensor  # of the reduction, a number or []
    parameters: tuple[float | torch.Tensor, ...]  # of the divergence: numbers, [] or [n]

    def rows(self, rows: slice | torch.Tensor) -> "Tokens":
        """Those of some rows: a slice, or their indices."""

        def part(value):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                return value
            return value[rows] if isinstance(rows, slice) else value.index_select(0, rows)

        parameters = tuple(part(value) for value in self.parameters)
        return Tokens(part(self.labels), part(self.weights), self.denominator, parameters)


def resolve(inputs, options: Options) -> tuple[float | torch.Tensor, ...]:
    """The divergence's parameters in order: numbers, and tensors ``[]`` or ``[N]``."""
    tensors = (t.reshape(-1) if t.dim() else t for t in inputs.parameters)
    return tuple(next(tensors) if math.isnan(x) else x for x in options.parameters)


# Below ``inputs`` are those of any form of the loss: ``loss_mask``, ``labels``, ``normalizer``,
# ``parameters``, ``n_rows`` and ``dtype()`` are what is used of them.

# --- CPU path ------------------------------------------------------------------------------------


def host_tokens(inputs, options: Options) -> Tokens:
    dtype, labels, weights = inputs.dtype(), inputs.labels, None
    if inputs.loss_mask is not None:
        weights = inputs.loss_mask.reshape(-1).to(dtype)
    if labels is not None:
        labels = labels.reshape(-1)
        kept = labels != options.ignore_index
        weights = kept.to(dtype) if weights is None else weights.masked_fill(~kept, 0.0)
    over = 1.0
    if inputs.n_rows == 0 or (weights is not None and not weights.any()):
        pass  # no token kept: loss 0
    elif inputs.normalizer is not None:
        over = inputs.normalizer.to(dtype)
    elif not math.isnan(options.denominator):
        over = options.denominator
    elif options.reduction == "mean":
        over = inputs.n_rows if weights is None else weights.sum()
    return Tokens(labels, weights, over, resolve(inputs, options))


def column_parameters(
    parameters: tuple[float | torch.Tensor, ...], dtype: torch.dtype
) -> list[float | torch.Tensor]:
    """A divergence's parameters as they go with rows of columns: numbers, ``[]`` or ``[N, 1]``."""
    found = []
    for value in parameters:
        if isinstance(value, torch.Tensor):
            value = value.to(dtype)
            value = value[:, None] if value.dim() else value
        found.append(value)
    return found


def host_rows(
    options: Options, tokens: Tokens, student, teacher, gradient, dtype, upstream=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted losses ``[n]`` of rows of logits, and with a hard label their components ``[2, n]``;
    fills ``gradient``, that of the reduced loss."""
    _, weights, over, _ = tokens
    scale = 1.0 / over if isinstance(over, torch.Tensor) or over != 0 else math.inf
    if upstream is not None:
        upstream = upstream.to(dtype)
        scale = scale * (upstream.reshape(-1, 1) if upstream.dim() else upstream.item())
    if weights is not None:
        scale = weights[:, None] * scale
    w = options.hard_label_weight
    parameters = column_parameters(tokens.parameters, dtype)
    terms = Terms(
        options.kind(), w > 0, options.temperature, options.infinities == "propagate", dtype
    )
    if isinstance(teacher, TopKTeacher):
        slots = teacher.log_probs, teacher.ids.long()
        compute = functools.partial(topk_host.topk, terms, teacher.tail, student, *slots)
    else:
        compute = functools.partial(host.dense, terms, student, teacher)
    divergence_loss, hard_loss = compute(
        tokens.labels, weights,
        scale * ((1 - w) * options.divergence_scale / options.temperature), scale * w,
        parameters, options.n_cols, gradient,
    )  # fmt: skip

    def weighted(losses):
        return losses if weights is None else torch.where(weights == 0, 0.0, losses * weights)

    if divergence_loss is not None and options.divergence_scale != 1:
        divergence_loss = divergence_loss * options.divergence_scale
    if hard_loss is None:
        return weighted(divergence_loss), None
    if divergence_loss is None:
        loss, divergence_loss = hard_loss, torch.zeros_like(hard_loss)
    else:
        loss = (1 - w) * divergence_loss + w * hard_loss
    return weighted(loss), torch.stack([weighted(divergence_loss), weighted(hard_loss)])


def host_reduced(losses, options: Options, over, leading) -> torch.Tensor:
    """Rows' losses ``[..., n]`` reduced over n, which are the tokens ``leading``."""
    if options.reduction == "none":
        return losses.reshape((*losses.shape[:-1], *leading))
    return losses.sum(-1) / over


def host_loss(inputs: Inputs, options: Options, gradient, with_components: bool):
    tokens = host_tokens(inputs, options)
    losses, components = host_rows(
        options, tokens, inputs.student, inputs.teacher, gradient, inputs.dtype()
    )
    leading, over = inputs.student.shape[:-1], tokens.denominator
    if with_components:
        components = host_reduced(components, options, over, leading)
    return host_reduced(losses, options, over, leading), components


def host_gradient(inputs: Inputs, options: Options, upstream, gradient) -> None:
    tokens = host_tokens(inputs, options)
    host_rows(options, tokens, inputs.student, inputs.teacher, gradient, inputs.dtype(), upstream)


# --- Triton path ---------------------------------------------------------------------------------


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def formula_of(options: Options, parameters: tuple[float | torch.Tensor, ...]):
    from .kernels.dense import Formula

    divergence = options.kind()
    return Formula(
        value_and_slope=None if divergence is None else divergence.value_and_slope,
        parameters=() if divergence is None else parameters,
        operands="logs" if divergence is None else divergence.operands,
        moment="none" if divergence is None else divergence.moment,
        drop=divergence is not None and divergence.infinite_at_student_zero,
        restrict=divergence is not None and divergence.infinite_at_teacher_zero,
        propagate=options.infinities == "propagate",
        temperature=options.temperature,
        divergence_scale=options.divergence_scale,
        hard_label_weight=options.hard_label_weight,
    )


def flat(per_token: torch.Tensor | None) -> torch.Tensor | None:
    return None if per_token is None else per_token.reshape(-1).contiguous()


def triton_tokens(inputs, options: Options) -> Tokens:
    from .kernels import reduction

    labels, weights, n_rows = flat(inputs.labels), None, inputs.n_rows
    over = float(max(n_rows, 1)) if options.reduction == "mean" else 1.0
    if labels is not None or inputs.loss_mask is not None:
        mask = flat(inputs.loss_mask)
        weights, total = reduction.token_weights(mask, labels, options.ignore_index)
        over = total if options.reduction == "mean" else over
    if inputs.normalizer is not None:
        over = inputs.normalizer
    elif not math.isnan(options.denominator):
        over = options.denominator
    if n_rows == 0:
        over = 1.0  # loss 0, as where no token is kept
    return Tokens(labels, weights, over, resolve(inputs, options))


def triton_rows(options: Options, tokens: Tokens, student, teacher, **outputs) -> None:
    """Weighted losses of rows of logits, their components, gradient or statistics: those of
    ``kernels.dense.run`` that are given."""
    _launch(
        options, tokens.parameters, student, teacher, tokens.labels,
        weights=tokens.weights, denominator=tokens.denominator, **outputs,
    )  # fmt: skip


def _launch(options: Options, parameters, student, teacher, labels, **buffers) -> None:
    """Launch the kernel of such a teacher, which fills the buffers."""
    formula = formula_of(options, parameters)
    if isinstance(teacher, TopKTeacher):
        from .kernels import topk as kernel

        kernel.run(
            formula, teacher.tail, options.kind().additive_at_teacher_zero, student,
            teacher.log_probs, teacher.ids, labels, options.n_cols, **buffers,
        )  # fmt: skip
    else:
        from .kernels import dense as kernel

        kernel.run(formula, student, teacher, labels, options.n_cols, **buffers)


def triton_reduced(losses, components, options: Options, tokens: Tokens, leading):
    """Rows' losses ``[n]`` and components ``[2, n]`` (or ``[0]``) reduced over n, which are the
    tokens ``leading``."""
    from .kernels import reduction

    if options.reduction == "none":
        return losses.view(leading), components.view((components.shape[0], *leading))
    return reduction.total(losses, components, tokens.weights, tokens.denominator)


def triton_loss(inputs: Inputs, options: Options, gradient, statistics, with_components: bool):
    tokens = triton_tokens(inputs, options)
    n_rows, new = inputs.n_rows, inputs.student.new_empty
    losses = new(n_rows, dtype=torch.float32)
    components = new((2 if options.hard_label_weight > 0 else 0, n_rows), dtype=torch.float32)
    triton_rows(
        options, tokens, inputs.student, inputs.teacher,
        gradient=gradient, statistics=statistics, losses=losses, components=components,
    )  # fmt: skip
    components = components if with_components else components[:0]
    return triton_reduced(losses, components, options, tokens, inputs.student.shape[:-1])


def triton_gradient(inputs: Inputs, options: Options, statistics, upstream, gradient) -> None:
    _launch(
        options, resolve(inputs, options), inputs.student, inputs.teacher, flat(inputs.labels),
        gradient=gradient, statistics=statistics,
        upstream=upstream.reshape(-1) if upstream.dim() else upstream,
    )  # fmt: skip
