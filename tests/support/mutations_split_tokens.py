"""Mistakes in tokens' log-probabilities, statistics and metrics over a vocabulary that ranks split."""

from tests.support import sources
from tests.support.mutants import Mutation

TOKENS = sources.VOCAB_PARALLEL_TOKENS
STATISTICS = sources.VOCAB_PARALLEL_STATISTICS
TESTS = "tests/vocab_parallel/test_tokens.py::test_"
KERNELS = "tests/vocab_parallel/test_kernels.py::test_"
HOLD = f"{TESTS}what_rows_hold"

SPLIT_TOKENS = [
    Mutation(
        "split tokens: an entropy's moment is not moved with the maxima", TOKENS,
        "self.moment * factor + total * shift", "self.moment * factor", f"{HOLD}[token_log_probs-far]",
    ),
    Mutation(
        "split tokens: an ignored id that is a place of no rank's is read", TOKENS,
        "ids == ignore_index", "columns == ignore_index",
        f"{TESTS}an_ignored_id_is_not_a_place_among_a_ranks_columns[token_log_probs-5]",
    ),
    Mutation(
        "split tokens: an id of another rank is looked for here", TOKENS,
        "(columns >= 0) & (columns < place.n_cols)", "columns < place.n_cols",
        f"{TESTS}an_ignored_id_is_not_a_place_among_a_ranks_columns[token_log_probs-0]",
    ),
    Mutation(
        "split tokens: nobody refuses an id that no rank has", TOKENS,
        'refuse_nowhere("token_ids", row.nowhere() & ~ignored)', "pass",
        f"{TESTS}an_id_that_no_rank_has_is_refused_by_all[token_log_probs]",
    ),
    Mutation(
        "split statistics: the restricted student's softmax for its own", STATISTICS,
        "0 if kind.infinite_at_teacher_zero else 2", "2",
        f"{HOLD}[distillation_statistics-some infinite]",
    ),
    Mutation(
        "split statistics: ranks that do not have the maximum agree", STATISTICS,
        "(student == teacher) & (there > 0)", "there > 0",
        f"{TESTS}ties_agree_on_the_first_of_equals",
    ),
    Mutation(
        "split statistics: a rank without the maximum is asked", STATISTICS,
        "pairs[:, 6].gather(0, student)", "pairs[:1, 6]",
        f"{TESTS}ties_agree_on_the_first_of_equals",
    ),
    Mutation(
        "split metrics: a row without a softmax has numbers", sources.VOCAB_PARALLEL_METRICS,
        "sums.masked_fill_(~alive, torch.nan)", "sums", f"{HOLD}[distillation_metrics-dead rows]",
    ),
    Mutation(
        "split tokens: PyTorch's NaN of columns without a finite logit", sources.CPU_TOKEN_PHASES,
        "q[dead] = 0.0", "pass", f"{HOLD}[token_log_probs-dead student]",
    ),
    Mutation(
        "split statistics: an unread token's row is read", sources.CPU_PAIR_PHASES,
        "ids != IGNORED, student, teacher, gradient=out", "None, student, teacher, gradient=out",
        f"{TESTS}ignored_tokens[distillation_statistics-unread]",
    ),
    Mutation(
        "split tokens: columns without a finite logit have the maximum 0", sources.GPU_PHASES,
        "maximum.masked_fill(empty, -math.inf), total", "maximum, total",
        f"{KERNELS}tokens[token_log_probs-low]", kernels=True,
    ),
    Mutation(
        "split metrics: kernels take the teacher's sum for another number", sources.KERNELS_PAIR,
        "of_row + 3 * step", "of_row + step", f"{KERNELS}tokens[distillation_metrics-nothing]",
        kernels=True,
    ),
    Mutation(
        "linear tokens: ranks do not count ids from their columns",
        sources.OPERATORS_LINEAR_TOKENS, "split_tokens.local_ids(", "(lambda ids, *_: ids)(",
        f"{TESTS}splits_of_heads[linear_token_log_probs-(30, 1, 2)]",
    ),
]  # fmt: skip
