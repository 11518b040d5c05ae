"""Mutations of the support: the gather kernel, the selection, and the losses on them."""

from tests.support import sources
from tests.support.mutants import Mutation

GATHER = "tests/losses/test_gather.py::test_"
SUPPORT = "tests/losses/test_support.py::test_"

SUPPORT_MUTATIONS = [
    Mutation(
        "gather: unused slots are NaN", sources.KERNELS_GATHER,
        "tl.where(token_id == -1, -INFINITY, found)", "found",
        f"{GATHER}odd_rows[triton-1.0]",
    ),
    Mutation(
        "gather: rows of weight 0 are read", sources.KERNELS_GATHER,
        "if weight != 0.0:", "if weight != -7.0:",
        f"{GATHER}rows_of_weight_0_are_not_read[triton-torch.bool]",
    ),
    Mutation(
        "gather: an id outside the vocabulary has a number", sources.KERNELS_GATHER,
        'other=float("nan")', "other=0.0",
        f"{GATHER}an_id_outside_the_vocabulary_shows[triton-33]",
    ),
    Mutation(
        "gather: the temperature is left out of the logit", sources.KERNELS_GATHER,
        "token_log_prob(x, m, l, over_t)", "token_log_prob(x, m, l, 1.0)",
        f"{GATHER}odd_rows[triton-0.7]",
    ),
    Mutation(
        "gather, CPU: an id outside the vocabulary has a number", sources.CPU_TOKENS,
        ".masked_fill_(~used, math.nan)", "",
        f"{GATHER}an_id_outside_the_vocabulary_shows[torch-33]",
    ),
    Mutation(
        "gather: ids are not looked at", sources.CHECKS_CONTENTS,
        '        _slot_ids("ids", inputs.ids, options.n_cols, counted.kept(inputs.ids[..., 0]))\n', "",
        f"{GATHER}an_id_outside_the_vocabulary_shows[torch-33]",
    ),
    Mutation(
        "gather: a graph is cut without a word", sources.API_GATHER,
        '    of_teacher("logits", logits)\n', "",
        f"{GATHER}no_gradient",
    ),
    Mutation(
        "gather of heads: the mask is lost", sources.OPERATORS_LINEAR_GATHER,
        "None if weights is None else weights[places]", "None",
        f"{GATHER}from_hidden_states[triton-one-torch.float32-plain]",
    ),
    Mutation(
        "selection: impossible tokens are chosen", sources.SELECTION,
        ".masked_fill_(values == NEG_INF, -1)", "",
        f"{GATHER}student_topk_of_odd_rows",
    ),
    Mutation(
        "selection: columns beyond the vocabulary are chosen", sources.SELECTION,
        "matrix[:, :n_cols][rows]", "matrix[rows]",
        f"{GATHER}student_topk[shifted-150]",
    ),
    Mutation(
        "support: always the student's", sources.OPERATORS_GATHER,
        'student if options.support == "student" else teacher', "student",
        f"{SUPPORT}it_is_the_three_steps[torch-teacher]",
    ),
    Mutation(
        "support: the teacher at temperature 1", sources.OPERATORS_GATHER,
        "teacher, ids, weights, loss.temperature,", "teacher, ids, weights, 1.0,",
        f"{SUPPORT}it_is_the_three_steps[torch-student]",
    ),
    Mutation(
        "support of heads: the choice is not of these logits", sources.OPERATORS_LINEAR,
        "slots_of(student, teacher,", "slots_of(teacher, teacher,",
        f"{SUPPORT}blocks_of_heads[torch-student-torch.float32-mean]",
    ),
]  # fmt: skip
