"""The names of what a loss tells of a row beside it, as kernels take them: bits of OUTPUTS."""

from .portable import constant

# in the order of the buffers; a bit each of a kernel's OUTPUTS
NAMES = (
    "log_prob", "student_entropy", "teacher_entropy", "student_argmax", "teacher_argmax",
    "acceptance", "teacher_mass",
)  # fmt: skip
(
    LOG_PROB, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_ARGMAX, TEACHER_ARGMAX, ACCEPTANCE, TEACHER_MASS,
) = (constant(1 << i) for i in range(len(NAMES)))  # fmt: skip
OF_STUDENT = constant(1 + 2 + 8)
OF_BOTH = constant(32 + 64)  # sums over the columns of both


def bits(names: tuple[str, ...]) -> int:
    """OUTPUTS of a kernel that gives these."""
    return sum(1 << NAMES.index(name) for name in names)
