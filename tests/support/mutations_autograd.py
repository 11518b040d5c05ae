"""Mistakes around the computation: launches, autograd, the gradient in place, declared divergences."""

from tests.support import sources
from tests.support.mutants import Mutation

OPTIONS = "tests/losses/test_dense.py::test_options"
DENSE = "tests/losses/test_dense.py::test_"
GRADIENTS = "tests/losses/test_dense_gradients.py::test_"
OPERATORS = "tests/interface/test_operators.py::test_"
NO_SYNC = "tests/interface/test_no_sync.py::test_nothing_is_read_"
INFERENCE = "tests/interface/test_inference_mode.py::test_"
TRANSFORMS = "tests/interface/test_transforms.py::test_"
INPLACE = "tests/interface/test_inplace.py::test_"
DECLARED = "tests/losses/test_declared.py::test_"

GPU_HOST_CODE_AND_AUTOGRAD = [
    # the Triton path's host code
    Mutation(
        "the weights' sum is read on the host", sources.GPU,
        'over = total if options.reduction == "mean" else over',
        'over = total.item() if options.reduction == "mean" else over',
        f"{NO_SYNC}on_the_host[labels_drop-none]",
    ),
    Mutation(
        "backward reads its incoming gradient", sources.OPERATORS_SAVING,
        'if gradient.device.type == "cpu":', "if True:",
        f"{NO_SYNC}through_autograd[plain-forward-fresh]",
    ),
    Mutation(
        "a launch too many", sources.GPU,
        "return reduction.total(",
        "reduction.total(losses, components, tokens.weights, tokens.denominator)\n"
        "    return reduction.total(",
        f"{NO_SYNC}on_the_host[plain-forward]",
    ),
    Mutation(
        "a kernel of PyTorch's beside ours", sources.GPU,
        "losses = new(n_rows, dtype=torch.float32)",
        "losses = new(n_rows, dtype=torch.float32).zero_()",
        f"{NO_SYNC}on_the_host[plain-forward]",
    ),
    Mutation(
        "kernels: number as normalizer ignored", sources.GPU,
        "over = options.denominator\n    if n_rows", "pass\n    if n_rows",
        f"{OPTIONS}[triton-ForwardKL()-normalizer]",
    ),
    Mutation(
        "kernels: no rows over a normalizer of 0", sources.GPU,
        "over = 1.0  # loss 0, as where no token is kept", "pass",
        f"{DENSE}no_token_at_all[triton]",
    ),
    Mutation(
        "kernels: the forward's gradient is not scaled", sources.GPU,
        "reduction.scale_(gradient, upstream)", "pass",
        f"{NO_SYNC}through_autograd[plain-forward-fresh]",
    ),
    # autograd and tracing
    Mutation(
        "host: the forward's gradient is scaled up only", sources.OPERATORS_SAVING,
        "if factor != 1:", "if factor > 1:",
        f"{GRADIENTS}both_gradient_modes_give_the_same_bits[torch-ForwardKL()]",
    ),
    Mutation(
        "a second backward scales again", sources.OPERATORS_SAVING,
        "ctx.spent = True\n    for gradient", "for gradient",
        f"{GRADIENTS}backward_twice[torch]",
    ),
    Mutation(
        "double backward is silent", sources.OPERATORS_SAVING,
        "if torch.is_grad_enabled():", "if False:",
        f"{GRADIENTS}second_derivative_is_an_error[torch]",
    ),
    Mutation(
        "components require grad", sources.OPERATORS_FUNCTIONS,
        "ctx.mark_non_differentiable(*operator.constants(plan.made, outputs))", "pass",
        f"{DENSE}components[torch-(0.3, None)-mean]",
    ),
    Mutation(
        "logits from inference mode are taken", sources.OPERATORS_SAVING,
        "if field in STREAMED:", "if False:",
        f"{INFERENCE}a_change_before_the_backward[distillation_loss-teacher_logits-backward]",
    ),
    Mutation(
        "masks from inference mode are not copied", sources.OPERATORS_SAVING,
        "            value = value.clone()", "            value = value[...]",
        f"{INFERENCE}a_change_before_the_backward[distillation_loss-loss_mask-backward]",
    ),
    Mutation(
        "a batch of upstreams is its first", sources.OPERATORS_TRANSFORMS,
        "make([u[i] if batch", "make([u[0] if batch",
        f"{TRANSFORMS}a_batch_of_upstreams[distillation_loss-{{'reduction': 'none', 'gradient': 'backward'}}]",
    ),
    Mutation(
        "values are read while tracing", sources.CHECKS_VALUES,
        "any(map(torch._C._get_dispatch_mode, TRACING))", "False",
        f"{TRANSFORMS}the_reference_under_transforms",
    ),
    Mutation(
        "the fake keeps no gradient", sources.OPERATORS_LOGITS,
        "kept = new(inputs.student.shape)", "pass",
        f"{OPERATORS}opcheck_of_the_loss[torch-forward]",
    ),
    Mutation(
        "torch.func is not refused", sources.OPERATORS_TRANSFORMS,
        "if interpreter.key() in (TransformType.Grad, TransformType.Jvp):", "if False:",
        f"{OPERATORS}transforms_that_cannot_work_are_refused[torch]",
    ),
    Mutation(
        "float16 gradients are made before the loss scale", sources.API_CHOICES,
        'reduction == "none" or float16', 'reduction == "none"',
        f"{OPERATORS}float16_gradients_survive_a_loss_scale[torch]",
    ),
    Mutation(
        "temperature instead of its square", sources.PROBLEM,
        "temperature**2 if", "temperature if",
        f"{OPTIONS}[torch-ForwardKL()-temperature_squared]",
    ),
    Mutation(
        "float64 goes to the kernels", sources.API_CHOICES,
        "        if wide:", "        if False:",
        "tests/interface/test_validation.py::test_triton_on_float64", kernels=True,
    ),
]  # fmt: skip

INPLACE_GRADIENT = [
    Mutation(
        "no version bump in the forward", sources.OPERATORS_REGISTER,
        "into=inputs[0])\n        saving.increment_version(inputs[0])\n        return outputs",
        "into=inputs[0])\n        return outputs",
        f"{INPLACE}autograd_notices_the_overwriting[triton-forward]",
    ),
    Mutation(
        "no version bump in the backward", sources.OPERATORS_REGISTER,
        "upstreams, into=inputs[0])\n        saving.increment_version(inputs[0])",
        "upstreams, into=inputs[0])",
        f"{INPLACE}autograd_notices_the_overwriting[triton-backward]",
    ),
    Mutation(
        "in place on a view of a parameter", sources.CHECKS_LOGITS,
        "base = student_logits._base", "base = None",
        f"{INPLACE}refusals[torch]",
    ),
    Mutation(
        "saved tensors unpacked twice", sources.OPERATORS_SAVING,
        "iter(ctx.saved_tensors)", "iter((ctx.saved_tensors, ctx.saved_tensors)[1])",
        f"{OPERATORS}saved_tensors_are_unpacked_once[dense, none]",
    ),
    Mutation(
        "no version bump of the scaling", sources.OPERATORS_FUNCTIONS,
        "upstream, backend)\n        saving.increment_version(student)", "upstream, backend)",
        f"{NO_SYNC}through_autograd[plain-forward-inplace]",
    ),
    Mutation(
        "the logits are overwritten a second time", sources.OPERATORS_FUNCTIONS,
        "ctx.spent = not traced",
        "pass",
        f"{INPLACE}one_backward_only[torch-backward]",
    ),
    Mutation(
        "rows done again read what the first time wrote", sources.CPU_DENSE,
        "None if matrix is None else matrix[bad] for matrix in group",
        "None if matrix is None else matrix for matrix in group",
        f"{INPLACE}infinite_rows[torch-ForwardKL()]",
    ),
    Mutation(
        "a leaf is overwritten", sources.CHECKS_LOGITS,
        "if student_logits.is_leaf or", "if False or",
        f"{INPLACE}refusals[torch]",
    ),
    Mutation(
        "the teacher is overwritten", sources.CHECKS_LOGITS,
        "if start < other_end and other_start < end:", "if False:",
        f"{INPLACE}refusals[torch]",
    ),
    Mutation(
        "written where no gradient is wanted", sources.API_DENSE,
        "inplace = inplace and made != NO_GRADIENT", 'made = "forward" if inplace else made',
        f"{INPLACE}nothing_is_written_without_a_gradient[torch]",
    ),
    Mutation(
        "a view's gradient begins where its memory does", sources.KERNELS_DENSE,
        "buffers.rows(student, student_rows, n_inner)",
        "buffers.rows(student, student_rows, n_inner)._replace(start=0)",
        f"{INPLACE}views[triton-forward-later columns]",
    ),
    Mutation(
        "strides that need a copy are not refused", sources.KERNELS_DENSE,
        "        if not layouts[0].is_in(student):\n            raise", "        if False:\n            raise",
        f"{INPLACE}strides_that_the_kernels_cannot_reach", kernels=True,
    ),
]  # fmt: skip

PARAMETERS_AND_DECLARED = [
    Mutation(
        "kernels: the first token's parameter for all", sources.KERNELS_ROWS,
        "position = tl.cast(row, tl.int64) * STRIDES[i]", "position = tl.cast(row, tl.int64) * 0",
        "tests/losses/test_parameters.py::test_each_token_has_its_own[triton-symmetric_kl]",
    ),
    Mutation(
        "parameters are not looked at", sources.DIVERGENCES_BASE,
        "inside = domain.low < value < domain.high", "inside = True",
        f"{DECLARED}declared_parameters",
    ),
    Mutation(
        "a slope is never wrong", sources.ANALYSIS_VERIFY,
        "SLOPE_TOLERANCE = 1e-8", "SLOPE_TOLERANCE = 1e8",
        f"{DECLARED}check_refuses[swapped_sign]",
    ),
    Mutation(
        "a limit is never infinite", sources.ANALYSIS_VERIFY,
        'if grows.any() and side != "both":', "if False:",
        f"{DECLARED}check_refuses[undeclared_infinity]",
    ),
    Mutation(
        "local variables are not refused", sources.DIVERGENCES_DECLARED,
        "if function.__closure__:", "if False:",
        f"{DECLARED}a_function_with_local_variables_is_refused",
    ),
]  # fmt: skip
