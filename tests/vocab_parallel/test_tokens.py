"""Tokens' log-probabilities, statistics and metrics on ranks: what rows hold, which ids there are, heads,
and how much is exchanged."""

import pytest
import torch

from tests.support.cases import TOKENS
from tests.vocab_parallel.cases import INF, WIDTHS, Case
from tests.vocab_parallel.results import hold, merged, run_case, same_bits
from tests.vocab_parallel.work import called, in_debug_mode, traffic

DTYPES = [torch.float32, torch.float64]
COEFFICIENTS = (0.7, torch.linspace(-1, 1, 6).view(TOKENS), 0.25)
FORMS = {  # how many all-gathers, and numbers a token at most
    "token_log_probs": ({}, 1, 4),
    "distillation_statistics": ({}, 1, 15),
    "distillation_statistics/jensen_shannon": ({"divergence": "jensen_shannon"}, 2, 13),
    "distillation_statistics/symmetric_kl": ({"divergence": "symmetric_kl"}, 2, 15),
    "distillation_statistics/loss": (
        {"divergence": "forward_kl", "coefficients": COEFFICIENTS}, 1, 13,
    ),
    "distillation_metrics": ({}, 2, 12),
}  # fmt: skip
LINEAR = {
    "linear_token_log_probs": {},
    "linear_distillation_statistics": {"divergence": "jensen_shannon"},
    "linear_distillation_statistics/loss": {"coefficients": COEFFICIENTS},
}

forms = pytest.mark.parametrize("form", FORMS)
linear = pytest.mark.parametrize("form", LINEAR)


def case_of(form: str, widths, options=(), **more) -> Case:
    of_form = FORMS[form][0] if form in FORMS else LINEAR[form]
    return Case(widths, {**of_form, **dict(options)}, form=form.split("/")[0], **more)


@pytest.mark.parametrize(
    "edit", ["low", "lowest", "dead student", "dead teacher", "dead first part", "some infinite", "bad rows", "dead rows", "far"]
)  # fmt: skip
@forms
def test_what_rows_hold(form, edit, ranks):
    # of a row without a softmax eager PyTorch has NaN where one process of ours has none
    for dtype in DTYPES[1:] if edit in ("bad rows", "dead rows") else DTYPES:
        hold(ranks, case_of(form, WIDTHS[3], {"temperature": 2.0}, dtype=dtype, edit=edit))


@pytest.mark.covering("form told", "form widths")
@pytest.mark.parametrize("told", ["offset", "nothing", "whole teacher"])
@pytest.mark.parametrize("widths", [(0, 33), (30, 1, 2), (9, 0, 0, 2)], ids=str)
@forms
def test_splits(form, widths, told, ranks):
    more = {"told": "nothing", "whole_teacher": True} if " " in told else {"told": told}
    for dtype in DTYPES:
        hold(ranks, case_of(form, widths, dtype=dtype, **more))


@forms
def test_placements(form, ranks):
    hold(ranks, case_of(form, (9, 9, 9, 6), dtype=torch.float64, told="placement"))


@pytest.mark.parametrize("edit", ["unread", "no token"])
@pytest.mark.parametrize("form", [*FORMS, *LINEAR])
def test_ignored_tokens(form, edit, ranks):
    if form == "distillation_metrics":
        return
    ours = hold(ranks, case_of(form, WIDTHS[3], dtype=torch.float64, edit=edit))
    assert all(x.isfinite().all() for x in ours.values())
    if edit == "no token":
        assert not any(x.any() for x in ours.values())


@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 31])
@pytest.mark.parametrize(
    "form", ["token_log_probs", "distillation_statistics", "linear_token_log_probs"]
)
def test_an_ignored_id_is_not_a_place_among_a_ranks_columns(form, ignore_index, ranks):
    """Whatever it is, and wherever ranks count their columns from."""
    more = {"ignore_index": ignore_index}
    case = case_of(form, WIDTHS[3], more, dtype=torch.float64, edit="counted ids")
    hold(ranks, case)


@forms
def test_half_precision(form, ranks):
    hold(ranks, case_of(form, WIDTHS[2], dtype=torch.bfloat16))


@pytest.mark.parametrize("form", [*FORMS, *LINEAR])
def test_ranks_that_differ_are_told_in_debug_mode(form, ranks):
    cases = [case_of(form, (17, 16), {"temperature": t}) for t in (1.0, 2.0)]
    for ended in ranks.call(2, in_debug_mode, cases):
        assert ended.error == "ValueError"
        assert "differ in temperature, got on rank" in ended.message
    for ended in ranks.call(2, in_debug_mode, cases[:1] * 2):
        assert ended.error is None, ended.message


@pytest.mark.parametrize("form", ["token_log_probs", "distillation_statistics"])
def test_an_id_that_no_rank_has_is_refused_by_all(form, ranks):
    ids, logits = torch.tensor([1, 33, -100]), torch.randn(3, 33)
    tensors = {"token_ids": ids, "logits": logits}
    if form != "token_log_probs":
        tensors = {"token_ids": ids, "student_logits": logits, "teacher_logits": logits}
    for ended, _ in ranks.call(3, called, form, tensors, {}):
        assert ended.error == "ValueError"
        assert "token_ids must lie in the vocabulary that the ranks split" in ended.message
        assert "1 tokens, the first of them at 1" in ended.message


def test_ties_agree_on_the_first_of_equals(ranks):
    """On whichever ranks they are."""
    student, teacher = torch.zeros(6, 12), torch.zeros(6, 12)
    student[0, [3, 9]] = teacher[0, [3, 5]] = 2.0  # 3 and 3
    student[1, [3, 9]] = teacher[1, [5, 9]] = 2.0  # 3 and 5
    student[2, [5, 9]] = teacher[2, [1, 9]] = 2.0  # the other rank's, though both have 9
    student[3, 11] = teacher[3, 11] = INF
    student[4, 3], teacher[4, 3], teacher[4, 9] = 2.0, 1.0, 2.0  # a rank's own are one column
    student[5, 9] = teacher[5, 10] = 2.0
    for form, more in (
        ("distillation_metrics", {}),
        ("distillation_statistics", {"token_ids": torch.zeros(6, dtype=torch.int64)}),
    ):
        tensors = {"student_logits": student, "teacher_logits": teacher, **more}
        for _, (found,) in ranks.call(3, called, form, tensors, {}):
            assert found.top1_agreement.tolist() == [True] + [False] * 5


@forms
def test_collectives_and_numbers_a_token(form, ranks):
    _, gathers, limit = FORMS[form]
    for dtype in DTYPES:
        case = case_of(form, WIDTHS[3], dtype=dtype)
        for forward, backward in ranks.call(3, traffic, case):
            assert forward.collectives == gathers
            assert forward.bytes <= limit * dtype.itemsize * 6
            assert (backward.collectives, backward.bytes) == (0, 0)


@pytest.mark.parametrize("told", ["offset", "placement"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@linear
def test_heads(form, sequence_parallel, told, ranks):
    """Of two ranks, which may split the tokens too."""
    options = {"memory_budget": 900, "sequence_parallel": sequence_parallel}
    for dtype in DTYPES:
        hold(ranks, case_of(form, (17, 16), options, dtype=dtype, told=told))


@pytest.mark.parametrize("widths", [(0, 33), (30, 1, 2), (9, 0, 0, 2)], ids=str)
@linear
def test_splits_of_heads(form, widths, ranks):
    for whole in (False, True):
        hold(ranks, case_of(form, widths, dtype=torch.float64, whole_teacher=whole))


@linear
def test_collectives_of_heads(form, ranks):
    """The widths, what the logits' forms exchange, and the sum of the hidden states' gradient."""
    case = case_of(form, WIDTHS[3])
    wanted = 3 if case.options.get("divergence") == "jensen_shannon" else 2
    made = "coefficients" in case.options  # the gradient, in the forward
    for forward, backward in ranks.call(3, traffic, case):
        assert forward.collectives == wanted + made
        assert backward.collectives == 1 - made
    for forward, _ in ranks.call(3, traffic, case_of(form, WIDTHS[3], {"memory_budget": 700})):
        blocks = (forward.collectives - 1 - made) / (wanted - 1)
        # log-probabilities of all blocks are exchanged together
        assert blocks == 1 if form == "linear_token_log_probs" else blocks == 3


full = lambda form: pytest.param(form, marks=pytest.mark.full)


@pytest.mark.parametrize(
    "form",
    ["distillation_statistics", full("token_log_probs"), full("linear_token_log_probs")],
)
def test_compiled(form, ranks):
    case = case_of(form, (17, 16))
    eager, graph = (merged(case, ranks.call(2, run_case, case, way)) for way in (False, True))
    assert all(same_bits(graph[name], eager[name]) for name in eager)
