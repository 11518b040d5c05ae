"""Mistakes in the launches over a part of each row."""

from tests.support import sources
from tests.support.mutants import Mutation

STATISTICS = "tests/kernels/test_phases.py::test_statistics_of_parts"
WHOLE = "tests/kernels/test_phases.py::test_loss_and_gradient_of_whole_rows"


def mutation(name: str, file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"phases: {name}", file, old, new, test, kernels=True)


PHASES = [
    mutation(
        "sums leave as the fast loops have them", sources.KERNELS_PART_ROW,
        "factor_t = tl.exp2(-excess_t)", "factor_t = tl.exp2(0.0 * excess_t)",
        f"{STATISTICS}[forward_kl-T2-h0.5]",
    ),
    mutation(
        "a moment leaves as the fast loops have it", sources.KERNELS_PART_ROW,
        "(moment_s - l_s * shift)", "moment_s", f"{STATISTICS}[reverse_kl-T0.5-h0.5]",
    ),
    mutation(
        "dropped columns count in a guarded part", sources.KERNELS_PART_ROW,
        "e_t = tl.where(x_s == -INFINITY, 0.0, e_t)", "e_t = e_t",
        f"{STATISTICS}[declared_but_finite-T2-h0]",
    ),
    mutation(
        "a declared divergence's infinity does not show", sources.KERNELS_PART_ROW,
        "= FORWARD_MOMENT if MOMENT == NO_MOMENT and (DROP or RESTRICT) else MOMENT", "= MOMENT",
        f"{STATISTICS}[chi_squared-T2-h0]",
    ),
    mutation(
        "a part that is done again keeps the fast sums", sources.KERNELS_PHASES,
        "l_s, l_t, _, _ = exact_sums", "_, _, _, _ = exact_sums",
        f"{WHOLE}[jensen_shannon-T0.5-h0]",
    ),
    mutation(
        "a missing teacher row is the first", sources.KERNELS_PHASES,
        "l_t + poison", "l_t", f"{STATISTICS}[reverse_kl-T0.5-h0.5]",
    ),
]  # fmt: skip
