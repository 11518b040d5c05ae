"""Triton's path of a split vocabulary, in the interpreter: ranks that are threads of this process."""

import pytest
import torch

from distill_ops import groups
from tests.support.cases import FLOAT_MASK, LABELS
from tests.vocab_parallel.cases import DIVERGENCES, SLOT_EDITS, WIDTHS, Case, widths_of
from tests.vocab_parallel.results import compare, merged, results
from tests.vocab_parallel.threads import Threads

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter
HARD = {"labels": LABELS, "hard_label_weight": 0.4}
ROWS = ["each row another", "dead rows", "far"]
OPTIONS = {
    "plain": {},
    "backward": {"gradient": "backward", "temperature": 2.0},
    "hard": {**HARD, "loss_mask": FLOAT_MASK},
    "hard_backward": {**HARD, "gradient": "backward", "reduction": "none"},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "vocab_size": {"vocab_size": 29, **HARD},
    "inplace": {"inplace": True, "loss_mask": FLOAT_MASK},
}


@pytest.fixture
def hold(monkeypatch, kernel_device):
    """As that of processes, of ranks that are threads."""

    def hold_on_threads(case: Case) -> dict[str, torch.Tensor]:
        threads = Threads(len(case.widths))
        monkeypatch.setattr(groups, "resolve", threads.resolve)

        def of_rank(rank: int):
            tensors, options = case.part(rank)
            options |= {"group": threads.resolve(), "backend": "triton"}
            return results(case.of_form.function, case.of_form, tensors, options)

        ours = merged(case, threads.run(of_rank))
        compare(case, ours)
        return ours

    return hold_on_threads


TOPK_OPTIONS = {
    "bucket": {},
    "backward": {"gradient": "backward", "temperature": 2.0, "loss_mask": FLOAT_MASK},
    "hard": {**HARD, "return_components": True},
    "hot": {**HARD, "gradient": "backward", "temperature": 2.0},
    "renormalize": {"tail": "renormalize", **HARD},
    "ignore": {"tail": "ignore", "teacher_rows": torch.tensor([[3, 3, 0], [1, 5, 3]])},
    "restrict": {"tail": "restrict", **HARD},
    "drop": {"tail": "drop", "vocab_size": 31, "reduction": "none"},
    "floor": {"log_prob_floor": -3.0},
}


@pytest.mark.covering("divergence", "edit", "option")
@pytest.mark.parametrize(
    "edit", ["nothing", *SLOT_EDITS, "dead part", "dead rows", "bad rows", "far"]
)
@pytest.mark.parametrize("option", TOPK_OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_topk(divergence, option, edit, hold):
    options = {**TOPK_OPTIONS[option], "divergence": divergence}
    if edit in ("on one rank", "every column") and option == "drop":
        del options["vocab_size"]
    hold(
        Case(widths_of(divergence, option, edit), options, form="topk_distillation_loss", edit=edit)
    )


def test_topk_without_a_rest(hold):
    options = {"divergence": "soft_cross_entropy", "log_prob_floor": -3.0}
    hold(Case((8, 0, 25), options, form="topk_distillation_loss", edit="every column"))


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_beta"])
def test_topk_half_precision(divergence, hold):
    for tail, dtype in (("bucket", torch.bfloat16), ("renormalize", torch.float16)):
        options = {"divergence": divergence, "tail": tail, **HARD}
        hold(Case((8, 24), options, dtype, "topk_distillation_loss"))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric_kl"])
def test_topk_masses(divergence, hold):
    options = {"divergence": divergence, "tail": "drop", "mass_terms": True}
    hold(Case((17, 0, 16), options, form="topk_distillation_loss"))


@pytest.mark.covering("option divergence.infinite_at_student_zero", "divergence")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_options(divergence, option, hold):
    hold(Case(WIDTHS[2 + (option == "plain")], {**OPTIONS[option], "divergence": divergence}))


@pytest.mark.covering("edit", "divergence")
@pytest.mark.parametrize("edit", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_what_rows_hold(divergence, edit, hold):
    options = {"divergence": divergence, "reduction": "none"}
    hold(Case(WIDTHS[2], options, edit=edit))


@pytest.mark.parametrize("edit", ["some infinite", "dead student"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_hard_labels_of_infinite_logits(divergence, edit, hold):
    options = {"divergence": divergence, **HARD, "gradient": "backward"}
    hold(Case(WIDTHS[3], options, edit=edit))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl", "total_variation"])
def test_half_precision(divergence, dtype, hold):
    hold(Case(WIDTHS[2], {"divergence": divergence, **HARD}, dtype, told="nothing"))


LINEAR = {
    "plain": {},
    "backward": {"gradient": "backward", "temperature": 2.0, "loss_mask": FLOAT_MASK},
    "hard_none": {**HARD, "reduction": "none"},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "vocab_size": {"vocab_size": 29, **HARD},
    "capped": {"student_softcap": 3.0, "teacher_softcap": 5.0, "loss_mask": FLOAT_MASK},
    "kept": {"loss_mask": FLOAT_MASK, "kept_tokens": 5},
    "blocks": {"memory_budget": 1000},
    "teacher_rows": {"teacher_rows": torch.tensor([[3, 1, 1], [0, 5, 5]])},
}


@pytest.mark.covering("option", "divergence")
@pytest.mark.parametrize("option", LINEAR)
@pytest.mark.parametrize("divergence", ["soft_cross_entropy", "jensen_shannon"])
def test_linear(divergence, option, hold):
    options = {**LINEAR[option], "divergence": divergence}
    whole = divergence == "jensen_shannon"
    widths = (9, 0, 24) if whole else WIDTHS[3]
    hold(Case(widths, options, form="linear_distillation_loss", whole_teacher=whole))


@pytest.mark.covering("option", "divergence")
@pytest.mark.parametrize("option", ["plain", "backward", "hard_none", "vocab_size", "teacher_rows"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_linear_topk(divergence, option, hold):
    options = {**LINEAR[option], "divergence": divergence}
    widths = (9, 0, 24) if divergence == "reverse_kl" else WIDTHS[3]
    hold(Case(widths, options, form="linear_topk_distillation_loss"))


OF_TOKENS = {
    "token_log_probs": ({}, {"temperature": 2.0}),
    "distillation_metrics": ({}, {"vocab_size": 29}),
}


@pytest.mark.parametrize("edit", ["nothing", "low", "lowest"])
@pytest.mark.parametrize("form", OF_TOKENS)
def test_tokens(form, edit, hold):
    for options in OF_TOKENS[form]:
        widths = (9, 0, 24) if edit == "nothing" else WIDTHS[3]
        hold(Case(widths, options, form=form, edit=edit))


@pytest.mark.covering("divergence.moment", "option")
@pytest.mark.parametrize(
    "option", [{}, {"coefficients": (0.7, -1.3, 0.25), "temperature": 2.0}], ids=["plain", "loss"]
)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_statistics(divergence, option, hold):
    edit = "low" if option else "nothing"
    widths = WIDTHS[3] if option else (9, 0, 24)
    options = {**option, "divergence": divergence}
    hold(Case(widths, options, form="distillation_statistics", edit=edit))


@pytest.mark.parametrize("edit", ["nothing", "unread"])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("linear_token_log_probs", {}),
        ("linear_distillation_statistics", {"divergence": "jensen_shannon"}),
        ("linear_distillation_statistics", {"coefficients": (0.7, -1.3, 0.25)}),
    ],
)
def test_heads_of_tokens(form, options, edit, hold):
    widths = WIDTHS[3] if edit == "unread" else (9, 0, 24)
    hold(Case(widths, options, form=form, edit=edit))
