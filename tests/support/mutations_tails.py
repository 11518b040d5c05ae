"""Mutations of the tails of the top-k loss: floors, mass terms, repeated ids, columns left out."""

from tests.support import sources
from tests.support.mutants import Mutation

TAILS = "tests/losses/test_tails.py::test_"
TOPK = "tests/losses/test_topk.py::test_"
HOSTILE = "tests/interface/test_hostile.py::test_hostile_calls"

TAILS_MUTATIONS = [
    Mutation(
        "tails: what is left out has a term", sources.KERNELS_TOPK_TERMS,
        "value = tl.where(lane == k, 0.0, value)", "pass",
        f"{TAILS}floor[triton-AlphaBeta(alpha=0.2, beta=0.7)-drop]",
    ),
    Mutation(
        "tails: a repeated slot of -inf counts", sources.KERNELS_TOPK,
        "if tl.sum(zero.to(tl.int32), axis=0) > 0:", "if tl.sum(zero.to(tl.int32), axis=0) < 0:",
        f"{TAILS}slots_that_repeat_an_id_are_unused[triton-JensenShannon(beta=0.3)-bucket-forward]",
    ),
    Mutation(
        "tails: every slot of -inf of an id that repeats goes", sources.KERNELS_TOPK_TERMS,
        "== -INFINITY, i, -1)", "== -INFINITY, -1, -1)",
        f"{TAILS}slots_that_repeat_an_id_are_unused[triton-JensenShannon(beta=0.3)-drop-backward]",
    ),
    Mutation(
        "tails: slopes below the floor", sources.KERNELS_TOPK_TERMS,
        "slope = tl.where(below, 0.0, slope)", "pass",
        f"{TAILS}floor[triton-SymmetricKL(weight=0.3)-restrict]",
    ),
    Mutation(
        "tails: the gradient is spread by the floored probability", sources.KERNELS_TOPK_TERMS,
        "q = tl.where(below, tl.exp2(own_y * LOG2E) * tl.fdiv(1.0, l_s), q)", "pass",
        f"{TAILS}floor[triton-SymmetricKL(weight=0.3)-bucket]",
    ),
    Mutation(
        "tails: masses of the reverse KL have the forward's sign", sources.KERNELS_TOPK_TERMS,
        "factor = -one", "factor = one", f"{TAILS}mass_terms[triton-ReverseKL()--3.0]",
    ),
    Mutation(
        "tails: a dropped term leaves its masses", sources.KERNELS_TOPK_TERMS,
        '            dead = y_s == -INFINITY\n', "            pass\n",
        f"{TAILS}mass_terms[triton-ForwardKL()-None]",
    ),
    Mutation(
        "tails: terms are dropped in spite of a floor", sources.KERNELS_TOPK,
        "formula = formula._replace(drop=False, restrict=False)", "pass",
        f"{TAILS}nothing_is_infinite_above_a_floor[triton-SymmetricKL(weight=0.3)-bucket]",
    ),
    Mutation(
        "tails: mass terms are lost on the way", sources.GPU,
        "mass_terms=options.mass_terms", "mass_terms=False",
        f"{TAILS}mass_terms_by_a_weight_of_each_token[triton]",
    ),
    Mutation(
        "tails, CPU: slopes of what is left out", sources.CPU_TOPK,
        "value[:, -1], slope[:, -1] = 0, 0", "value[:, -1] = 0",
        f"{TOPK}value_and_gradient[torch-JensenShannon(beta=0.5)-drop]",
    ),
    Mutation(
        "tails, CPU: a slot of -inf repeats one of another id", sources.CHECKS_SLOTS,
        "order = order.gather(-1, ids.gather(-1, order).argsort(dim=-1, stable=True))", "pass",
        f"{TAILS}slots_that_repeat_an_id_are_unused[torch-JensenShannon(beta=0.3)-bucket-forward]",
    ),
    Mutation(
        "tails, CPU: the student is restricted in spite of a floor", sources.CPU_TOPK,
        "divergence.infinite_at_teacher_zero and tail.log_prob_floor is None",
        "divergence.infinite_at_teacher_zero",
        f"{TAILS}nothing_is_infinite_above_a_floor[torch-SymmetricKL(weight=0.3)-bucket]",
    ),
    Mutation(
        "tails: the floor is lost on the way", sources.PROBLEM,
        "tail.mass_terms, tail.log_prob_floor,", "tail.mass_terms, None,",
        f"{TAILS}floor[torch-SymmetricKL(weight=0.3)-bucket]",
    ),
    Mutation(
        "tails: padding of servers is refused", sources.CHECKS_CONTENTS,
        "ids.masked_fill(log_probs == -math.inf, -1)", "ids",
        f"{TAILS}two_finite_slots_of_an_id_are_refused",
    ),
    Mutation(
        "tails: mass terms of any tail", sources.CHECKS_SLOTS,
        'if mass_terms and name != "drop":', "if False:",
        f"{HOSTILE}[topk_distillation_loss: mass_terms=True, tail='restrict' of a tail]",
    ),
]  # fmt: skip
