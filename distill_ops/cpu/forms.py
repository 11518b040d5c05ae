"""The CPU path: from a problem to chunks of rows. ``gpu.py`` is its twin."""

import functools
import math

import torch

from .. import problem
from ..checks.slots import without_repeats
from ..divergences.base import column_parameters
from ..problem import Options
from ..results import OutputBuffers
from ..rows import Tokens, TopKTeacher, mixed, parameters_of, within_teacher
from .chunk import NEG_INF, Terms
from .dense import dense
from .metrics import metrics
from .outputs import RowOutputs
from .rows import PerRow, kept_groups, per_row
from .tokens import Buffers, fill_gradient, log_probs, tempered, write_gradient
from .tokens import log_probs_at as log_probs_at
from .topk import topk


def tokens(inputs, options: Options) -> Tokens:
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
    elif options.denominator is not None:
        over = options.denominator
    elif options.reduction == "mean":
        over = inputs.n_rows if weights is None else weights.sum()
    ids = None
    if "log_prob" in options.token_outputs:
        ids = labels if inputs.token_ids is None else inputs.token_ids.reshape(-1)
    teacher_rows = inputs.teacher_rows
    if teacher_rows is not None:
        teacher_rows = teacher_rows.reshape(-1)
        if not teacher_rows.is_cpu:  # where nobody has looked at them
            n_teacher = math.prod(inputs.teacher_leading)
            teacher_rows, weights = within_teacher(teacher_rows, n_teacher, weights, dtype)
    parameters = parameters_of(inputs, options)
    return Tokens(labels, weights, over, parameters, ids, teacher_rows)


def rows(
    options: Options, tokens: Tokens, student, teacher, gradient, dtype, upstream=None,
    outputs: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Weighted losses ``[n]`` of rows of logits, and with a hard label their components ``[2, n]``;
    fills ``gradient``, that of the reduced loss, and the token outputs of rows that count."""
    weights, over = tokens.weights, tokens.denominator
    scale = 1.0 / over if isinstance(over, torch.Tensor) or over != 0 else math.inf
    if upstream is not None:
        upstream = upstream.to(dtype)
        scale = scale * (upstream.reshape(-1, 1) if upstream.dim() else upstream.item())
    if weights is not None:
        scale = weights[:, None] * scale
    hard, soft = options.hard_label_weight, options.soft_weight
    terms = Terms(
        options.kind(), options.hard, options.temperature, options.infinities == "propagate", dtype
    )
    if isinstance(teacher, TopKTeacher):
        log_probs, ids = teacher.log_probs, teacher.ids
        if (log_probs == NEG_INF).any():
            ids = without_repeats(log_probs, ids.long())
        compute = functools.partial(topk, terms, options.tail_options, student, log_probs, ids)
    else:
        compute = functools.partial(dense, terms, student, teacher)
    per_row = PerRow(
        tokens.labels, scale * (soft * options.divergence_scale / options.temperature), scale * hard,
        column_parameters(tokens.parameters, dtype),
    )  # fmt: skip
    wanted = dict(zip(options.token_outputs, outputs, strict=True)) if outputs else {}
    others = {"outputs": RowOutputs.of(wanted, tokens.ids, options) if wanted else None}
    others["teacher_rows"] = tokens.teacher_rows
    divergence_loss, hard_loss = compute(per_row, weights, options.n_cols, gradient, **others)
    if others["outputs"] is not None:
        others["outputs"].finish()
    return mixed(divergence_loss, hard_loss, weights, options.divergence_scale, soft, hard)


def reduced(losses, components, options: Options, tokens: Tokens, leading):
    """Rows' losses ``[n]`` and components ``[2, n]`` (or None) reduced over n, which are the tokens
    ``leading``."""

    def over_tokens(x):
        if options.reduction == "none":
            return x.reshape((*x.shape[:-1], *leading))
        return x.sum(-1) / tokens.denominator

    return over_tokens(losses), over_tokens(components) if options.components else None


def loss(inputs: problem.DenseInputs | problem.TopKInputs, options: Options, made: str, gradient):
    """Loss, components and token outputs where asked for, and what is kept for the backward: nothing."""
    of_rows, dtype = tokens(inputs, options), inputs.dtype()
    outputs = OutputBuffers.of(options.token_outputs, inputs.n_rows, inputs.student, dtype)
    found = rows(
        options, of_rows, inputs.student, inputs.teacher, gradient, dtype, outputs=outputs.each()
    )
    found = reduced(*found, options, of_rows, inputs.leading)
    return (*found, *outputs.shaped(inputs.leading)), None


def gradient(
    inputs: problem.DenseInputs | problem.TopKInputs, options: Options, kept, upstream, out
) -> None:
    of_rows = tokens(inputs, options)
    rows(options, of_rows, inputs.student, inputs.teacher, out, inputs.dtype(), upstream)


def token_log_probs(inputs: problem.TokenInputs, options: problem.TokenOptions, keep: bool):
    """Log-probabilities, entropies where asked for, and what the gradient needs: the entropies."""
    found, entropies = log_probs(
        inputs.logits, inputs.ids.reshape(-1), options.temperature, options.ignore_index,
        inputs.dtype(), options.entropy,
    )  # fmt: skip
    kept = entropies.clone() if keep and options.entropy else None
    shaped = entropies.view(inputs.leading) if options.entropy else None
    return found.view(inputs.leading), shaped, kept


def token_gradient(
    inputs: problem.TokenInputs, options: problem.TokenOptions, kept, upstreams, out
) -> None:
    """``out``, which may be the logits: the gradient of ``[n]`` upstream gradients."""
    fill_gradient(
        inputs.logits, inputs.ids.reshape(-1), kept, *upstreams, options.temperature,
        options.ignore_index, out,
    )  # fmt: skip


def _divergence_terms(inputs: problem.StatisticsInputs, options: Options) -> tuple[Terms, list]:
    """Of the statistics, and the divergence's parameters."""
    terms = Terms(options.kind(), False, options.temperature, False, inputs.dtype())
    return terms, column_parameters(parameters_of(inputs, options), inputs.dtype())


def statistics_of_tokens(inputs: problem.StatisticsInputs, options: Options, keep: bool):
    """``[5, ...]``, the agreement ``[...]``, and what the gradient needs of the rows: the student's
    entropies."""
    student, teacher, dtype, ids = *inputs[:2], inputs.dtype(), inputs.ids.reshape(-1)
    kept = ids != options.ignore_index
    terms, parameters = _divergence_terms(inputs, options)
    per_row = PerRow(None, 1.0, 0.0, parameters)
    divergence, _ = dense(terms, student, teacher, per_row, kept.to(dtype), options.n_cols, None)
    (log_q, student_entropy), (log_p, teacher_entropy) = (
        log_probs(logits, ids, options.temperature, options.ignore_index, dtype, True)
        for logits in (student, teacher)
    )
    agree = (student.argmax(-1) == teacher.argmax(-1)).reshape(-1) & kept
    agree &= ~(student_entropy.isnan() | teacher_entropy.isnan())
    outputs = torch.stack([divergence, log_q, log_p, student_entropy, teacher_entropy])
    entropies = student_entropy if keep else None
    leading = inputs.leading
    return outputs.view(len(outputs), *leading), agree.view(leading), (None, entropies)


def statistics_gradient(
    inputs: problem.StatisticsInputs, options: Options, kept, upstream, out
) -> None:
    """The gradient of divergence, log-probability and entropy together, 0 where the token is ignored;
    ``upstream`` is ``[5, n]``."""
    terms, parameters = _divergence_terms(inputs, options)
    student, ids, (_, entropies) = inputs.student, inputs.ids.reshape(-1), kept
    temperature, n_cols = options.temperature, options.n_cols
    buffers = Buffers(ids.numel(), n_cols, terms.dtype, student.device)
    part = torch.empty_like(buffers.pair[0])
    groups = kept_groups(
        ids != options.ignore_index, student, inputs.teacher, gradient=out, size=buffers.size,
        copies=False,
    )  # fmt: skip
    for (logits, of_teacher, target), places_here, places in groups:
        of_divergence, of_log_prob, _, of_entropy, _ = upstream[:, places]
        chunk = logits[places_here]
        first, second = buffers(len(chunk))
        total = write_gradient(
            tempered(chunk, temperature, first), ids[places], of_log_prob, entropies[places],
            of_entropy, temperature, second, first,
        )  # fmt: skip
        if of_divergence.any():
            of_terms = part[: len(chunk)]
            scale = of_divergence[:, None] / temperature
            here = PerRow(None, scale, 0.0, per_row(parameters, places))
            dense(terms, chunk, of_teacher[places_here], here, of_divergence, n_cols, of_terms)
            total += of_terms
        target[places_here] = total.to(target.dtype)


def metrics_of_tokens(inputs: problem.MetricsInputs, options: problem.MetricsOptions):
    """Sums ``[n_sums, n]`` and the agreement ``[n]``."""
    return metrics(*inputs, options.temperature, options.n_cols, inputs.dtype())
