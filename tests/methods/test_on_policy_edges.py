"""``methods.on_policy`` where numbers are 0, infinite, or beyond what floats hold."""

import math

import pytest
import torch

from distill_ops.methods import on_policy
from distill_ops.reference.on_policy import on_policy_loss

NAN, INF = math.nan, math.inf
ALL = (0.0, INF)
OBJECTIVES = [{}, {"objective": "sampled"}, {"objective": "support", "k": 2}]
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=["full", "sampled", "support"])
functions = pytest.mark.parametrize(
    "function", [on_policy.loss, on_policy_loss], ids=["loss", "reference"]
)


def call(student, teacher, function=on_policy.loss, **options):
    """Tokens of id 0, one row; the result and the gradient of the logits, ``[S, V]``."""
    leaf = torch.tensor([student], requires_grad=True)
    if teacher is not None:
        teacher = torch.tensor([teacher])
    ids, mask = torch.zeros(leaf.shape[:-1]).long(), torch.ones(leaf.shape[:-1])
    found = function(leaf, teacher, ids, mask, **options)
    found.loss.sum().backward()
    return found, leaf.grad[0]


def one_token(student, teacher, **options):
    found, gradient = call([student], [teacher], **{"objective": "sampled"} | options)
    return found, gradient[0]


def old(*log_probs, **options):
    return {"behaviour_log_probs": torch.tensor([log_probs])} | options


def test_a_token_that_the_teacher_excludes():
    found, gradient = one_token([0.0, 0.0], [-INF, 0.0])
    assert found.loss == INF
    assert not gradient.isfinite().any()
    found, gradient = one_token([0.0, 0.0], [-INF, 0.0], reward_clip=2.0)
    assert found.loss == 2
    assert gradient.tolist() == [1.0, -1.0]  # 2 (1 - q), -2 q
    found, gradient = one_token([0.0, 0.0], [-INF, 0.0], objective="full")
    assert found.loss == 0  # the student restricted to the teacher's support, as everywhere
    assert found.k1 == INF


@pytest.mark.parametrize("importance", ["truncate", "mask", "clip"])
def test_a_token_that_the_student_has_come_to_exclude(importance):
    """Its weight is 0: so are loss and gradient."""
    found, gradient = one_token([-INF, 0.0], [0.0, 0.0], importance=importance, **old(-1.0))
    assert found.importance_weights == 0
    assert found.loss == 0
    assert not gradient.any()
    assert found.share_out_of_bounds == (importance == "mask")  # "clip" stops the other side


EXCLUDING = {  # options of "sampled"
    "none": {},
    "lower bound": old(*4 * [-1.0], importance="truncate", bounds=(0.5, 2.0)),
    "mask": old(*4 * [-1.0], importance="mask"),
    "clip": old(-1.0, -0.01, -1.0, -1.0, importance="clip"),
    "no lower bound": old(*4 * [-1.0], importance="clip", bounds=(0.0, 1.2)),
    "dual clip": old(-1.0, -9.0, -1.0, -1.0, importance="clip", dual_clip=3.0),
    "reward": {"reward_clip": 5.0},
}


@pytest.mark.parametrize("name", EXCLUDING)
def test_exclusions_against_the_reference(name):
    """Tokens that the student, the teacher, both and none exclude: the same values and record, without NaN."""
    student = [[-INF, 0.0], [0.0, 0.0], [-INF, 0.0], [0.0, 1.0]]
    teacher = [[0.0, 0.0], [-INF, 0.0], [-INF, 0.0], [0.0, 0.5]]
    options = {"objective": "sampled", "reduction": "none"} | EXCLUDING[name]
    (found, ours), (expected, theirs) = (
        call(student, teacher, function, **options) for function in (on_policy.loss, on_policy_loss)
    )
    for field, x in zip(expected._fields, expected, strict=True):
        if x is not None:
            y = getattr(found, field)
            torch.testing.assert_close(y, x, msg=lambda m, field=field: f"{field}: {m}")
            assert not y.isnan().any()
    finite = expected.loss[0].isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite])
    assert ours[finite].isfinite().all()


def test_a_clipped_token_has_the_value_of_its_bound():
    """``r lower``, infinite where r is; no gradient."""
    found, gradient = one_token([0.0, 0.0], [-1.0, 0.0], importance="clip", **old(-0.1))
    assert found.loss.item() == pytest.approx(0.8 * found.k1.item())
    assert found.importance_weights == 0
    assert not gradient.any()
    found, gradient = one_token([0.0, 0.0], [-INF, 0.0], importance="clip", **old(-0.01))
    assert found.loss == INF
    assert not gradient.any()


SERVED = {"objective": "sampled", "teacher_log_probs": torch.tensor([[-INF, -1.0]])}


@functions
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "sampled"},
        SERVED,
        SERVED | old(-0.01, -1.0, importance="clip"),
        SERVED | old(-1.0, -1.0, importance="truncate"),
    ],
    ids=["sampled", "served", "clip", "truncate"],
)  # fmt: skip
def test_a_token_weight_of_0_beside_an_infinite_term(options, function):
    """Term and gradient are 0, as beside a finite one; the record is that of the token all the same."""
    student, teacher = [[0.0, 0.0], [0.0, 1.0]], [[-INF, 0.0], [0.0, 0.5]]
    finite, weights = [[-1.0, 0.0], teacher[1]], torch.tensor([[0.0, 1.0]])
    given = dict(options)
    if "teacher_log_probs" in given:
        teacher = finite = None
        given["teacher_log_probs"] = torch.tensor([[-2.0, -1.0]])
    found, gradient = call(student, teacher, function, token_weights=weights, **options)
    expected, theirs = call(student, finite, on_policy_loss, token_weights=weights, **given)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(gradient, theirs)
    assert found.k1[0, 0] == INF
    assert not gradient[0].any()
    assert gradient[1].all()


def test_an_infinite_term_of_weight_0_leaves_the_head_its_gradient():
    hidden, weight = torch.ones(1, 2, 3), torch.ones(5, 3).requires_grad_()
    options = SERVED | {"token_weights": torch.tensor([[0, 1]])}
    found = on_policy.linear_loss(
        hidden, weight, None, None, torch.zeros(1, 2).long(), torch.ones(1, 2), **options
    )
    found.loss.backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


def test_ratios_beyond_floats():
    for importance, weight in (("truncate", 2.0), ("mask", 0.0)):
        found, gradient = one_token([0.0, 0.0], [0.0, 1.0], importance=importance, **old(-1e4))
        assert found.importance_weights == weight
        assert found.out_of_bounds.all()
        assert gradient.isfinite().all()


@functions
def test_a_ratio_beyond_floats_is_clipped(function):
    """``max(r rho, 1.2 r)`` of a negative r is ``1.2 r``."""
    rows = [[[0.0, 0.0]], [[2.0, 0.0]]]
    options = {"objective": "sampled", "importance": "clip"} | old(-1e4)
    found, gradient = call(*rows, function, **options)
    assert found.loss.item() == pytest.approx(1.2 * found.k1.item())
    assert not gradient.any()


@functions
@objectives
def test_a_ratio_beyond_floats_times_0(objective, function):
    """Of D or r = 0, and of a token weight of 0."""
    same, weights = [[0.0, 0.0], [0.0, 1.0]], torch.tensor([[0.0, 1.0]])
    options = objective | old(-1e4, -1.0, importance="truncate", bounds=ALL)
    found, _ = call(same, same, function, **options)
    assert found.loss.abs() <= 1e-7 * found.importance_weights.max()  # D's own rounding
    found, gradient = call(
        same, [[1.0, 0.0], [0.0, 0.5]], function, token_weights=weights, **options
    )
    assert found.loss.isfinite()
    assert not gradient[0].any()
    assert gradient[1].all()


def test_a_product_of_ratios_beyond_floats():
    """3000 tokens, each a little less likely to the engine."""
    logits = torch.linspace(-1, 1, 15000).sin().reshape(1, 3000, 5).mul(50).requires_grad_()
    ids = torch.zeros(1, 3000).long()
    options = {"importance": "truncate", "bounds": ALL, "importance_level": "prefix"}
    engine = logits.detach().log_softmax(-1)[..., 0] - 0.05
    found = on_policy.loss(
        logits, logits.detach().flip(-1), ids, ids == 0, objective="sampled",
        behaviour_log_probs=engine, **options,
    )  # fmt: skip
    found.loss.backward()
    assert found.loss.isfinite()
    assert logits.grad.isfinite().all()
    assert found.importance_weights.max().item() == pytest.approx(
        torch.finfo(torch.float32).max ** 0.5, rel=1e-4
    )
