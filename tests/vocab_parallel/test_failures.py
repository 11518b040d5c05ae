"""Ranks that raise, or that call with other arguments than the others."""

import pytest
import torch

from tests.support.cases import LABELS, TOKENS
from tests.support.ranks import RankError
from tests.vocab_parallel.cases import N_COLS, WIDTHS, Case
from tests.vocab_parallel.work import (
    call,
    in_debug_mode,
    inplace_dtensor,
    narrower_teacher,
    one_raises,
    raise_on_one,
    uneven_dtensor,
    unread_row,
)

TIMEOUT = 3.0


@pytest.mark.parametrize("divergence", ["soft_cross_entropy"])
def test_a_rank_that_raises_makes_the_others_fail(divergence, ranks):
    case = Case(WIDTHS[4], {"divergence": divergence})
    wrong = {"temperature": -1.0}
    found = ranks.call(4, one_raises, case, wrong, TIMEOUT)
    raised = found.pop(1)
    assert raised.error == "ValueError"
    assert "temperature must be positive" in raised.message
    for waited in found:
        assert waited.error == "RuntimeError"
        assert waited.seconds < 3 * TIMEOUT
        assert "rank" in waited.message


WRONG = {  # of every rank alike, words of the error
    "label": ({"labels": LABELS.clamp(min=0) + N_COLS, "hard_label_weight": 0.5}, "labels must lie in"),
    "label of padding": ({"labels": LABELS, "hard_label_weight": 0.5, "vocab_size": 5}, "labels must lie in"),
    "propagate": ({"infinities": "propagate"}, "infinities='drop'"),
    "outputs": ({"token_outputs": ["student_entropy"]}, "token_outputs"),
}  # fmt: skip


@pytest.mark.parametrize("told", ["offset", "nothing"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_an_error_on_every_rank(what, told, ranks):
    options, words = WRONG[what]
    case = Case(WIDTHS[2], options, told=told)
    for found in ranks.call(2, call, case):
        assert found.error == "ValueError", found
        assert words in found.message


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("distillation_loss", "nothing"), ("distillation_loss", "placement"),
        ("linear_distillation_loss", "offset"),
    ],
)  # fmt: skip
def test_more_columns_than_all_ranks_have(form, told, ranks):
    """Of logits an offset alone does not tell how many they are."""
    case = Case((17, 16), {"vocab_size": N_COLS + 1}, form=form, told=told)
    for found in ranks.call(2, call, case):
        assert found.error == "ValueError", found
        assert f"vocab_size must be at most the columns of all ranks, {N_COLS}" in found.message


def test_a_teacher_that_is_neither_split_alike_nor_whole(ranks):
    for told in ("offset", "nothing"):
        for found in ranks.call(2, narrower_teacher, Case(WIDTHS[2], told=told)):
            assert found.error == "ValueError"
            assert "split both alike, or give the teacher's whole vocabulary" in found.message


def test_dtensors_that_are_refused(ranks):
    uneven = [found.message for found in ranks.call(3, uneven_dtensor)]
    assert all("parts of other sizes than torch.chunk's" in message for message in uneven)
    for found in ranks.call(2, inplace_dtensor):
        assert "inplace=True needs student_logits that are no DTensor" in found.message


DIFFERENT = {  # what rank 1 has of its own
    "V": ({"vocab_size": N_COLS - 1}, {"vocab_size": N_COLS - 2}),
    "dtype": (torch.float32, torch.float64),
    "divergence": ({"divergence": "reverse_kl"}, {"divergence": "forward_kl"}),
    "collectives": ({"divergence": "reverse_kl"}, {"divergence": "jensen_shannon"}),
    "parameter": ({"temperature": 1.0}, {"temperature": 2.0}),
    "mask": ({"loss_mask": torch.ones(TOKENS)}, {"loss_mask": torch.full(TOKENS, 2.0)}),
    "labels": ({}, {"labels": LABELS, "hard_label_weight": 0.5}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_arguments_that_differ_are_an_error_on_every_rank(what, ranks):
    cases = []
    for value in DIFFERENT[what]:
        dtype = value if isinstance(value, torch.dtype) else torch.float32
        options = {} if isinstance(value, torch.dtype) else value
        cases.append(Case(WIDTHS[3], options, dtype))
    for found in ranks.call(3, in_debug_mode, [cases[0], cases[1], cases[0]]):
        assert found.error == "ValueError", found
        assert "rank" in found.message
    for found in ranks.call(3, in_debug_mode, [cases[1]] * 3):  # and the group still works
        assert found.error is None, found


def test_a_wrong_offset_is_told(ranks):
    """In debug mode; a label that two ranks have then is on a CPU always."""
    wrong = Case(WIDTHS[3], {"vocab_offset": 0})
    for found in ranks.call(3, in_debug_mode, [wrong] * 3):
        assert "vocab_offset must be the columns before a rank's own" in found.message
    labels = {"labels": LABELS % min(WIDTHS[3]), "hard_label_weight": 0.5}
    for found in ranks.call(3, call, wrong._replace(options=wrong.options | labels)):
        assert "by a wrong vocab_offset several" in found.message
    for found in ranks.call(3, call, wrong._replace(form="token_log_probs")):
        assert "by a wrong vocab_offset several" in found.message
    needed = Case(WIDTHS[2], whole_teacher=True)  # whose size nobody tells
    for found in ranks.call(2, call, needed):
        assert "without vocab_offset= or with vocab_size=" in found.message


def test_a_row_that_no_gradient_comes_to_is_not_read(ranks):
    """Of hidden states, in the backward."""
    for bad, good in ranks.call(2, unread_row):
        assert bad == 0
        assert good > 0


def test_the_processes_survive_a_rank_that_raises(ranks):
    """The traceback comes back at once, and not when the others have waited for long."""
    with pytest.raises(RankError, match=r"rank 3: (.|\n)*ZeroDivisionError"):
        ranks.call(2, raise_on_one)
    assert ranks.call(2, raise_on_one, False) == [3, 3]
