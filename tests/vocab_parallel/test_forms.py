"""The other forms on two, three and four ranks: equal to one process, the same bits on every rank."""

import pytest
import torch

from tests.support.cases import FLOAT_MASK, LABELS
from tests.vocab_parallel.cases import DIVERGENCES, WIDTHS, Case, widths_of
from tests.vocab_parallel.results import hold, merged, same_bits
from tests.vocab_parallel.work import Traffic, runs, traffic

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
TAILS = {tail: {"tail": tail} for tail in ("renormalize", "ignore", "restrict", "drop")}
TAILS |= {"floor": {"log_prob_floor": -3.0}, "hard_ignore": {"tail": "ignore", **HARD}}

OPTIONS = {  # of the forms that take a divergence
    "topk_distillation_loss": LOSS | MORE | TAILS,
    "distillation_statistics": WARM | {"coefficients": {"coefficients": (0.7, -1.3, 0.25)}},
    "linear_distillation_loss": LOSS,
    "linear_distillation_statistics": WARM | {"coefficients": {"coefficients": (0.7, -1.3, 0.25)}},
}
OTHERS = {
    "token_log_probs": WARM,
    "linear_token_log_probs": WARM,
    "distillation_metrics": WARM | {"vocab_size": {"vocab_size": 29}},
}
COLLECTIVES = [  # of a forward that is told the offsets, and how many numbers a token and rank at most
    ("topk_distillation_loss", {"divergence": "soft_cross_entropy"}, 2, 16),
    ("topk_distillation_loss", {"divergence": "jensen_shannon", **HARD}, 2, 16),
    ("distillation_statistics", {"divergence": "soft_cross_entropy"}, 1, 16),
    ("distillation_statistics", {"divergence": "jensen_shannon"}, 2, 20),
    ("token_log_probs", {}, 1, 4),
    ("distillation_metrics", {}, 2, 16),
]


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


@pytest.mark.covering("tail edit", "divergence edit")
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore", "restrict", "drop"])
@pytest.mark.parametrize(
    "edit",
    ["unused slots", "slots of one rank", "some infinite", "dead student", "padding", "bad rows"],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_slots(divergence, edit, tail, ranks):
    options = {"divergence": divergence, "tail": tail, "reduction": "none", **HARD}
    for dtype in DTYPES:
        hold(ranks, Case(WIDTHS[3], options, dtype, "topk_distillation_loss", edit=edit))


@pytest.mark.parametrize(
    "edit", ["some infinite", "dead part", "dead student", "padding", "bad rows", "far"]
)
@pytest.mark.parametrize(
    "form", ["token_log_probs", "distillation_statistics", "distillation_metrics"]
)
def test_what_rows_hold(form, edit, ranks):
    dtypes = DTYPES[1:] if edit == "bad rows" else DTYPES  # as one process, not as the reference
    for dtype in dtypes:
        hold(ranks, Case(widths_of(form, edit), {}, dtype, form, edit=edit))


@pytest.mark.parametrize(("form", "options", "wanted", "limit"), COLLECTIVES)
def test_collectives_and_numbers_a_token(form, options, wanted, limit, ranks):
    for dtype in DTYPES:
        for forward, backward in ranks.call(3, traffic, Case(WIDTHS[3], options, dtype, form)):
            assert forward.collectives == wanted
            assert 0 < forward.bytes <= limit * dtype.itemsize * LABELS.numel()
            assert backward == Traffic(0, 0)


@pytest.mark.parametrize("form", [*OPTIONS, *OTHERS])
def test_run_to_run(form, ranks):
    case = Case(WIDTHS[3], {}, form=form)
    first, *others = (merged(case, x) for x in zip(*ranks.call(3, runs, case, 3), strict=True))
    for found in others:
        assert all(same_bits(found[name], first[name]) for name in first)
