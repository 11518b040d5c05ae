"""Where the dense loss is computed: its inputs and options, and the two ways to run them, the CPU
path and the Triton kernels. Both return losses and fill a gradient; neither knows of autograd.
"""

import contextlib
import math
from typing import NamedTuple

import torch

from . import host
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

    def dtype(self) -> torch.dtype:
        return working_dtype(self.student, self.teacher)

    def resolve(self, options: "Options") -> tuple[float | torch.Tensor, ...]:
        """The divergence's parameters in order: numbers, and tensors ``[]`` or ``[N]``."""
        tensors = (t.reshape(-1) if t.dim() else t for t in self.parameters)
        return tuple(next(tensors) if math.isnan(x) else x for x in options.parameters)

    def run_on_host(self, terms: Terms, *arguments):
        """Losses of the rows on the CPU path, by :func:`host.dense`."""
        return host.dense(terms, self.student, self.teacher, *arguments)

    def launch(self, options: "Options", labels: torch.Tensor | None, **buffers) -> None:
        """Launch the kernel that fills the buffers."""
        from .kernels import dense as kernel

        formula = formula_of(self, options)
        kernel.run(formula, self.student, self.teacher, labels, options.n_cols, **buffers)

    @property
    def statistics_shape(self) -> tuple[int, int]:
        """Of what the kernel keeps for a gradient made in the backward."""
        return self.n_rows, STATISTICS


# --- CPU path ------------------------------------------------------------------------------------


def host_scales(inputs: Inputs, options: Options):
    """Labels and weights ``[N]`` (None: all 1), and the reduction's denominator."""
    dtype, labels, weights = inputs.dtype(), inputs.labels, None
    if inputs.loss_mask is not None:
        weights = inputs.loss_mask.reshape(-1).to(dtype)
    if labels is not None:
        labels = labels.reshape(-1)
        kept = labels != options.ignore_index
        weights = kept.to(dtype) if weights is None else weights.masked_fill(~kept, 0.0)
    if options.reduction != "mean":
        return labels, weights, 1.0
    if inputs.n_rows == 0 or (weights is not None and not weights.any()):
        return labels, weights, 1.0  # no token kept: loss 0
    if inputs.normalizer is not None:
        return labels, weights, inputs.normalizer.to(dtype)
    if not math.isnan(options.denominator):
        return labels, weights, options.denominator
    return labels, weights, inputs.n_rows if weights is None else weights.sum()


def host_run(inputs: Inputs, options: Options, scales, upstream, gradient):
    labels, weights, over = scales
    scale = 1.0 / over if isinstance(over, torch.Tensor) or over != 0 else math.inf
    if upstream is not None:
        upstream = upstream.to(inputs.dtype())
        scale = scale * (upstream.reshape(-1, 1) if upstream.dim() else upstream.item())
    if weights is not None:
        scale = weights[:, None] * scale
    w = options.hard_label_weight
    parameters = []
    for value in inputs.resolve(options):
        if isinstance(value, torch.Tensor):
            value = value.to(inputs.dtype())
            value = value[:, None] if value.dim() else value
        parameters.append(value)
    terms = Terms(
        options.kind(),
        w > 0,
        options.temperature,
        options.infinities == "propagate",
        inputs.dtype(),
    )
    return inputs.run_on_host(
        terms, labels, weights,
        scale * ((1 - w) * options.divergence_scale / options.temperature), scale * w,
        parameters, options.n_cols, gradient,
    )  # fmt: skip


def host_loss(inputs: Inputs, options: Options, gradient, with_components: bool):
    scales = host_scales(inputs, options)
    _, weights, over = scales
    divergence_loss, hard_loss = host_run(inputs, options, scales, None, gradient)

    def reduced(losses):
        if weights is not None:
            losses = torch.where(weights == 0, 0.0, losses * weights)
        if options.reduction == "none":
            return losses.reshape(inputs.student.shape[:-1])
        return losses.sum() / over

    if divergence_loss is not None and options.divergence_scale != 1:
        divergence_loss = divergence_loss * options.divergence_scale
    if hard_loss is None:
        return reduced(divergence_loss), None
    if divergence_loss is None:
        loss, divergence_loss = hard_loss, torch.zeros_like(hard_loss)
    else:
        w = options.hard_label_weight
        loss = (1 - w) * divergence_loss + w * hard_loss
    components = None
    if with_components:
        components = torch.stack([reduced(divergence_loss), reduced(hard_loss)])
    return reduced(loss), components


# --- Triton path ---------------------------------------------------------------------------------


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def formula_of(inputs: Inputs, options: Options):
    from .kernels.dense import Formula

    divergence = options.kind()
    return Formula(
        value_and_slope=None if divergence is None else divergence.value_and_slope,
        parameters=() if divergence is None else inputs.resolve(options),
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


def triton_loss(inputs: Inputs, options: Options, gradient, statistics, with_components: bool):
    from .kernels import reduction

    labels, weights = flat(inputs.labels), None
    n_rows, new = inputs.n_rows, inputs.student.new_empty
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
    losses = new(n_rows, dtype=torch.float32)
    components = new((2 if options.hard_label_weight > 0 else 0, n_rows), dtype=torch.float32)
    inputs.launch(
        options, labels, gradient=gradient, statistics=statistics, losses=losses,
        components=components, weights=weights, denominator=over,
    )  # fmt: skip
    if not with_components:
        components = components[:0]
    if options.reduction == "none":
        shape = inputs.student.shape[:-1]
        return losses.view(shape), components.view(2, *shape) if with_components else None
    return reduction.total(losses, components, weights, over)


def triton_gradient(inputs: Inputs, options: Options, statistics, upstream, gradient) -> None:
    inputs.launch(
        options, flat(inputs.labels), gradient=gradient, statistics=statistics,
        upstream=upstream.reshape(-1) if upstream.dim() else upstream,
    )  # fmt: skip
