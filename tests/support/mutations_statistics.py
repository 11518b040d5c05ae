"""Mistakes of the statistics of heads, and of the loss that coefficients make of statistics."""

from tests.support import sources
from tests.support.mutants import Mutation

LINEAR = "tests/losses/test_linear_statistics.py::test_"
DENSE = "tests/losses/test_tokens.py::test_"
OPERATORS = "tests/interface/test_statistics_operators.py::test_"

STATISTICS = [
    Mutation(
        "statistics: the coefficients of ignored tokens", sources.OPERATORS_STATISTICS,
        "return rows.masked_fill_(ids == options.loss.ignore_index, 0.0)", "return rows",
        f"{LINEAR}blocks[torch-tensors-None-5]",
    ),
    Mutation(
        "statistics: 0 times an infinity", sources.OPERATORS_STATISTICS,
        "torch.where(coefficients == 0, 0.0, coefficients * values)", "coefficients * values",
        f"{LINEAR}a_coefficient_of_0_leaves_an_infinity_out[torch-none]",
    ),
    Mutation(
        "statistics: the entropy's coefficient for the teacher's", sources.OPERATORS_STATISTICS,
        "DIFFERENTIABLE = 0, 1, 3", "DIFFERENTIABLE = 0, 1, 4",
        f"{LINEAR}blocks[torch-tensors-None-5]",
    ),
    Mutation(
        "statistics: the backward's incoming gradient of the loss is left out",
        sources.OPERATORS_STATISTICS,
        "times(coefficient_rows(inputs, options), of_loss)", "coefficient_rows(inputs, options)",
        f"{LINEAR}float16_gradients_are_made_in_the_backward[torch-float16 weight]",
    ),
    Mutation(
        "statistics: a gradient kept beside another thing is not scaled", sources.OPERATORS_SAVING,
        "list(ctx.saved_tensors)[: len(wanted)]", "list(ctx.saved_tensors)",
        f"{DENSE}a_loss_of_coefficients[torch-torch.float32-reverse_kl]",
    ),
    Mutation(
        "statistics: beside a loss they take gradients", sources.API_STATISTICS,
        "of_tokens = of_tokens.detach()", "pass",
        f"{LINEAR}float16_gradients_are_made_in_the_backward[torch-float16 weight]",
    ),
    Mutation(
        "statistics: an output whose gradient the forward did not make takes one",
        sources.OPERATORS_REGISTER, "n = 1 if made == FORWARD else self.differentiable",
        "n = self.differentiable", f"{OPERATORS}the_loss_alone_is_differentiable[distillation_statistics]",
    ),
    Mutation(
        "statistics: coefficients of ignored tokens are looked at", sources.CHECKS_CONTENTS,
        "bad = bad & counted.kept(bad)", "pass",
        f"{LINEAR}blocks[torch-tensors-None-5]",
    ),
    Mutation(
        "linear statistics: of the tokens that count at the front", sources.HEADS_SELECT,
        "index_copy_(-1, selection.index, found)", "index_copy_(-1, selection.index.argsort(), found)",
        f"{LINEAR}blocks[torch-statistics-None-5]",
    ),
    Mutation(
        "statistics: a row that no coefficient asks for is read", sources.OPERATORS_STATISTICS,
        "torch.where((upstream == 0).all(0), options.ignore_index, ids)", "ids",
        f"{DENSE}a_row_that_no_coefficient_asks_for_takes_no_gradient[torch]",
    ),
    Mutation(
        "linear statistics: every block takes the first one's coefficients",
        sources.OPERATORS_LINEAR_STATISTICS,
        "of_rows, coefficients[:, rows], gradient", "of_rows, coefficients[:, : len(logits)], gradient",
        f"{LINEAR}blocks[triton-tensors-None-5]",
    ),
    Mutation(
        "linear statistics: a float16 gradient of autocast is made in the forward",
        sources.API_LINEAR_STATISTICS, ", products=autocast)", ")",
        f"{LINEAR}float16_gradients_are_made_in_the_backward[torch-autocast]",
    ),
    Mutation(
        "linear statistics: the teacher's logits take no room in the budget",
        sources.OPERATORS_LINEAR_STATISTICS, "blocks.memory_budget, teacher_bytes)",
        "blocks.memory_budget, 0)", f"{LINEAR}a_budget_that_holds_the_logits_of_the_student_alone",
    ),
]  # fmt: skip
