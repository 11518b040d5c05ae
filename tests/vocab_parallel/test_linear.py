"""The linear loss of a column-parallel head: its blocks and their collectives, tokens that ranks split,
DTensors, and calls that differ between ranks."""

import pytest
import torch

from distill_ops import linear_distillation_loss
from distill_ops.heads.blocks import split
from tests.support.cases import FLOAT_MASK, LABELS
from tests.vocab_parallel.cases import WIDTHS, Case
from tests.vocab_parallel.linear_work import (
    WAYS,
    Model,
    called,
    differ,
    given_logits,
    gradients,
    heads,
    many_tokens,
    memory,
    model_loss,
    sharded,
    split_tokens,
    still_sharded,
    two_dimensions,
)
from tests.vocab_parallel.results import compare, hold, merged, run_case, same_bits
from tests.vocab_parallel.work import runs, traffic

FORM, TOPK = "linear_distillation_loss", "linear_topk_distillation_loss"
KINDS = ["soft_cross_entropy", "jensen_shannon"]  # of one collective a block, and of two
HARD = {"labels": LABELS, "hard_label_weight": 0.4}
GRADIENTS = ["forward", "backward"]
MIB = 1 << 20

kinds = pytest.mark.parametrize("divergence", KINDS)
when = pytest.mark.parametrize("gradient", GRADIENTS)


def close(found, expected):
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def budget_of(tokens: int, widest: int, itemsize: int) -> int:
    """Bytes of that many tokens: hidden states of the student, their gradient and that of the logits; the
    teacher's logits and hidden states. The student's logits share the gradient's memory."""
    student, teacher = 6, 8
    return tokens * itemsize * (2 * student + widest + widest + teacher)


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True])
def test_blocks_hold_both_logits_of_all_their_tokens(gpu):
    """The rows under work are the block's: its collectives need them all."""
    for budget in (100, 1000, 1 << 15, 1 << 20):
        blocks = split(5000, 60, 40, budget, 0, gpu=gpu, pieces=True, whole=True)
        assert blocks.rows == blocks.tokens
        assert blocks.tokens * 100 <= budget
        n_blocks = -(-5000 // (budget // 100))
        assert n_blocks <= -(-5000 // blocks.tokens) <= n_blocks * (1.3 if gpu else 1)
    assert split(5000, 60, 40, 400_000, 100_000, gpu=gpu, whole=True) == (5000, 5000)


@pytest.mark.parametrize("widths", [WIDTHS[3], (9, 0, 24), (1, 30, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@when
@kinds
def test_blocks_are_those_of_the_widest_rank(divergence, gradient, dtype, widths, ranks):
    """Of as many tokens on all ranks, whatever a rank's own columns would allow."""
    options = {**HARD, "divergence": divergence, "gradient": gradient}
    budget = budget_of(2, max(widths), dtype.itemsize)
    case = Case(widths, {**options, "memory_budget": budget}, dtype, FORM)
    hold(ranks, case)
    n_blocks = -(-int((LABELS != -100).sum()) // 2)
    each = 1 if divergence == "soft_cross_entropy" else 2
    for forward, backward in ranks.call(len(widths), traffic, case):
        of_hidden = int(gradient == "forward")
        assert forward.collectives == 1 + n_blocks * each + of_hidden  # 1: the widths
        assert backward.collectives == 1 - of_hidden


def test_blocks_are_planned_for_columns_that_count(ranks):
    widths, vocab_size = (5, 28), 9  # 5 and 4 of them count
    options = {"vocab_size": vocab_size, "memory_budget": budget_of(2, 5, 4)}
    for forward, _ in ranks.call(2, traffic, Case(widths, options, form=FORM)):
        assert forward.collectives == 1 + LABELS.numel() // 2 + 1


def test_one_block_instead_of_a_sum_of_the_weights_gradient(ranks):
    """Which the widest rank's sum decides, the largest."""
    of_all, of_sum = budget_of(LABELS.numel(), 28, 4), 4 * 28 * 6
    for budget, n_blocks in ((of_all - of_sum, 1), (of_all - of_sum - 1, 2)):
        case = Case(WIDTHS[3], {"memory_budget": budget}, torch.bfloat16, FORM)
        for forward, _ in ranks.call(3, traffic, case):
            assert forward.collectives == 1 + n_blocks + 1


def test_a_block_is_not_done_in_pieces(ranks):
    """As a CPU does it without a split: each would have collectives of its own."""
    for forward in ranks.call(2, many_tokens, 300):
        assert forward == 1 + 1 + 1


@when
@kinds
def test_what_a_rank_sends(divergence, gradient, ranks):
    """The numbers of the tokens, and one gradient of the hidden states."""
    options = {"divergence": divergence, "gradient": gradient, "labels": LABELS}
    case = Case(WIDTHS[3], options, form=FORM)
    n, n_kept, dim = LABELS.numel(), int((LABELS != -100).sum()), 6
    numbers = 8 if divergence == "soft_cross_entropy" else 8 + 3
    for forward, backward in ranks.call(3, traffic, case):
        assert forward.bytes + backward.bytes == 4 * 8 + 4 * numbers * n_kept + 4 * n * dim


def test_the_smallest_budget_is_the_widest_ranks(ranks):
    widths, least = WIDTHS[3], budget_of(1, 28, 8)
    options = {"memory_budget": least - 1, "divergence": "reverse_kl"}
    for found in ranks.call(3, differ, widths, [options] * 3):
        assert found.error == "ValueError"
        assert f"take {least} bytes" in found.message
    options["memory_budget"] = least
    assert all(found.error is None for found in ranks.call(3, differ, widths, [options] * 3))


@when
def test_memory(gradient, ranks):
    """Both logits of a block are within the budget."""
    n_tokens, dim, width, budget = 512, 8, 16384, 4 * MIB
    options = {"divergence": "reverse_kl", "memory_budget": budget, "gradient": gradient}
    logits, of_weight = 4 * n_tokens * width, 4 * width * dim
    for peak in ranks.call(2, memory, n_tokens, dim, width, options):
        assert of_weight <= peak <= of_weight + budget + 12 * MIB < logits, f"{peak / MIB:.1f} MiB"


# --- heads and tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(20, 2, 5, 6), (0, 17, 16), (33, 0)], ids=str)
@pytest.mark.parametrize("whole", [False, True])
@when
@kinds
def test_ranks_without_columns_that_count(divergence, gradient, whole, widths, ranks):
    options = {**HARD, "divergence": divergence, "gradient": gradient, "vocab_size": 20}
    for dtype, told in ((torch.float32, "nothing"), (torch.float64, "offset")):
        ours = hold(ranks, Case(widths, options, dtype, FORM, told=told, whole_teacher=whole))
        assert (ours["gradient of student_weight"][20:] == 0).all()


@when
def test_no_kept_token(gradient, ranks):
    """No block, and still one gradient of hidden states, which is 0."""
    options = {"loss_mask": torch.zeros(LABELS.shape), "gradient": gradient}
    case = Case(WIDTHS[3], options, form=FORM)
    ours = hold(ranks, case)
    assert all((x == 0).all() for x in ours.values())
    for forward, backward in ranks.call(3, traffic, case):
        assert forward.collectives + backward.collectives == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, ranks):
    for widths in (WIDTHS[3], (9, 0, 24)):
        hold(ranks, Case(widths, {**HARD, "divergence": "reverse_kl"}, dtype, FORM))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([[3, 1, 1, 0], [7, 5, 5, 5]])])
@when
@pytest.mark.parametrize("widths", [WIDTHS[3], (9, 0, 24)], ids=str)
def test_given_logits(widths, gradient, rows, whole, ranks):
    """Of the teacher, split or whole, its rows in order or chosen; the reference gathers them."""
    options = {"divergence": "jensen_shannon", "teacher_rows": rows, "vocab_size": 29}
    hidden, *head = given_logits(None, widths, whole, {**options, "gradient": gradient})[1:]
    expected = [[hidden, *parts] for parts in zip(*(x.split(widths) for x in head), strict=True)]
    arguments = given_logits, widths, whole
    found = ranks.call(3, *arguments, {**options, "gradient": gradient})
    oracle = ranks.call(3, *arguments, options, True)
    for ours, theirs, parts in zip(found, oracle, expected, strict=True):
        close(ours[1:], parts)
        close(ours, theirs)


@pytest.mark.parametrize("whole", [False, True])
@when
@pytest.mark.parametrize("divergence", [*KINDS, "reverse_kl"])
def test_sequence_parallel(divergence, gradient, whole, ranks):
    """Hidden states come sharded over their first dimension; labels, masks and results are of all."""
    options = {**HARD, "divergence": divergence, "gradient": gradient}
    if gradient == "backward":
        options |= {"reduction": "none", "loss_mask": FLOAT_MASK, "vocab_size": 29}
    for dtype in (torch.float32, torch.float64):
        case = Case(
            WIDTHS[2], {**options, "sequence_parallel": True}, dtype, FORM, whole_teacher=whole
        )
        compare(case._replace(options=options), merged(case, ranks.call(2, run_case, case)))
        each, n = 1 if divergence != "jensen_shannon" else 2, int(gradient == "forward")
        for forward, backward in ranks.call(2, traffic, case):  # both models' hidden states
            assert forward.collectives == 1 + 2 + each + n
            assert backward.collectives == 0 if n else 2 + 1


@pytest.mark.parametrize("way", ["checkpoint", "module"])
def test_other_ways_to_call(way, ranks):
    for found, expected in ranks.call(2, called, WIDTHS[2], way):
        for ours, plain in zip(found, expected, strict=True):
            assert same_bits(ours, plain)


def test_sequence_parallel_needs_as_many_tokens_on_each_rank(ranks):
    options = {"sequence_parallel": True}
    for found in ranks.call(3, split_tokens, WIDTHS[3], (2, 2, 3), options):
        assert found.error == "ValueError"
        assert (
            "equally many each, with sequence_parallel=True, got [2, 2, 3] tokens" in found.message
        )
    of_six = {"kept_tokens": 6, "teacher_rows": torch.tensor([5, 4, 3, 2, 1, 0]), "normalizer": 3}
    for found in ranks.call(3, split_tokens, WIDTHS[3], (2, 2, 2), options | of_six):
        assert found.error is None, found
    labels = {"labels": torch.zeros(7, dtype=torch.int64), "sequence_parallel": True}
    for found in ranks.call(3, split_tokens, WIDTHS[3], (2, 2, 2), labels):
        assert found.error == "ValueError"
        assert (
            "labels must have the leading shape of student_hidden of all 3 ranks, (6,)"
            in found.message
        )
    for found in ranks.call(3, split_tokens, WIDTHS[3], (2, 3, 2), {}):
        assert found.error == "ValueError"
        assert "all of them, got [2, 3, 2] tokens" in found.message


def test_sequence_parallel_needs_a_group():
    pair = heads()
    with pytest.raises(ValueError, match="sequence_parallel=True needs group="):
        linear_distillation_loss(*pair[:4], sequence_parallel=True)
    with pytest.raises(TypeError, match="sequence_parallel must be"):
        linear_distillation_loss(*pair[:4], sequence_parallel=2)


@pytest.mark.covering("split", "gradient")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@when
def test_topk_teachers(gradient, tail, split, ranks):
    """Two collectives a block; slots are whole on every rank, and of all tokens."""
    options = {"divergence": "reverse_kl", "gradient": gradient, "tail": tail, "labels": LABELS}
    widths = WIDTHS[2] if split else (14, 0, 19)
    budget = 8 * (2 * 6 + 19) + 1  # of one token of the widest rank
    if gradient == "backward":
        options |= {"reduction": "none", "vocab_size": 29}
    given = {**options, "memory_budget": budget, "sequence_parallel": split}
    case = Case(widths, given, torch.float64, TOPK)
    compare(case._replace(options=options), merged(case, ranks.call(len(widths), run_case, case)))
    n, of_hidden = int((LABELS != -100).sum()), int(gradient == "forward")
    for forward, backward in ranks.call(len(widths), traffic, case):
        assert forward.collectives == 1 + int(split) + 2 * n + of_hidden
        assert backward.collectives == (0 if of_hidden else int(split) + 1)


@pytest.mark.parametrize(
    ("form", "gradient", "split"),
    [
        pytest.param(FORM, "forward", False, marks=pytest.mark.full),
        (FORM, "backward", True),
        pytest.param(TOPK, "backward", False, marks=pytest.mark.full),
    ],
)
def test_compiled(form, gradient, split, ranks):
    """One graph, whose operator holds the collectives."""
    options = {
        **HARD,
        "divergence": "jensen_shannon",
        "gradient": gradient,
        "sequence_parallel": split,
    }
    if gradient == "backward":
        options["reduction"] = "none"
    case = Case(WIDTHS[2], options, form=form)
    eager, graph = (merged(case, ranks.call(2, run_case, case, way)) for way in (False, True))
    assert all(same_bits(graph[name], eager[name]) for name in eager)


@when
def test_run_to_run(gradient, ranks):
    options = {**HARD, "divergence": "jensen_shannon", "gradient": gradient, "memory_budget": 700}
    case = Case(WIDTHS[3], options, form=FORM)
    of_ranks = ranks.call(3, runs, case, 3)
    first, *others = (merged(case, of_run) for of_run in zip(*of_ranks, strict=True))
    for found in others:
        assert all(same_bits(found[name], first[name]) for name in first)


# --- DTensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_cols", [33, 30, 5])
@when
def test_sharded_heads(gradient, n_cols, ranks):
    """Shard(0) over the group: the vocabulary is split, nobody asks for widths, and gradients come back
    with their placement."""
    options = {"divergence": "jensen_shannon", "gradient": gradient}
    pair = heads()
    hidden, weight, bias, of_teacher, teacher_bias = (
        pair.student_hidden, pair.student_weight[:n_cols], pair.student_bias[:n_cols],
        pair.teacher_weight[:n_cols], pair.teacher_bias[:n_cols],
    )  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_distillation_loss(
        *leaves[:2], pair.teacher_hidden, of_teacher, student_bias=leaves[2],
        teacher_bias=teacher_bias, **options,
    )  # fmt: skip
    expected = gradients(loss, leaves)
    for n, by_mesh in ((2, True), (4, False)):
        replicated = gradient == "forward" and by_mesh
        arguments = n_cols, options, by_mesh, replicated
        for collectives, found in ranks.call(n, sharded, *arguments):
            close(found, expected)
            assert collectives == 2 + int(gradient == "forward")


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_of_fsdp_and_tensor_parallel(way, ranks):
    """The dimension of FSDP2 is gathered first; gradients are the mean over it."""
    model, total = Model(), 0.0
    for row in range(2):
        x, loss = model_loss(row)
        total = total + model(x, loss) / 2
    total.backward()
    for found in ranks.call(4, two_dimensions, way):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-13)


def test_what_is_sharded_otherwise(ranks):
    for other, ungrouped, two in ranks.call(4, still_sharded):
        assert other.error == "ValueError"
        assert "pass the group of the mesh dimension that splits its vocabulary" in other.message
        assert ungrouped.error == "TypeError"
        assert "unshard()" in ungrouped.message
        assert "pass group=" in ungrouped.message
        assert two.error == "ValueError"
        assert "student_weight is a DTensor on a mesh of 2 dimensions" in two.message
        assert "grad_placements=[Partial('avg'), Shard(0)]" in two.message


# --- calls that differ ---------------------------------------------------------------------------


def test_wrong_offsets_and_teachers_are_an_error_on_every_rank(ranks):
    offsets = [{"vocab_offset": 0}, {"vocab_offset": 3}, {"vocab_offset": 5}]
    for found in ranks.call(3, differ, WIDTHS[3], offsets):
        assert found.error == "ValueError"
        assert (
            "vocab_offset must be the columns before a rank's own, 2 on rank 1 of 3"
            in found.message
        )
        assert "got 3" in found.message
    for found in ranks.call(3, differ, WIDTHS[3], [{}, {"teacher rows": 1}, {}]):
        assert found.error == "ValueError"
        assert (
            "[2, 3, 28] columns on the ranks, or whole on each, 33, got [2, 1, 28]" in found.message
        )
    whole = {"vocab_size": 2, "teacher rows": 2}  # of which the last two ranks have nothing
    for one in ({}, whole):
        for found in ranks.call(3, differ, WIDTHS[3], [one] * 3):
            assert found.error is None, found


@pytest.mark.parametrize(
    "different",
    [
        {"memory_budget": 5000},
        {"divergence": "jensen_shannon"},
        {"student_softcap": 3.0},
        {"kept_tokens": 8},
        {"gradient": "backward"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_arguments_that_differ_are_an_error_on_every_rank(different, ranks):
    for found in ranks.call(3, differ, WIDTHS[3], [{}, different, {}], True):
        assert found.error == "ValueError"
        assert "the ranks of group" in found.message
    for found in ranks.call(3, differ, WIDTHS[3], [different] * 3, True):
        assert found.error is None
