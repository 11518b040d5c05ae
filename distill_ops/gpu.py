"""The Triton path: from a problem to the kernels' launches. ``cpu/forms.py`` is its twin."""

import contextlib

import torch

from . import problem
from .divergences.base import Divergence
from .kernels import dense, gather, logits, metrics, reduction, statistics, token, topk
from .kernels.launch import STATISTICS, TOKEN_STATISTICS
from .kernels.rows import Formula
from .problem import BACKWARD, Options
from .results import OutputBuffers
from .rows import Tokens, TopKTeacher, parameters_of

OUTPUTS = statistics.OUTPUTS


def on(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def flat(per_token: torch.Tensor | None) -> torch.Tensor | None:
    return None if per_token is None else per_token.reshape(-1).contiguous()


def formula_of(options: Options, parameters: tuple[float | torch.Tensor, ...]) -> Formula:
    """What the kernels take of a divergence and its options."""
    kind = options.kind()
    facts = Divergence if kind is None else kind
    return Formula(
        value_and_slope=None if kind is None else kind.value_and_slope,
        parameters=() if kind is None else parameters,
        operands=facts.operands,
        moment=facts.moment,
        drop=facts.infinite_at_student_zero,
        restrict=facts.infinite_at_teacher_zero,
        additive=facts.additive_at_teacher_zero,
        propagate=options.infinities == "propagate",
        temperature=options.temperature,
        divergence_scale=options.divergence_scale,
        hard_label_weight=options.hard_label_weight,
        soft_weight=options.soft_weight,
        token_outputs=options.token_outputs,
        ignore_index=options.ignore_index,
    )


def tokens(inputs, options: Options) -> Tokens:
    labels, weights, n_rows = flat(inputs.labels), None, inputs.n_rows
    over = float(max(n_rows, 1)) if options.reduction == "mean" else 1.0
    if labels is not None or inputs.loss_mask is not None:
        mask = flat(inputs.loss_mask)
        weights, total = reduction.token_weights(mask, labels, options.ignore_index)
        over = total if options.reduction == "mean" else over
    if inputs.normalizer is not None:
        over = inputs.normalizer
    elif options.denominator is not None:
        over = options.denominator
    if n_rows == 0:
        over = 1.0  # loss 0, as where no token is kept
    ids = None
    if "log_prob" in options.token_outputs:
        ids = labels if inputs.token_ids is None else flat(inputs.token_ids)
    parameters = parameters_of(inputs, options)
    return Tokens(labels, weights, over, parameters, ids, flat(inputs.teacher_rows))


def rows(options: Options, tokens: Tokens, student, teacher, **buffers) -> None:
    """Fill the buffers that are given for rows of logits against such a teacher: weighted losses,
    their components, gradient or statistics, and token outputs."""
    formula = formula_of(options, tokens.parameters)
    arguments = {
        "weights": tokens.weights, "denominator": tokens.denominator, "output_ids": tokens.ids,
        "teacher_rows": tokens.teacher_rows, **buffers,
    }  # fmt: skip
    if isinstance(teacher, TopKTeacher):
        topk.run(
            formula, options.tail, student, *teacher, tokens.labels, options.n_cols,
            mass_terms=options.mass_terms, log_prob_floor=options.log_prob_floor, **arguments,
        )  # fmt: skip
    else:
        dense.run(formula, student, teacher, tokens.labels, options.n_cols, **arguments)


def reduced(losses, components, options: Options, tokens: Tokens, leading):
    """Rows' losses ``[n]`` and components ``[2, n]`` (or ``[0, n]``) reduced over n, which are the
    tokens ``leading``."""
    if options.reduction == "none":
        return losses.view(leading), components.view((components.shape[0], *leading))
    return reduction.total(losses, components, tokens.weights, tokens.denominator)


def loss(inputs: problem.DenseInputs | problem.TopKInputs, options: Options, made: str, gradient):
    """Loss, components and token outputs where asked for, and the statistics of a gradient made in the
    backward."""
    n_rows, new = inputs.n_rows, inputs.student.new_empty
    with on(inputs.student):
        of_rows = tokens(inputs, options)
        losses = new(n_rows, dtype=torch.float32)
        components = new((2 if options.hard else 0, n_rows), dtype=torch.float32)
        kept = None
        if made == BACKWARD:
            kept = new((n_rows, inputs.statistics), dtype=torch.float32)
        outputs = OutputBuffers.of(
            options.token_outputs, n_rows, losses, losses.dtype, filled=False
        )
        rows(
            options, of_rows, inputs.student, inputs.teacher, gradient=gradient, statistics=kept,
            losses=losses, components=components, outputs=outputs.each(),
        )  # fmt: skip
        components = components if options.components else components[:0]
        found = reduced(losses, components, options, of_rows, inputs.leading)
    components = found[1] if options.components else None
    return (found[0], components, *outputs.shaped(inputs.leading)), kept


def gradient(
    inputs: problem.DenseInputs | problem.TopKInputs, options: Options, kept, upstream, out
) -> None:
    upstream = upstream.reshape(-1) if upstream.dim() else upstream
    parameters, teacher_rows = parameters_of(inputs, options), flat(inputs.teacher_rows)
    of_rows = Tokens(flat(inputs.labels), None, 1.0, parameters, teacher_rows=teacher_rows)
    with on(inputs.student):
        rows(
            options, of_rows, inputs.student, inputs.teacher,
            gradient=out, statistics=kept, upstream=upstream,
        )  # fmt: skip


def scale_(gradient: torch.Tensor, upstream: torch.Tensor) -> None:
    """``gradient *= upstream`` of a contiguous gradient, upstream read on the device."""
    with on(gradient):
        reduction.scale_(gradient, upstream)


def token_log_probs(inputs: problem.TokenInputs, options: problem.TokenOptions, keep: bool):
    """Log-probabilities, entropies where asked for, and what the gradient needs."""
    shape, new = inputs.leading, inputs.logits.new_empty
    log_probs = new(shape, dtype=torch.float32)
    entropies = new(shape, dtype=torch.float32) if options.entropy else None
    kept = new((inputs.n_rows, inputs.statistics), dtype=torch.float32) if keep else None
    with on(inputs.logits):
        token.run(
            inputs.logits, flat(inputs.ids), options.temperature, options.ignore_index,
            log_probs=log_probs, entropies=entropies, statistics=kept,
        )  # fmt: skip
    return log_probs, entropies, kept


def token_gradient(
    inputs: problem.TokenInputs, options: problem.TokenOptions, kept, upstreams, out
) -> None:
    """``out``, which may be the logits: the gradient of ``[n]`` upstream gradients."""
    with on(inputs.logits):
        token.run(
            inputs.logits, flat(inputs.ids), options.temperature, options.ignore_index,
            statistics=kept, gradient=out, upstream=upstreams[0], upstream_entropy=upstreams[1],
        )  # fmt: skip


def log_probs_at(
    logits: torch.Tensor,
    ids: torch.Tensor,
    loss_mask: torch.Tensor | None,
    temperature: float,
    n_cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Log-probabilities ``[n, K]`` of rows of logits at the ids ``[n, K]``."""
    log_probs = logits.new_empty(ids.shape, dtype=dtype)
    weights = flat(loss_mask)
    if weights is not None and weights.dtype == torch.bool:
        weights = weights.view(torch.uint8)
    with on(logits):
        gather.run(
            logits, ids.contiguous(), temperature, n_cols, log_probs=log_probs, weights=weights
        )
    return log_probs


def statistics_of_tokens(inputs: problem.StatisticsInputs, options: Options, keep: bool):
    """``[OUTPUTS, ...]``, the agreement ``[...]``, and what the gradient needs of the rows."""
    new, n_rows = inputs.student.new_empty, inputs.n_rows
    outputs = new((OUTPUTS, *inputs.leading), dtype=torch.float32)
    agreement = new(inputs.leading, dtype=torch.bool)
    kept = None
    if keep:
        kept = tuple(new((n_rows, n), dtype=torch.float32) for n in (STATISTICS, TOKEN_STATISTICS))
    with on(inputs.student):
        statistics.run(
            formula_of(options, parameters_of(inputs, options)), inputs.student, inputs.teacher,
            flat(inputs.ids), options.ignore_index, outputs=outputs,
            agreement=agreement.view(torch.uint8), statistics=kept,
        )  # fmt: skip
    return outputs, agreement, kept or (None, None)


def statistics_gradient(
    inputs: problem.StatisticsInputs, options: Options, kept, upstream, out
) -> None:
    """``upstream`` is ``[OUTPUTS, n]``."""
    with on(inputs.student):
        statistics.run(
            formula_of(options, parameters_of(inputs, options)), inputs.student, inputs.teacher,
            flat(inputs.ids), options.ignore_index, statistics=kept, gradient=out,
            upstream=upstream,
        )  # fmt: skip


def metrics_of_tokens(inputs: problem.MetricsInputs, options: problem.MetricsOptions):
    """Sums ``[n_sums, n]`` and the agreement ``[n]``."""
    sums = inputs.student.new_empty((metrics.N_SUMS, inputs.n_rows), dtype=torch.float32)
    agreement = inputs.student.new_empty(inputs.n_rows, dtype=torch.uint8)
    with on(inputs.student):
        metrics.run(*inputs, options.temperature, options.n_cols, sums, agreement)
    return sums, agreement.view(torch.bool)


finish_logits = logits.finish
softcap_gradient_ = logits.softcap_gradient_
