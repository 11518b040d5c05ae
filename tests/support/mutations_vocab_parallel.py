"""Mistakes in what ranks that split a vocabulary exchange, and in what they make of it."""

from tests.support import sources
from tests.support.mutants import Mutation

DENSE = "tests/vocab_parallel/test_dense.py::test_"
KERNELS = "tests/vocab_parallel/test_kernels.py::test_options"


def mutation(name: str, file: str, old: str, new: str, test: str, kernels=False) -> Mutation:
    return Mutation(f"split: {name}", file, old, new, test, kernels=kernels)


VOCAB_PARALLEL = [
    mutation(
        "a rank's own columns are before it", sources.GROUPS,
        "sum(widths[: group.rank]), sum(widths)", "sum(widths[: group.rank + 1]), sum(widths)",
        f"{DENSE}splits[reverse_kl-(1, 30)-nothing]",
    ),
    mutation(
        "vocab_size counts from each rank's first column", sources.GROUPS,
        "max(self.vocab_size - offset, 0)", "max(self.vocab_size, 0)",
        f"{DENSE}ranks_beyond_the_vocabulary[reverse_kl-(15, 14, 4)-offset]",
    ),
    mutation(
        "labels count from the first column of all", sources.VOCAB_PARALLEL_ROWS,
        "tokens.labels - place.offset", "tokens.labels",
        f"{DENSE}splits[jensen_shannon-(1, 30)-offset]",
    ),
    mutation(
        "every rank takes a whole teacher's first columns", sources.GROUPS,
        "self.teacher_start : self.teacher_start + width", "0:width",
        f"{DENSE}a_whole_teacher[nothing]",
    ),
    mutation(
        "L and D are of the first rank's columns", sources.VOCAB_PARALLEL_ROWS,
        "reduce(torch.add, sums.unbind(0))", "sums[0]",
        f"{DENSE}splits[jensen_shannon-(1, 30)-offset]",
    ),
    mutation(
        "the kernel adds up the first part's sums", sources.KERNELS_COMBINE,
        "loss += number_of(sums_ptr, part, 0", "loss += number_of(sums_ptr, 0 * part, 0",
        f"{KERNELS}[JensenShannon(beta=0.5)-plain]", kernels=True,
    ),
    mutation(
        "the kernel leaves the hard label's sums where they are", sources.KERNELS_COMBINE,
        "* tl.exp(d_h)", "* tl.exp(0.0 * d_h)",
        f"{KERNELS}[ForwardKL()-hard_only]", kernels=True,
    ),
    mutation(
        "the kernel's D of the reverse KL is L", sources.KERNELS_COMBINE,
        "slope = loss + 1.0", "slope = loss",
        f"{KERNELS}[ReverseKL()-plain]", kernels=True,
    ),
]  # fmt: skip
