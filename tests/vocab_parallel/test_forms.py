"""The other forms on two, three and four ranks: equal to one process, the same bits on every rank."""

import pytest
import torch

from tests.support.cases import FLOAT_MASK, LABELS
from tests.vocab_parallel.cases import DIVERGENCES, WIDTHS, Case, widths_of
from tests.vocab_parallel.results import hold

DTYPES = [torch.float32, torch.float64]
import inspect
import distill_ops


def here(forms):
    return {
        k: v
        for k, v in forms.items()
        if "group" in inspect.signature(getattr(distill_ops, k)).parameters
    }


TOLD = ["offset", "nothing"]
HARD = {"labels": LABELS, "hard_label_weight": 0.4}
LOSS = {
    "plain": {},
    "temperature": {"temperature": 2.0, "scale_by_temperature_squared": True},
    "mask": {"loss_mask": FLOAT_MASK, "reduction": "sum"},
    "none": {"loss_mask": FLOAT_MASK, "reduction": "none"},
    "hard": {**HARD, "return_components": True},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "hard_backward": {**HARD, "gradient": "backward", "loss_mask": FLOAT_MASK},
    "vocab_size": {"vocab_size": 29, **HARD},
    "no_token": {"loss_mask": torch.zeros(2, 3)},
}
BLOCKS = {"two blocks": {"kept_tokens": 6}, "capped": {
    "student_logit_scale": 0.7, "student_softcap": 3.0, "teacher_logit_scale": 1.5,
    "teacher_softcap": 5.0,
}}  # fmt: skip
TAILS = {tail: {"tail": tail} for tail in ("renormalize", "ignore", "restrict", "drop")}
OPTIONS = {  # of the forms that take a divergence
    "topk_distillation_loss": LOSS | TAILS | {"floor": {"log_prob_floor": -3.0}},
    "distillation_statistics": {
        "plain": {}, "temperature": {"temperature": 2.0}, "coefficients": {"coefficients": (0.7, -1.3, 0.25)},
    },
    "linear_distillation_loss": LOSS | BLOCKS,
    "linear_topk_distillation_loss": LOSS | TAILS,
    "linear_distillation_statistics": {"plain": {}, "temperature": {"temperature": 2.0}},
}  # fmt: skip
OTHERS = {
    "token_log_probs": {"plain": {}, "temperature": {"temperature": 2.0}},
    "linear_token_log_probs": {"plain": {}, "temperature": {"temperature": 2.0}},
    "distillation_metrics": {
        "plain": {}, "temperature": {"temperature": 2.0}, "vocab_size": {"vocab_size": 29},
    },
}  # fmt: skip
OPTIONS, OTHERS = here(OPTIONS), here(OTHERS)


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
