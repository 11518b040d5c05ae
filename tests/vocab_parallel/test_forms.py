"""The other forms on two, three and four ranks: equal to one process, the same bits on every rank.

``test_linear.py``, ``test_topk.py`` and ``test_tokens.py`` have what is their own."""

import pytest
import torch

from tests.support.cases import FLOAT_MASK, LABELS
from tests.vocab_parallel.cases import DIVERGENCES, WIDTHS, Case, widths_of
from tests.vocab_parallel.results import hold, merged, same_bits
from tests.vocab_parallel.work import runs

DTYPES = [torch.float32, torch.float64]
TOLD = ["offset", "nothing"]
HARD = {"labels": LABELS, "hard_label_weight": 0.4}
WARM = {"plain": {}, "temperature": {"temperature": 2.0}}
LOSS = {
    "plain": {},
    "none": {"loss_mask": FLOAT_MASK, "reduction": "none", "temperature": 2.0},
    "hard_backward": {**HARD, "gradient": "backward", "loss_mask": FLOAT_MASK},
}  # fmt: skip
MORE = {
    "temperature": {"temperature": 2.0, "scale_by_temperature_squared": True},
    "mask": {"loss_mask": FLOAT_MASK, "reduction": "sum"},
    "hard": {**HARD, "return_components": True},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "vocab_size": {"vocab_size": 29, **HARD},
    "no_token": {"loss_mask": torch.zeros(2, 3)},
}
OPTIONS = {  # of the forms that take a divergence
    "topk_distillation_loss": LOSS | MORE,
    "distillation_statistics": WARM | {"coefficients": {"coefficients": (0.7, -1.3, 0.25)}},
    "linear_distillation_loss": LOSS,
    "linear_topk_distillation_loss": LOSS,
    "linear_distillation_statistics": WARM | {"coefficients": {"coefficients": (0.7, -1.3, 0.25)}},
}
OTHERS = {
    "token_log_probs": WARM,
    "linear_token_log_probs": WARM,
    "distillation_metrics": WARM | {"vocab_size": {"vocab_size": 29}},
}


@pytest.mark.covering("form divergence", "form option")
@pytest.mark.parametrize(
    ("form", "option"), [(form, option) for form in OPTIONS for option in OPTIONS[form]]
)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_forms_with_a_divergence(divergence, form, option, ranks):
    options = {**OPTIONS[form][option], "divergence": divergence}
    for dtype, told in zip(DTYPES, TOLD, strict=True):
        hold(ranks, Case(widths_of(divergence, option), options, dtype, form, told=told))


@pytest.mark.parametrize(
    ("form", "option"), [(form, option) for form in OTHERS for option in OTHERS[form]]
)
@pytest.mark.parametrize("world", WIDTHS)
def test_forms_without(world, form, option, ranks):
    for dtype in DTYPES:
        for told in TOLD:
            hold(ranks, Case(WIDTHS[world], OTHERS[form][option], dtype, form, told=told))


@pytest.mark.parametrize("form", [*OPTIONS, *OTHERS])
def test_run_to_run(form, ranks):
    case = Case(WIDTHS[3], {}, form=form)
    first, *others = (merged(case, x) for x in zip(*ranks.call(3, runs, case, 3), strict=True))
    for found in others:
        assert all(same_bits(found[name], first[name]) for name in first)
