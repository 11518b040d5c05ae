"""Mutations of the token outputs."""

from tests.support import sources
from tests.support.mutants import Mutation

OUTPUTS = "tests/losses/test_token_outputs.py::test_"

TOKEN_OUTPUTS = [
    Mutation(
        "kernels: the last of equal maxima", sources.KERNELS_RUNNING,
        "tl.where(tile_m == m, tl.minimum(found, top), top)", "tl.where(tile_m == m, found, top)",
        f"{OUTPUTS}shapes[triton-1031-torch.float32]",
    ),
    Mutation(
        "kernels: an entropy's moment not moved with the maximum", sources.KERNELS_RUNNING,
        "factor * (moment + l * tl.maximum(shift, LOWEST))", "factor * moment",
        f"{OUTPUTS}shapes[triton-4096-torch.float32]",
    ),
    Mutation(
        "kernels: the mass is 1 where the student excludes a token", sources.KERNELS_ROW_OUTPUTS,
        "if fast & (least > -INFINITY):", "if fast:",
        f"{OUTPUTS}each_alone[triton-teacher_mass]",
    ),
    Mutation(
        "kernels: acceptance without a gradient is not summed", sources.KERNELS_DENSE,
        "ignore_index, OUTPUTS, not OVERLAP,", "ignore_index, OUTPUTS, False,",
        f"{OUTPUTS}shapes[triton-1031-torch.float32]",
    ),
    Mutation(
        "kernels: the K's largest logit does not count", sources.KERNELS_TOPK_OUTPUTS,
        "first = tl.minimum(first,", "first = tl.minimum(NOWHERE,",
        f"{OUTPUTS}linear[triton-None]",
    ),
    Mutation(
        "kernels: the rest's exponentials as the K's", sources.KERNELS_TOPK_OUTPUTS,
        "l = tl.sum(e, axis=0) + l_r * factor", "l = tl.sum(e, axis=0) + l_r",
        f"{OUTPUTS}linear[triton-None]",
    ),
    Mutation(
        "host: rows that are not finite are left as a form shows them", sources.CPU_OUTPUTS,
        "if not all(math.isfinite(x.sum()) for x in numbers):", "if False:",
        f"{OUTPUTS}each_alone[torch-student_entropy]",
    ),
    Mutation(
        "host: a dropped token's argmax is 0", sources.OPERATORS_LINEAR,
        "place(self.outputs.argmax, fill=-1)", "place(self.outputs.argmax)",
        f"{OUTPUTS}linear[torch-None]",
    ),
]  # fmt: skip
