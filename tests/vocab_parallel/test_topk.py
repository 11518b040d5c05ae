"""The top-k loss on two, three and four ranks, what is its own: tails, where slots lie, and ids that no rank
has. ``test_forms.py`` has its options."""

import pytest
import torch

from distill_ops import topk_distillation_loss
from tests.support.cases import FLOAT_MASK, LABELS
from tests.vocab_parallel.cases import DIVERGENCES, SLOT_EDITS, WIDTHS, Case, widths_of
from tests.vocab_parallel.results import hold, merged, run_case, same_bits
from tests.vocab_parallel.work import Traffic, debug_mode, outcome, traffic

FORM = "topk_distillation_loss"
DTYPES = torch.float32, torch.float64
HARD = {"labels": LABELS, "hard_label_weight": 0.4}
KLS = "forward_kl", "reverse_kl", "symmetric_kl"
TAILS = {
    "bucket": {},
    "renormalize": {"tail": "renormalize"},
    "ignore": {"tail": "ignore"},
    "restrict": {"tail": "restrict"},
    "drop": {"tail": "drop"},
    "floor": {"log_prob_floor": -3.0},
    "restrict, floor": {"tail": "restrict", "log_prob_floor": -1.0},
    "drop, floor": {"tail": "drop", "log_prob_floor": -3.0},
}
EDITS = [*SLOT_EDITS, "dead student", "dead first part", "dead rows", "bad rows", "far"]

divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
tails = pytest.mark.parametrize("tail", TAILS)


@pytest.mark.covering("tail", "divergence", "hard tail")
@pytest.mark.parametrize("hard", [{}, {**HARD, "temperature": 2.0}, HARD], ids=["", "hot", "hard"])
@tails
@divergences
def test_tails(divergence, tail, hard, ranks):
    """The gradient in the forward and in the backward; with a label's own sums and without."""
    widths = widths_of(divergence, tail)
    for dtype, gradient in zip(DTYPES, ("forward", "backward"), strict=True):
        options = {**TAILS[tail], **hard, "divergence": divergence, "gradient": gradient}
        hold(ranks, Case(widths, options, dtype, FORM))


@pytest.mark.covering("divergence", "tail", "edit divergence.additive_at_teacher_zero")
@pytest.mark.parametrize("edit", EDITS)
@tails
@divergences
def test_what_slots_hold(divergence, tail, edit, ranks):
    widths = widths_of(divergence, tail, edit)
    options = {**TAILS[tail], "divergence": divergence, "reduction": "none"}
    if edit == "unused slots":
        options |= HARD
    for dtype, told in zip(DTYPES, ("offset", "nothing"), strict=True):
        if (edit, dtype) != (
            "confident",
            torch.float64,
        ):  # a rounding of 1 is more than 1e-12 of it
            hold(ranks, Case(widths, options, dtype, FORM, edit, told))


@pytest.mark.parametrize("tail", TAILS)
def test_a_confident_pair(tail, ranks):
    """Of sums and of D float32's rounding of 1 is not all that is left."""
    for divergence in KLS:
        options = {**TAILS[tail], "divergence": divergence, "reduction": "none"}
        hold(ranks, Case(WIDTHS[3], options, form=FORM, edit="confident"))


@pytest.mark.parametrize("divergence", ["soft_cross_entropy", "jensen_shannon"])
@pytest.mark.parametrize("options", [{}, {"log_prob_floor": -3.0}], ids=["", "floor"])
def test_no_rest_where_the_k_cover_the_vocabulary(divergence, options, ranks):
    """Which no rank knows alone."""
    options = {**options, "divergence": divergence, "gradient": "backward"}
    for dtype in DTYPES:
        hold(ranks, Case(WIDTHS[3], options, dtype, FORM, "every column"))


@pytest.mark.parametrize("divergence", KLS)
def test_masses(divergence, ranks):
    options = {
        "tail": "drop",
        "mass_terms": True,
        "divergence": divergence,
        "loss_mask": FLOAT_MASK,
    }
    for dtype in DTYPES:
        hold(ranks, Case(WIDTHS[3], options, dtype, FORM))
        hold(ranks, Case(WIDTHS[2], options | {"log_prob_floor": -3.0}, dtype, FORM, "excluded"))


@pytest.mark.parametrize("widths", [(17, 0, 16), (0, 33), (11, 11, 11, 0)], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "ignore", "restrict"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "alpha_beta"])
def test_ranks_without_columns(divergence, tail, widths, ranks):
    """Of their own, or beyond the vocabulary."""
    options = {"tail": tail, "divergence": divergence, **HARD}
    for dtype, edit in zip(DTYPES, ("nothing", "every column"), strict=True):
        hold(ranks, Case(widths, options, dtype, FORM, edit))
    options = {**options, "vocab_size": 29, "loss_mask": (torch.arange(6) != 3).view(2, 3)}
    hold(ranks, Case((29, 4), options, torch.float64, FORM, told="nothing"))


@pytest.mark.parametrize("widths", [(17, 16), (3, 3, 3, 0)], ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_placements(gradient, widths, ranks):
    """A DTensor sharded on its columns says it itself."""
    options = {**HARD, "divergence": "reverse_kl", "gradient": gradient}
    for dtype in DTYPES:
        hold(ranks, Case(widths, options, dtype, FORM, told="placement"))


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, tail, ranks):
    for divergence in ("reverse_kl", "alpha_beta"):
        hold(ranks, Case(WIDTHS[3], {**HARD, "divergence": divergence, "tail": tail}, dtype, FORM))


def test_teacher_rows(ranks):
    options = {"teacher_rows": torch.tensor([[3, 3, 0], [1, 5, 3]]), "divergence": "jensen_shannon"}
    for dtype, gradient in zip(DTYPES, ("forward", "backward"), strict=True):
        for tail in ("bucket", "renormalize"):
            case = Case(WIDTHS[3], options | {"tail": tail, "gradient": gradient}, dtype, FORM)
            hold(ranks, case)


@pytest.mark.covering("tail", "divergence", "options tail")
@pytest.mark.parametrize("options", [{}, HARD], ids=["soft", "hard"])
@tails
@divergences
def test_two_collectives_of_few_numbers(divergence, tail, options, ranks):
    options = {**TAILS[tail], **options, "divergence": divergence, "gradient": "backward"}
    for dtype in DTYPES:
        case = Case(WIDTHS[2], options, dtype, FORM)
        for forward, backward in ranks.call(2, traffic, case):
            assert forward.collectives == 2
            numbers = forward.bytes / dtype.itemsize / LABELS.numel()
            assert numbers == (13 if options.get("labels") is not None else 9)
            assert backward == Traffic(0, 0)
        told = case._replace(told="nothing")
        assert all(forward.collectives == 3 for forward, _ in ranks.call(2, traffic, told))


def with_id(member, case: Case, wrong: int):
    """How the call ends, a slot's id being that."""
    tensors, options = case.part(member.rank)
    tensors["teacher_ids"][1, 2, 0] = wrong
    return outcome(lambda: topk_distillation_loss(**tensors, **options, group=member.group))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "teacher_ids must lie in the vocabulary that the ranks split, or be -1 in unused slots",
        ),
        ({"vocab_size": 30}, "teacher_ids must lie in [0, 30), or be -1 in unused slots, got 33"),
    ],
    ids=["after", "before"],
)
def test_an_id_that_no_rank_has(options, message, ranks):
    """An error on every rank: before anything is computed, where the vocabulary's size is known."""
    for found in ranks.call(3, with_id, Case(WIDTHS[3], form=FORM), -2):
        assert (
            "teacher_ids must lie in the vocabulary, or be -1 in unused slots, got -2"
            in found.message
        )
    masked = {"loss_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    case = Case(WIDTHS[3], options, form=FORM)
    for found in ranks.call(3, with_id, case, 33):
        assert found.error == "ValueError"
        assert found.message.startswith(message)
    for found in ranks.call(3, with_id, Case(WIDTHS[3], masked, form=FORM), 33):
        assert found.error is None, found  # nobody looks at that token


def test_compiled(ranks):
    """One graph, whose operator holds the collectives."""
    options = {**HARD, "divergence": "reverse_kl", "gradient": "backward"}
    case = Case((17, 16), options, form=FORM, told="nothing")
    eager, graph = (merged(case, ranks.call(2, run_case, case, way)) for way in (False, True))
    assert all(same_bits(graph[name], eager[name]) for name in eager)


def with_slots(member, case: Case, n_slots: list[int], tails: list[str]):
    """How the call ends in debug mode, each rank having its own number of slots and tail."""
    tensors, _ = case.part(member.rank)
    for name in ("teacher_log_probs", "teacher_ids"):
        tensors[name] = tensors[name][..., : n_slots[member.rank]].contiguous()
    options = {"tail": tails[member.rank], "group": member.group}
    with debug_mode():
        return outcome(lambda: topk_distillation_loss(**tensors, **options))


@pytest.mark.parametrize(
    ("n_slots", "tails", "named"),
    [
        ([3, 3], ["drop", "drop"], None),
        ([3, 2], ["drop", "drop"], "the input log_probs, the input ids"),
        ([3, 3], ["bucket", "drop"], "tail"),
    ],
    ids=["agree", "slots", "tail"],
)
def test_ranks_that_differ(n_slots, tails, named, ranks):
    for found in ranks.call(2, with_slots, Case(form=FORM), n_slots, tails):
        assert found.error == (None if named is None else "ValueError"), found
        assert named is None or f"differ in {named}" in found.message
