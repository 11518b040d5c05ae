"""Mutations of the kernels over tokens, the moments and the mixed loss."""

from tests.support import sources
from tests.support.mutants import Mutation

GRADIENTS = "tests/losses/test_dense_gradients.py::test_"
INPLACE = "tests/interface/test_inplace.py::test_"

TOKENS_AND_MOMENTS = [
    Mutation(
        "soft moment not moved with the maximum",
        sources.KERNELS_SWEEPS,
        "factor_t * (moment_t + l_t * shift)",
        "factor_t * moment_t",
        f"{GRADIENTS}no_gradient_is_made_where_none_is_wanted[triton-4099]",
    ),
    Mutation(
        "bfloat16 is truncated",
        sources.KERNELS_MATH,
        "bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536",
        "bits = bits & -65536",
        "tests/kernels/test_reduction.py::test_gradients_are_rounded_to_nearest",
        kernels=True,
    ),
    Mutation(
        "no token kept divides by 0",
        sources.KERNELS_REDUCTION,
        "tl.where(tl.sum(n_kept) == 0, 1.0, tl.sum(total))",
        "tl.sum(total)",
        "tests/kernels/test_reduction.py::test_token_weights[100]",
        kernels=True,
    ),
    Mutation(
        "kernels: the forward's gradient is scaled up only",
        sources.KERNELS_REDUCTION,
        "if upstream != 1.0:",
        "if upstream > 1.0:",
        "tests/kernels/test_reduction.py::test_scale[0.3-torch.float32-4099]",
        kernels=True,
    ),
    Mutation(
        "kernels: what lies behind the gradient's whole vectors is not scaled",
        sources.KERNELS_REDUCTION,
        "upstream, position < n_elements)",
        "upstream, position < n_vectors * WIDTH)",
        "tests/kernels/test_reduction.py::test_scale[0.3-torch.float32-4099]",
        kernels=True,
    ),
    Mutation(
        "kernels: a program scales its first block only",
        sources.KERNELS_REDUCTION,
        "range(tl.program_id(0), tl.cdiv(n_vectors, VECTORS), tl.num_programs(0))",
        "range(tl.program_id(0), tl.num_programs(0))",
        "tests/kernels/test_reduction.py::test_scale_with_several_blocks_a_program[2063]",
        kernels=True,
    ),
    Mutation(
        "kd_ratio for 1 - kd_ratio",
        sources.INTEGRATIONS_MINILLM,
        "hard_label_weight=1 - kd_ratio",
        "hard_label_weight=kd_ratio",
        "tests/interface/test_minillm.py::test_get_mixed_loss",
    ),
    Mutation(
        "hard labels read overwritten logits",
        sources.CPU_CHUNK,
        "early = inplace and self.terms.hard and write is not None",
        "early = False",
        f"{INPLACE}same_bits_as_a_fresh_gradient[torch-ForwardKL()-hard_all]",
    ),
]
