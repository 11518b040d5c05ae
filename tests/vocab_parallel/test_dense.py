"""The loss of logits on two, three and four ranks: equal to one process, the same bits on every rank."""

import pytest
import torch

from distill_ops import AlphaBeta, JensenShannon, SymmetricKL
from tests.support.cases import FLOAT_MASK, LABELS, OPTIONS, TOKENS
from tests.vocab_parallel.cases import BEYOND, DIVERGENCES, INF, WIDTHS, Case, widths_of
from tests.vocab_parallel.results import alone, compare, hold, merged, results, run_case, same_bits
from tests.vocab_parallel.work import runs

DTYPES = [torch.float32, torch.float64]
OPTIONS = {name: options for name, options in OPTIONS.items() if name != "propagate"}
OPTIONS |= {
    "inplace": {"inplace": True, "loss_mask": FLOAT_MASK},
    "inplace_backward": {
        "inplace": True, "gradient": "backward", "labels": LABELS, "hard_label_weight": 0.4,
    },
    "teacher_rows": {"teacher_rows": torch.tensor([[3, 1, 1], [0, 5, 5]]), "labels": LABELS},
}  # fmt: skip
KINDS = [
    "reverse_kl",
    "symmetric_kl",
    "jensen_shannon",
]  # one collective, two, two without a moment
ROWS = [
    "dead student", "dead teacher", "dead part", "dead first part", "some infinite", "padding",
    "bad rows", "dead rows", "each row another", "far",
]  # fmt: skip

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).split(".")[1])
divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


@pytest.mark.covering("option dtype", "divergence dtype")
@dtypes
@pytest.mark.parametrize("option", OPTIONS)
@divergences
def test_options(divergence, option, dtype, ranks):
    options = {**OPTIONS[option], "divergence": divergence}
    if "ignore_index" in options:
        options["labels"] = options["labels"].clamp(min=0)
    hold(ranks, Case(widths_of(divergence, option), options, dtype))


@pytest.mark.covering("widths told", "divergence told")
@pytest.mark.parametrize("told", ["offset", "nothing", "nothing, whole teacher"])
@pytest.mark.parametrize(
    "widths",
    [(16, 16), (1, 30), (0, 33), (11, 11, 11), (30, 1, 2), (8, 8, 8, 8), (1, 1, 40, 3), (9, 0, 0, 2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("divergence", KINDS)
def test_splits(divergence, widths, told, ranks):
    options = {"divergence": divergence, "labels": LABELS, "hard_label_weight": 0.4}
    told, *whole = told.split(", ")
    for dtype, gradient in zip(DTYPES, ("forward", "backward"), strict=True):
        case = Case(widths, {**options, "gradient": gradient}, dtype, told=told)
        hold(ranks, case._replace(whole_teacher=bool(whole)))


@pytest.mark.covering("widths gradient", "divergence gradient")
@pytest.mark.parametrize("widths", [(17, 16), (11, 11, 11), (9, 9, 9, 6), (3, 3, 3, 0)], ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("divergence", KINDS)
def test_placements(divergence, gradient, widths, ranks):
    """DTensors sharded on their columns say it themselves, and give gradients of their placement."""
    options = {
        "divergence": divergence, "labels": LABELS, "hard_label_weight": 0.4, "gradient": gradient,
    }  # fmt: skip
    for dtype, whole in zip(DTYPES, (False, True), strict=True):
        hold(ranks, Case(widths, options, dtype, told="placement", whole_teacher=whole))


@pytest.mark.parametrize("told", ["offset", "nothing", "replicated"])
def test_a_whole_teacher(told, ranks):
    """Also one that is padded further than the student, for ``vocab_size``."""
    for options in ({}, {"vocab_size": 29})[told == "offset" :]:  # which needs the latter
        replicated, padded = told == "replicated", 4 if options else 0
        more = {"whole_teacher": True, "padded": padded, "replicated": replicated}
        widths = (11, 11, 11) if replicated else WIDTHS[3]
        hold(ranks, Case(widths, options, told="placement" if replicated else told, **more))


@pytest.mark.covering("edit dtype", "divergence dtype")
@dtypes
@pytest.mark.parametrize("edit", ROWS)
@divergences
def test_what_rows_hold(divergence, edit, dtype, ranks):
    """Infinities, parts and rows without a finite logit, and offsets, on some ranks or on all."""
    options = {"divergence": divergence, "reduction": "none"}
    hold(ranks, Case(widths_of(divergence, edit), options, dtype, edit=edit))


@divergences
def test_huge_logits_below_temperature_1(divergence, ranks):
    options = {"divergence": divergence, "reduction": "none", "temperature": 0.5}
    case = Case(WIDTHS[2], options, edit="huge")
    ours, expected = merged(case, ranks.call(2, run_case, case)), alone(case)
    rows = expected["output 0"] < 1e30  # those beyond it end where float32 does
    assert rows.sum() >= 5
    assert rows[0, 0]
    for name, truth in expected.items():
        torch.testing.assert_close(ours[name][rows], truth[rows], rtol=1e-4, atol=1e-6)


@divergences
def test_nearly_equal_rows(divergence, ranks):
    """Where divergences are small against their terms; in float64 one process errs by more than 1e-12 too."""
    options = {"divergence": divergence, "reduction": "none"}
    hold(ranks, Case(widths_of(divergence), options, edit="equal"))


@pytest.mark.parametrize("edit", ["some infinite", "dead student", "dead part"])
@pytest.mark.parametrize("divergence", KINDS)
def test_hard_labels_of_infinite_logits(divergence, edit, ranks):
    """A label whose logit is -inf costs +inf on every rank; the others' rows keep their numbers."""
    options = {"divergence": divergence, "labels": LABELS, "hard_label_weight": 0.4}
    for more in ({"reduction": "none"}, {}, {"gradient": "backward"}):
        ours = hold(ranks, Case(WIDTHS[3], options | more, edit=edit))
        assert (ours["output 0"] == INF).any() == (edit != "some infinite")


@pytest.mark.covering("divergence told", "widths told")
@pytest.mark.parametrize("told", ["offset", "nothing"])
@pytest.mark.parametrize("widths", [(15, 14, 4), (29, 4), (20, 2, 5, 6)], ids=str)
@pytest.mark.parametrize("divergence", KINDS)
def test_ranks_beyond_the_vocabulary(divergence, widths, told, ranks):
    """All of their columns are padding, which nobody reads: NaN there does no harm."""
    options = {
        "divergence": divergence, "labels": LABELS, "hard_label_weight": 0.4, "vocab_size": BEYOND,
        "gradient": "backward",
    }  # fmt: skip
    for dtype in DTYPES:
        ours = hold(ranks, Case(widths, options, dtype, edit="beyond", told=told))
        assert (ours["gradient of student_logits"][..., BEYOND:] == 0).all()


@pytest.mark.covering("options reduction", "divergence")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_mask": torch.zeros(TOKENS)},
        {"labels": torch.full(TOKENS, -100)},
        {"labels": torch.full(TOKENS, -100), "hard_label_weight": 0.5},
        {"labels": torch.full(TOKENS, -100), "hard_label_weight": 1.0},
    ],
    ids=["mask", "labels", "hard", "hard_only"],
)
@pytest.mark.parametrize("divergence", ["soft_cross_entropy", "jensen_shannon"])
def test_no_kept_token(divergence, options, reduction, ranks):
    options = {**options, "reduction": reduction, "divergence": divergence}
    ours = hold(ranks, Case(WIDTHS[3], options, edit="bad rows"))
    assert (ours["output 0"] == 0).all()
    assert (ours["gradient of student_logits"] == 0).all()


@pytest.mark.covering("divergence", "weights divergence.moment")
@pytest.mark.parametrize("weights", [(0.0, None), (0.3, None), (1.0, None), (1.5, -2.0)], ids=str)
@divergences
def test_components(divergence, weights, ranks):
    options = {
        "labels": LABELS, "temperature": 2.0, "hard_label_weight": weights[0],
        "soft_weight": weights[1], "scale_by_temperature_squared": True, "divergence": divergence,
        "return_components": True,
    }  # fmt: skip
    ours = hold(ranks, Case(WIDTHS[3], options))
    assert len(ours) == 4


@pytest.mark.parametrize(
    "divergence",
    [
        SymmetricKL(torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))),
        JensenShannon(torch.linspace(0.1, 0.9, 6).view(TOKENS)), AlphaBeta(torch.tensor(0.3), 0.5),
    ],
    ids=lambda x: x.name,
)  # fmt: skip
def test_parameters_that_are_tensors(divergence, ranks):
    for dtype, gradient in zip(DTYPES, ("forward", "backward"), strict=True):
        options = {"divergence": divergence, "gradient": gradient, "loss_mask": FLOAT_MASK}
        hold(ranks, Case(WIDTHS[3], options, dtype))


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_no_teacher(gradient, ranks):
    options = {"labels": LABELS, "hard_label_weight": 1.0, "gradient": gradient}
    for dtype, told in zip(DTYPES, ("offset", "nothing"), strict=True):
        hold(ranks, Case(WIDTHS[3], options, dtype, edit="no teacher", told=told))


@pytest.mark.covering("divergence", "gradient divergence.moment")
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@divergences
def test_run_to_run(divergence, gradient, ranks):
    options = {
        "divergence": divergence, "labels": LABELS, "hard_label_weight": 0.4, "gradient": gradient,
    }  # fmt: skip
    case = Case(widths_of(divergence, gradient), options)
    of_ranks = ranks.call(len(case.widths), runs, case, 4)
    first, *others = (merged(case, of_run) for of_run in zip(*of_ranks, strict=True))
    for found in others:
        assert all(same_bits(found[name], first[name]) for name in first)


@pytest.mark.parametrize("told", [pytest.param("nothing", marks=pytest.mark.full), "placement"])
def test_compiled(told, ranks):
    """One graph, whose operator holds the collectives."""
    options = {"divergence": "jensen_shannon", "labels": LABELS, "hard_label_weight": 0.4}
    case = Case((17, 16), options, told=told)
    eager, graph = (merged(case, ranks.call(2, run_case, case, way)) for way in (False, True))
    assert all(same_bits(graph[name], eager[name]) for name in eager)


def test_the_comparison_sees_ranks_that_do_not_communicate():
    case = Case(WIDTHS[2], {"reduction": "none"}, told="nothing")
    found = [results(case.of_form.function, case.of_form, *case.part(rank)) for rank in range(2)]
    with pytest.raises(AssertionError, match="is not rank 0's"):
        merged(case, found)
    for of_rank in found:
        of_rank["output 0"] = found[0]["output 0"]
    with pytest.raises(AssertionError, match="worst entry"):
        compare(case, merged(case, found))
