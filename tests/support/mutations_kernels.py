"""Mistakes in the kernels, their formulas and launch choices."""

from tests.support import sources
from tests.support.mutants import Mutation

OPTIONS = "tests/losses/test_dense.py::test_options"
DENSE = "tests/losses/test_dense.py::test_"
GRADIENTS = "tests/losses/test_dense_gradients.py::test_"
SEMANTICS = "tests/oracle/test_dense.py::test_"
AHEAD_OF_TIME = "tests/compiled/test_dense.py::test_"
SKEW = "SkewForwardKL(alpha=0.1)"

FORMULAS = [
    Mutation(
        "reverse KL's slope without q", sources.KERNELS_DIVERGENCES,
        "return value, value + q\n", "return value, value\n",
        f"{SEMANTICS}slope_is_the_derivative_of_value[ReverseKL()]",
    ),
    Mutation(
        "the mixture's weights swapped", sources.KERNELS_MATH,
        "larger = of_student + of_teacher * ratio", "larger = of_teacher + of_student * ratio",
        f"{SEMANTICS}closed_forms_agree_with_the_text_they_replace[{SKEW}]",
    ),
    Mutation(
        "skew KL's slope without 1 - alpha", sources.KERNELS_DIVERGENCES,
        "(alpha - 1) * smaller", "-smaller",
        f"{SEMANTICS}closed_forms_agree_with_the_text_they_replace[{SKEW}]",
    ),
    Mutation(
        "skew KL's logarithm of the other side", sources.KERNELS_DIVERGENCES,
        "log2_p_over_m = tl.where(log2_ratio > 0, 0.0, log2_ratio)",
        "log2_p_over_m = tl.where(log2_ratio > 0, log2_ratio, 0.0)",
        f"{SEMANTICS}closed_forms_agree_with_the_text_they_replace[{SKEW}]",
    ),
    Mutation(
        "the ratio of the exponents without the sums'", sources.KERNELS_TERMS,
        "(y_t - y_s) + log_quotient(l_s, l_t) * LOG2E", "y_t - y_s",
        f"{OPTIONS}[triton-{SKEW}-plain]",
    ),
    Mutation(
        "alpha-beta not divided by alpha", sources.KERNELS_DIVERGENCES,
        "tl.exp2(log2_larger * total) * (1 / alpha)", "tl.exp2(log2_larger * total)",
        f"{SEMANTICS}closed_forms_agree_with_the_text_they_replace[AlphaBeta(alpha=0.2, beta=0.7)]",
    ),
    Mutation(
        "total variation's sign", sources.KERNELS_DIVERGENCES,
        "tl.where(q < p, -0.5, 0.0)", "tl.where(q < p, 0.5, 0.0)",
        f"{SEMANTICS}closed_forms_agree_with_the_text_they_replace[TotalVariation()]",
    ),
    Mutation(
        "symmetric KL's weights swapped", sources.KERNELS_DIVERGENCES,
        "(1 - weight) * difference + (1 - 2 * weight) * q", "weight * difference + (2 * weight - 1) * q",
        f"{SEMANTICS}closed_forms_agree_with_the_text_they_replace[SymmetricKL(weight=0.3)]",
    ),
]  # fmt: skip

SWEEPS = [
    Mutation(
        "columns before the row are read", sources.KERNELS_SWEEPS,
        "inside = (position >= lead) & (position < lead + n_cols)", "inside = position < lead + n_cols",
        f"{DENSE}shapes_and_dtypes[triton-ForwardKL()-torch.bfloat16-3-127]",
    ),
    Mutation(
        "columns after the row are 0, not -inf", sources.KERNELS_SWEEPS,
        "mask=inside, other=-INFINITY", "mask=inside, other=0.0",
        f"{OPTIONS}[triton-ForwardKL()-plain]",
    ),
    Mutation(
        "a lone partial tile is done twice", sources.KERNELS_SWEEPS,
        "tail = ((lead + n_cols) % BLOCK > 0) & (end >= first)", "tail = (lead + n_cols) % BLOCK > 0",
        f"{DENSE}strides[triton-same-shifted-37]",
    ),
    Mutation(
        "values outside the row are summed", sources.KERNELS_TERMS,
        "value = tl.where(inside, value, 0.0)", "pass",
        f"{OPTIONS}[triton-ForwardKL()-plain]",
    ),
    Mutation(
        "reverse moment not moved with the maximum", sources.KERNELS_SWEEPS,
        "factor_s * (moment_s + l_s * shift)", "factor_s * moment_s",
        f"{DENSE}shapes_and_dtypes[triton-ReverseKL()-torch.float32-3-4099]",
    ),
    Mutation(
        "lanes' moments not moved together", sources.KERNELS_SWEEPS,
        "factor_t * (moment_t + lanes_l_t * shift)", "factor_t * moment_t",
        f"{GRADIENTS}no_gradient_is_made_where_none_is_wanted[triton-40]",
    ),
    Mutation(
        "normaliser folded into one number", sources.KERNELS_TERMS,
        "return fma(y, LN2, -log_l), prob",
        "folded = fma(x, over_t, -(m * over_t + log_l))\n"
        "        return folded, tl.exp(folded)",
        f"{DENSE}logits_far_from_zero[triton-SoftCrossEntropy()--30000.0]",
    ),
    Mutation(
        "no guard of a tile of -inf", sources.KERNELS_RUNNING,
        "safe_m = finite_or_zero(new_m)", "safe_m = new_m",
        f"{SEMANTICS}infinite_logits_are_dropped[triton-forward-ForwardKL()-first_tiles]",
    ),
    Mutation(
        "kernels: reverse KL's student is not restricted", sources.KERNELS_SWEEPS,
        "x_s = tl.where(x_t == -INFINITY, -INFINITY, x_s)", "pass",
        f"{SEMANTICS}infinite_logits_are_dropped[triton-forward-ReverseKL()-teacher]",
    ),
    Mutation(
        "dropped terms keep their slope", sources.KERNELS_TERMS,
        "slope = tl.where(dead, 0.0, slope)", "pass",
        f"{SEMANTICS}infinite_logits_are_dropped[triton-forward-SoftCrossEntropy()-student]",
    ),
    Mutation(
        "a row without a softmax has a gradient", sources.KERNELS_SWEEPS,
        "gradient += poison", "pass",
        f"{SEMANTICS}rows_without_a_softmax_are_nan_and_alone[triton-forward-TotalVariation()]",
    ),
    Mutation(
        "hard label's column shifted by one", sources.KERNELS_SWEEPS,
        "tl.where(position == label_position, 1.0, 0.0)",
        "tl.where(position == label_position + 1, 1.0, 0.0)",
        f"{OPTIONS}[triton-ForwardKL()-hard]",
    ),
    Mutation(
        "gradient of dropped tokens is not 0", sources.KERNELS_SWEEPS,
        "zero = tl.zeros([LANES, WIDTH], gradient_row.dtype.element_ty)",
        "zero = tl.full([LANES, WIDTH], 1.0, gradient_row.dtype.element_ty)",
        f"{OPTIONS}[triton-ForwardKL()-bool_mask]",
    ),
    Mutation(
        "gradient beyond vocab_size is not written", sources.KERNELS_SWEEPS,
        "elif start < n_cols:", "elif start > n_cols:",
        f"{OPTIONS}[triton-ForwardKL()-vocab_size]",
    ),
]  # fmt: skip

DENSE_KERNEL = [
    Mutation(
        "nearly equal rows' losses from the moments", sources.KERNELS_ROW_LOSS,
        "if loss < NEARLY_EQUAL:", "if loss < -1.0:",
        "tests/losses/test_adversarial.py::test_symmetric_kl_of_nearly_equal_rows[triton--30000.0-none]",
    ),
    Mutation(
        "the series of p / q - 1 to its first term", sources.KERNELS_MATH,
        "1.0 + log_ratio * (0.5 + log_ratio * (1.0 / 6.0))", "1.0 + log_ratio * 0.0",
        "tests/losses/test_adversarial.py::test_symmetric_kl_of_nearly_equal_rows[triton-0.0-forward]",
    ),
    Mutation(
        "rows of a view by one stride", sources.KERNELS_ROWS,
        "row // n_inner * outer_stride + row % n_inner * inner_stride", "row * inner_stride",
        f"{DENSE}strides[triton-same-shifted-24]",
    ),
    Mutation(
        "kernels: tokens of weight 0 are read", sources.KERNELS_DENSE,
        "if weight != 0.0:", "if weight == weight:",
        f"{DENSE}dropped_tokens_are_not_read[triton-forward-ForwardKL()]",
    ),
    Mutation(
        "kernels: gradient not divided by the temperature", sources.KERNELS_DENSE,
        "scale * soft_weight * divergence_scale * over_t",
        "scale * soft_weight * divergence_scale",
        f"{OPTIONS}[triton-ForwardKL()-temperature]",
    ),
    Mutation(
        "the kept weight is not divided", sources.KERNELS_ROWS,
        "tl.store(kept + STATISTICS - 1, scale)", "tl.store(kept + STATISTICS - 1, weight)",
        f"{OPTIONS}[triton-ForwardKL()-gradient_backward]",
    ),
    Mutation(
        "the hard label's normaliser at the temperature", sources.KERNELS_DENSE,
        "TEMPERED=formula.hard_label_weight != 0 and formula.temperature != 1", "TEMPERED=False",
        f"{OPTIONS}[triton-ForwardKL()-hard_temperature]",
    ),
    Mutation(
        "rows are peeled in deterministic mode", sources.KERNELS_ROWS,
        "if not aligned and not torch.are_deterministic_algorithms_enabled():", "if not aligned:",
        f"{GRADIENTS}same_bits_in_any_batch_position_in_deterministic_mode[triton-49]",
    ),
    Mutation(
        "per-token upstream gradients by one", sources.KERNELS_ROWS,
        '"upstream_stride": 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)',
        '"upstream_stride": 0',
        f"{OPTIONS}[triton-ForwardKL()-none]",
    ),
    Mutation(
        "components of the second row onwards", sources.KERNELS_ROWS,
        "tl.store(components_ptr + n_rows + row, hard_loss)", "tl.store(components_ptr + row, hard_loss)",
        f"{DENSE}components[triton-0.3-mean]",
    ),
    Mutation(
        "16-byte loads that the compiler cannot prove", sources.KERNELS_ROWS,
        "return pointer + offset // 8 * 8", "return pointer + (offset - lead)",
        f"{AHEAD_OF_TIME}dense_kernel_for_nvidia[soft_cross_entropy-bf16 odd-sm_90]",
    ),
    Mutation(
        "a slow logarithm", sources.KERNELS_MATH,
        "if INTERPRETED:\n        return tl.log2(x)", "if INTERPRETED or True:\n        return tl.log2(x)",
        "tests/compiled/test_dense.py::test_instructions_of_one_divergence",
    ),
    Mutation(
        "no token kept over a normalizer of 0", sources.KERNELS_REDUCTION,
        "loss = tl.where(tl.sum(n_kept) == 0, 0.0, loss)", "pass",
        f"{DENSE}a_zero_normalizer_without_kept_tokens[triton]",
    ),
    Mutation(
        "kernels: ignored labels count", sources.KERNELS_REDUCTION,
        "weight = tl.where(label == ignore_index, 0.0, weight)", "pass",
        f"{OPTIONS}[triton-ForwardKL()-labels_drop]",
    ),
    Mutation(
        "leading dimensions always collapse", sources.KERNELS_LAYOUT,
        "if left != n * right:", "if False:",
        f"{DENSE}strides[triton-same-shifted-24]",
    ),
    Mutation(
        "every misalignment matches", sources.KERNELS_LAYOUT,
        "return all((a - b) % ALIGNMENT == 0 for a, b in pairs)", "return True",
        f"{DENSE}strides[triton-contiguous-later-37]",
    ),
    Mutation(
        "two programs where the cache holds one", sources.KERNELS_LAUNCH,
        "<= L2_SHARE * device.l2_bytes", ">= L2_SHARE * device.l2_bytes",
        f"{AHEAD_OF_TIME}rows_in_flight_fit_the_cache_where_two_programs_are_chosen",
    ),
    Mutation(
        "registers beyond the file", sources.KERNELS_LAUNCH,
        "MATCHED = Budget(512, 128)", "MATCHED = Budget(512, 256)",
        f"{AHEAD_OF_TIME}launch_choice[matched-2-128256-sm_90]",
    ),
    Mutation(
        "a budget that spills", sources.KERNELS_LAUNCH,
        "MATCHED = Budget(512, 128)", "MATCHED = Budget(1024, 64)",
        f"{AHEAD_OF_TIME}dense_kernel_for_nvidia[jensen_shannon-bf16 hard T-sm_90]",
    ),
]  # fmt: skip

METRICS = [
    Mutation(
        "the ties' last column is the top one", sources.KERNELS_METRICS,
        "tl.minimum(top_s, tl.min(tl.where(x_s == m_s, position, NOWHERE), axis=1))",
        "tl.minimum(top_s, tl.max(tl.where(x_s == m_s, position, 0), axis=1))",
        "tests/losses/test_metrics.py::test_agreement_of_ties_and_of_the_last_column[triton]",
    ),
    Mutation(
        "half the mixture twice", sources.KERNELS_METRICS,
        "log2_of_normal(0.5 + 0.5 * ratio)", "log2_of_normal(1.0 + ratio)",
        "tests/losses/test_metrics.py::test_equal_models[triton]",
    ),
    Mutation(
        "an infinite divergence is finite", sources.KERNELS_METRICS,
        "tl.where((x_s == -INFINITY) & (p > 0), INFINITY, p * log_ratio)", "p * log_ratio",
        "tests/losses/test_metrics.py::test_infinite_logits[triton]",
    ),
]  # fmt: skip

KERNEL_MUTATIONS = [*FORMULAS, *SWEEPS, *DENSE_KERNEL, *METRICS]
