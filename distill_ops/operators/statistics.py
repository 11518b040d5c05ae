"""Registration of ``distillation_statistics`` with PyTorch, and its autograd."""

import torch

from . import host, token_host
from .chunks import Terms
from .differentiation import check_backward, save_inputs, saved_inputs
from .kernels.launch import STATISTICS, TOKEN_STATISTICS
from .ops import empty_gradient, library
from .paths import Inputs, Options, column_parameters, device_of, flat, formula_of, resolve

OUTPUTS = 5  # divergence, both log-probabilities, both entropies

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor ids, Tensor[] parameters, str[] choices, "
    "float[] numbers, SymInt[] sizes"
)
N_INPUTS = 7
library.define(
    f"distillation_statistics({_INPUTS}, bool keep)"
    " -> (Tensor outputs, Tensor agreement, Tensor statistics, Tensor token_statistics)"
)
library.define(
    f"statistics_gradient({_INPUTS}, Tensor statistics, Tensor token_statistics, Tensor upstream)"
    " -> Tensor"
)


def _parse(student, teacher, ids, parameters, *options) -> tuple[Inputs, torch.Tensor, Options]:
    return (
        Inputs(student, teacher, None, None, None, parameters),
        flat(ids),
        Options.unpack(*options),
    )


def _terms(inputs: Inputs, options: Options) -> Terms:
    return Terms(options.kind(), False, options.temperature, False, inputs.dtype())


def _host_outputs(inputs: Inputs, ids: torch.Tensor, options: Options, agreement) -> torch.Tensor:
    student, teacher, dtype = inputs.student, inputs.teacher, inputs.dtype()
    kept = ids != options.ignore_index
    parameters = column_parameters(resolve(inputs, options), inputs.dtype())
    divergence, _ = host.dense(
        _terms(inputs, options), student, teacher, None, kept.to(dtype), 1.0, 0.0, parameters,
        options.n_cols, None,
    )  # fmt: skip
    log_prob, entropy = {}, {}
    for side, logits in (("student", student), ("teacher", teacher)):
        log_prob[side], entropy[side] = token_host.log_probs(
            logits, ids, options.temperature, options.ignore_index, dtype, True
        )
    agree = (student.argmax(-1) == teacher.argmax(-1)).reshape(-1) & kept
    for x in entropy.values():
        agree &= ~x.isnan()
    agreement.copy_(agree)
    return torch.stack([divergence, *log_prob.values(), *entropy.values()])


def distillation_statistics(*arguments):
    """``outputs [OUTPUTS, ...]``, the agreement ``[...]`` and what the gradient needs of the rows:
    on the CPU the student's entropies."""
    *shared, keep = arguments
    inputs, ids, options = _parse(*shared)
    leading, n_rows, new = inputs.student.shape[:-1], inputs.n_rows, inputs.student.new_empty
    dtype = inputs.dtype()
    agreement = new(leading, dtype=torch.bool)
    if options.backend == "triton":
        from .kernels import statistics as kernel

        outputs = new((OUTPUTS, *leading), dtype=dtype)
        kept = (
            new((n_rows, n) if keep else 0, dtype=dtype) for n in (STATISTICS, TOKEN_STATISTICS)
        )
        statistics = tuple(kept)
        with device_of(inputs.student):
            kernel.run(
                formula_of(options, resolve(inputs, options)), inputs.student, inputs.teacher, ids,
                options.ignore_index, outputs=outputs, agreement=agreement.view(torch.uint8),
                statistics=statistics if keep else None,
            )  # fmt: skip
        return outputs, agreement, *statistics
    outputs = _host_outputs(inputs, ids, options, agreement.view(-1))
    entropies = outputs[3].clone() if keep else new(0, dtype=dtype)
    return outputs.view(OUTPUTS, *leading), agreement, new(0, dtype=dtype), entropies


def _distillation_statistics_fake(*arguments):
    *shared, keep = arguments
    inputs, _, options = _parse(*shared)
    leading, new, dtype = inputs.student.shape[:-1], inputs.student.new_empty, inputs.dtype()
    triton = options.backend == "triton"
    sizes = [0, inputs.n_rows if keep else 0]
    if triton:
        sizes = [(inputs.n_rows, n) if keep else 0 for n in (STATISTICS, TOKEN_STATISTICS)]
    statistics = (new(size, dtype=dtype) for size in sizes)
    return new((OUTPUTS, *leading), dtype=dtype), new(leading, dtype=torch.bool), *statistics


def statistics_gradient(*arguments):
    *shared, statistics, token_statistics, upstream = arguments
    inputs, ids, options = _parse(*shared)
    gradient = empty_gradient(inputs.student)
    upstream = upstream.reshape(OUTPUTS, -1).contiguous()
    if options.backend == "triton":
        from .kernels import statistics as kernel

        with device_of(inputs.student):
            kernel.run(
                formula_of(options, resolve(inputs, options)), inputs.student, inputs.teacher, ids,
                options.ignore_index, statistics=(statistics, token_statistics),
                gradient=gradient, upstream=upstream,
            )  # fmt: skip
    else:
        token_host.fill_combined_gradient(
            _terms(inputs, options), inputs.student, inputs.teacher, ids, token_statistics,
            (upstream[0], upstream[1], upstream[3]), column_parameters(resolve(inputs, options), inputs.dtype()),
            options.ignore_index, gradient,
        )  # fmt: skip
    return gradient


def _setup_context(ctx, inputs, output) -> None:
    *shared, keep = inputs
    if not keep:
        raise RuntimeError("distillation_statistics with keep=False got logits that require grad")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    student, teacher, ids, parameters, *ctx.options = shared
    ctx.n_parameters = len(parameters)
    save_inputs(ctx, (student, teacher, ids, parameters), *output[2:])


def _backward(ctx, upstream, *_):
    others = [None] * N_INPUTS
    others[2] = [None] * ctx.n_parameters  # PyTorch wants an entry for each tensor of the list, too
    if upstream is None:
        return None, *others
    check_backward(ctx, "distillation_statistics")
    inputs, statistics = saved_inputs(ctx)
    return statistics_gradient_op(*inputs, *ctx.options, *statistics, upstream), *others


for _name, _function, _fake in [
    ("distillation_statistics", distillation_statistics, _distillation_statistics_fake),
    ("statistics_gradient", statistics_gradient, lambda s, *_: s.new_empty(s.shape)),
]:
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distill_ops::{_name}", _fake, lib=library)
torch.library.register_autograd(
    "distill_ops::distillation_statistics", _backward, setup_context=_setup_context, lib=library
)
distillation_statistics_op = torch.ops.distill_ops.distillation_statistics.default
statistics_gradient_op = torch.ops.distill_ops.statistics_gradient.default
