"""Mutations of the top-k loss: its kernel, its CPU path, its operators."""

from tests.support import sources
from tests.support.mutants import Mutation

TOPK = "tests/losses/test_topk.py::test_"
EDGES = "tests/losses/test_topk_edges.py::test_"
OPERATORS = "tests/interface/test_topk_operators.py::test_"

TOPK_MUTATIONS = [
    Mutation(
        "top-k: the K count as columns outside", sources.KERNELS_TOPK_OUTSIDE,
        "tl.where((bits & mask) != 0, -INFINITY, x)", "x",
        f"{TOPK}value_and_gradient[triton-ForwardKL()-bucket]",
    ),
    Mutation(
        "top-k: a row's marks stay for the next", sources.KERNELS_TOPK,
        "                unmark(words, position, used)\n", "                pass\n",
        f"{TOPK}more_rows_than_programs[triton-JensenShannon(beta=0.3)-bucket]",
    ),
    Mutation(
        "top-k: scratch memory is not cleared", sources.KERNELS_TOPK,
        "        clear(words, n_words, LANES)\n", "",
        f"{TOPK}scratch_memory_may_hold_anything", kernels=True,
    ),
    Mutation(
        "top-k: bits of float32 vectors are taken from the byte's start", sources.KERNELS_TOPK_OUTSIDE,
        " >> (first & 7)", "",
        f"{TOPK}value_and_gradient[triton-ForwardKL()-bucket]",
    ),
    Mutation(
        "top-k: the rest stays where the K cover the vocabulary", sources.KERNELS_TOPK,
        "tl.where(covered, -INFINITY, tl.log(rest))", "tl.log(rest)",
        f"{EDGES}no_rest_where_the_k_cover_the_vocabulary[triton-JensenShannon(beta=0.3)]",
    ),
    Mutation(
        "top-k: the teacher's sum in float32", sources.KERNELS_TOPK,
        "tl.exp(log_p.to(tl.float64))", "tl.exp(log_p)",
        f"{EDGES}the_teacher_s_rest_is_not_float32_s_rounding[triton]",
    ),
    Mutation(
        "top-k: the label's entry is left out", sources.KERNELS_TOPK,
        "entry - hard_scale", "entry",
        f"{TOPK}labels_inside_and_outside_the_k[triton-JensenShannon(beta=0.3)-bucket-1.0]",
    ),
    Mutation(
        "top-k: any id is written to", sources.KERNELS_TOPK,
        "used = (token_id >= 0) & (token_id < n_cols)", "used = token_id >= 0",
        f"{EDGES}ids_that_nobody_checked_are_nan[bucket]",
        kernels=True,
    ),
    Mutation(
        "top-k: slopes outside are not kept for the backward", sources.KERNELS_TOPK,
        "tl.store(kept + 3, outside_slope)", "tl.store(kept + 3, 0.0)",
        f"{TOPK}both_gradient_modes_give_the_same_bits[triton-soft-AlphaBeta(alpha=0.2, beta=0.7)"
        "-renormalize]",
    ),
    Mutation(
        "top-k, CPU: terms are rounded", sources.CPU_TOPK,
        "torch.log_softmax(y, -1)", "torch.log_softmax(y.float(), -1)",
        f"{TOPK}terms_of_peaked_rows_are_not_rounded[ReverseKL()-ignore]",
    ),
    Mutation(
        "top-k, CPU: an unused slot takes column 0 from the rest", sources.CPU_TOPK,
        "torch.where(ids >= 0, ids, ids.amax(-1, keepdim=True)).clamp_(min=0)", "ids.clamp(min=0)",
        f"{EDGES}unused_slots_are_as_if_absent[torch-JensenShannon(beta=0.3)-bucket]",
    ),
    Mutation(
        "top-k, CPU: a token without slots loses column 0", sources.CPU_TOPK,
        "out[:, :1] = torch.where((ids < 0)", "out[:, :0] = torch.where((ids < 0)",
        f"{EDGES}no_used_slot[torch-jensen_shannon]",
    ),
    Mutation(
        "top-k: the tail is lost on the way", sources.API_TOPK,
        "Options.of(arguments, n_cols, backend, checked, split)",
        'Options.of(arguments, n_cols, backend, checked._replace(name="bucket"), split)',
        f"{TOPK}value_and_gradient[torch-ForwardKL()-ignore]",
    ),
]  # fmt: skip
