"""Mistakes in the statistics of parts of a row, and in how they combine."""

from tests.support import sources
from tests.support.mutants import Mutation

FILE = sources.ROW_STATISTICS
TESTS = "tests/losses/test_row_statistics.py::test_"
SPLIT = f"{TESTS}any_split_is_the_whole"
ORACLE = f"{TESTS}loss_and_slope_are_the_oracles"

ROW_STATISTICS = [
    Mutation(
        "parts: a moment is not moved with the maxima", FILE,
        "student_moment + part.student_sum * student_factor * shift", "student_moment",
        f"{SPLIT}[reverse_kl]",
    ),
    Mutation(
        "parts: dropped columns move the teacher's moment", FILE,
        "part.kept_sum * teacher_factor * shift", "part.teacher_sum * teacher_factor * shift",
        f"{SPLIT}[forward_kl]",
    ),
    Mutation(
        "parts: the maximum of an empty part is subtracted", FILE,
        "torch.where(maximum == NEG_INF, 0.0, maximum)", "maximum",
        f"{ORACLE}[1.0-infinite-soft_cross_entropy]",
    ),
    Mutation(
        "parts: dropped columns count in D", FILE,
        "self.kept_sum / self.teacher_sum", "self.teacher_sum / self.teacher_sum",
        f"{ORACLE}[1.0-infinite-forward_kl]",
    ),
    Mutation(
        "parts: labels count from the part's first column", FILE,
        "labels.long() - offset", "labels.long()",
        f"{ORACLE}[1.0-finite-soft_cross_entropy]",
    ),
    Mutation(
        "parts: offset rows are rounded", FILE,
        "((x - finite) / temperature)", "(x / temperature - finite / temperature)",
        f"{TESTS}float32_costs_rounding_alone[even-reverse_kl]",
    ),
    Mutation(
        "parts: distances overflow", FILE,
        ".clamp_(min=torch.finfo(x.dtype).min / 4)", "",
        f"{TESTS}a_logit_at_the_lowest_float_is_finite",
    ),
]  # fmt: skip
