"""The oracles of token log-probabilities and what goes with them (semantics.md, 12), in float64."""

import math

import pytest
import torch

from distill_ops import SymmetricKL, reference
from distill_ops.reference import (
    distillation_statistics,
    mixture_token_log_probs,
    token_log_probs,
)
from tests.support import formulas
from tests.support.cases import DIVERGENCES
from tests.support.helpers import make_logits
from tests.support.semantics_page import ROWS

INF = math.inf
by_name = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
DIFFERENTIABLE = ("divergence", "student_log_prob", "student_entropy")


def make_rows(seed=0, n_cols=9):
    student, teacher = make_logits((4, n_cols), seed=seed, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.tensor([3, 0, 8, 3])


def one_hot(token_id, n_cols=9):
    return torch.nn.functional.one_hot(token_id, n_cols).double()


def row_gradients(output, logits):
    """The gradient of each row's output with respect to its own row."""
    return torch.autograd.grad(output.sum(), logits, retain_graph=True)[0]


def test_worked_token_log_prob():
    logits = torch.tensor([ROWS["S"]], dtype=torch.float64, requires_grad=True)
    log_prob = token_log_probs(logits, torch.tensor([1]), temperature=2.0)
    assert log_prob.tolist() == pytest.approx([-0.982043570595], abs=1e-12)
    expected = [-.1135864849, .3127275464, -.0417861326, -.0884612434, -.0688936856]  # fmt: skip
    assert row_gradients(log_prob, logits)[0].tolist() == pytest.approx(expected, abs=6e-11)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_log_prob_and_entropy_by_hand(temperature):
    logits, _, ids = make_rows()
    results = token_log_probs(logits, ids, temperature=temperature, return_entropy=True)
    gradients = [row_gradients(x, logits) for x in results]
    for row, token_id in enumerate(ids):
        q = formulas.softmax(logits[row].detach(), temperature)
        entropy = -(q * q.log()).sum()
        expected = [(q[token_id].log(), (one_hot(token_id) - q) / temperature)]
        expected.append((entropy, -q * (q.log() + entropy) / temperature))
        for ours, gradient, (value, slope) in zip(results, gradients, expected, strict=True):
            assert ours[row].item() == pytest.approx(value.item(), rel=1e-13)
            torch.testing.assert_close(gradient[row], slope, rtol=1e-11, atol=1e-15)
    alone = token_log_probs(logits, ids, temperature=temperature)
    assert torch.equal(alone, results[0])


def test_columns_of_minus_infinity_are_as_if_absent():
    logits, _, ids = make_rows()
    padded = torch.cat([torch.full((4, 2), -INF).double(), logits.detach()], -1).requires_grad_()
    for ours, theirs in zip(
        token_log_probs(padded, ids + 2, return_entropy=True),
        token_log_probs(logits, ids, return_entropy=True),
        strict=True,
    ):
        assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-14)
        gradient = row_gradients(ours, padded)
        assert (gradient[:, :2] == 0).all()
        torch.testing.assert_close(gradient[:, 2:], row_gradients(theirs, logits))


def test_an_id_of_minus_infinity():
    logits = torch.tensor([[0.0, -INF, math.log(3)]], dtype=torch.float64, requires_grad=True)
    log_prob, entropy = token_log_probs(logits, torch.tensor([1]), return_entropy=True)
    assert log_prob.item() == -INF
    assert row_gradients(log_prob, logits)[0].tolist() == pytest.approx([-0.25, 1, -0.75])
    assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert row_gradients(entropy, logits).isfinite().all()


def test_one_token_left_has_no_entropy():
    logits = torch.tensor([[-INF, 4.0, -INF]], dtype=torch.float64, requires_grad=True)
    for x in token_log_probs(logits, torch.tensor([1]), return_entropy=True):
        assert x.item() == 0
        assert row_gradients(x, logits)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_a_row_without_a_softmax_is_nan_and_alone(bad):
    logits, teacher, ids = make_rows()
    broken = logits.detach().clone()
    broken[1, slice(None) if bad == "all -inf" else 4] = float(bad.split()[-1])
    broken.requires_grad_()
    for x in token_log_probs(broken, ids, return_entropy=True):
        assert x.isnan().tolist() == [False, True, False, False]
        gradient = row_gradients(x, broken)
        assert gradient[1].isnan().all()
        assert gradient[[0, 2, 3]].isfinite().all()
    whole = distillation_statistics(logits, teacher, ids)
    of_student = distillation_statistics(broken, teacher, ids)
    of_teacher = distillation_statistics(teacher, broken.detach(), ids)
    for statistics, side, other in [
        (of_student, "student", "teacher"), (of_teacher, "teacher", "student"),
    ]:  # fmt: skip
        values = statistics._asdict()
        assert values["divergence"].isnan().tolist() == [False, True, False, False]
        assert not values["top1_agreement"][1]
        for of in ("log_prob", "entropy"):
            assert values[f"{side}_{of}"].isnan().tolist() == [False, True, False, False]
            assert torch.equal(values[f"{other}_{of}"], getattr(whole, f"teacher_{of}"))
    for pair in [(broken, teacher), (teacher, broken.detach())]:
        mixture = mixture_token_log_probs(*pair, ids, 0.3)
        assert mixture.isnan().tolist() == [False, True, False, False]


def test_ignored_tokens_are_not_read():
    logits, teacher, ids = make_rows()
    whole = distillation_statistics(logits, teacher, ids, divergence=SymmetricKL(torch.ones(4) / 3))
    ids[2] = 7777
    broken, broken_teacher = logits.detach().clone(), teacher.clone()
    broken[2], broken_teacher[2] = math.nan, math.nan
    broken.requires_grad_()
    weight = torch.tensor([1 / 3, 1 / 3, math.nan, 1 / 3])
    statistics = distillation_statistics(
        broken, broken_teacher, ids, divergence=SymmetricKL(weight), ignore_index=7777
    )
    for name, ours, theirs in zip(statistics._fields, statistics, whole, strict=True):
        assert ours[2] == 0, name
        assert torch.equal(ours[[0, 1, 3]], theirs[[0, 1, 3]]), name
    functions = [
        lambda s: token_log_probs(s, ids, ignore_index=7777, return_entropy=True)[0],
        lambda s: token_log_probs(s, ids, ignore_index=7777, return_entropy=True)[1],
        lambda s: mixture_token_log_probs(s, broken_teacher, ids, weight, ignore_index=7777),
    ]
    outputs = [getattr(statistics, name) for name in DIFFERENTIABLE]
    for output in [*outputs, *(f(broken) for f in functions)]:
        assert output[2] == 0
        gradient = row_gradients(output, broken)
        assert (gradient[2] == 0).all()
        assert (gradient[[0, 1, 3]].abs().sum(-1) > 0).all()


# --- statistics ----------------------------------------------------------------------------------

# (student's, teacher's columns of -inf); ids are 3, 0, 8, 3
ZEROS = {
    "none": ((), ()),
    "student": ((1, 4), ()),
    "teacher": ((), (2, 5)),
    "both": ((1, 2), (2, 7)),
    "the teacher excludes ids": ((), (0, 3)),
}


@by_name
@pytest.mark.parametrize("place", ZEROS)
def test_combined_gradient_by_hand(divergence, place):
    """All three upstream gradients at once, the first term's q being the restricted student's."""
    logits, teacher, ids = make_rows()
    student = logits.detach().clone()
    student[:, list(ZEROS[place][0])], teacher[:, list(ZEROS[place][1])] = -INF, -INF
    student.requires_grad_()
    temperature, upstream = 1.3, torch.tensor([0.7, -1.9, 0.4], dtype=torch.float64)
    statistics = distillation_statistics(
        student, teacher, ids, divergence=divergence, temperature=temperature
    )
    outputs = torch.stack([getattr(statistics, name) for name in DIFFERENTIABLE])
    gradient = row_gradients(upstream @ outputs, student)
    for row, token_id in enumerate(ids):
        s, t = student[row].detach(), teacher[row]
        loss, of_divergence = formulas.dense(divergence, s, t, temperature)
        q, p = formulas.softmax(s, temperature), formulas.softmax(t, temperature)
        log_q, log_p = torch.where(q > 0, q, 1.0).log(), torch.where(p > 0, p, 1.0).log()
        entropies = -(q * log_q).sum(), -(p * log_p).sum()
        expected = (loss, q[token_id].log(), p[token_id].log(), *entropies)
        ours = [x[row].item() for x in statistics[:5]]
        assert ours == pytest.approx([x.item() for x in expected], rel=1e-11, abs=1e-14)
        assert statistics.top1_agreement[row] == (s.argmax() == t.argmax())
        by_hand = upstream[0] * of_divergence + (
            upstream[1] * (one_hot(token_id) - q) - upstream[2] * q * (log_q + entropies[0])
        ) / temperature  # fmt: skip
        torch.testing.assert_close(gradient[row], by_hand, rtol=1e-9, atol=1e-14)


@by_name
def test_gradcheck_of_statistics(divergence):
    student, teacher, ids = make_rows(seed=2)
    teacher[1, 4] = -INF

    def outputs(logits):
        statistics = distillation_statistics(
            logits, teacher, ids, divergence=divergence, temperature=0.8
        )
        return [getattr(statistics, name) for name in DIFFERENTIABLE]

    assert torch.autograd.gradcheck(outputs, student)


def test_statistics_defaults_and_agreement():
    logits, teacher, ids = make_rows()
    statistics = distillation_statistics(logits, teacher, ids)
    reverse = reference.distillation_loss(
        logits, teacher, divergence="reverse_kl", reduction="none"
    )
    assert torch.equal(statistics.divergence, reverse)
    assert [x.requires_grad for x in statistics] == [True, True, False, True, False, False]
    rows = torch.tensor([[2.0, 5, 5], [5, 2, 5], [0, 0, 0]])  # the first of equals is the top
    others = torch.tensor([[2.0, 5, 1], [2, 2, 5], [1, 0, 0]])
    agreement = distillation_statistics(rows, others, torch.tensor([0, 0, 0])).top1_agreement
    assert agreement.tolist() == [True, False, True]
    assert agreement.dtype == torch.bool


# --- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.2, torch.tensor(0.2), torch.tensor([0.2, 0.9, 0.5, 1e-3])])
def test_mixture_by_hand(weight):
    student, teacher, ids = make_rows()
    result = mixture_token_log_probs(student, teacher, ids, weight, temperature=1.4)
    gradient = row_gradients(result, student)
    for row, a in enumerate(torch.as_tensor(weight, dtype=torch.float64).expand(4)):
        token_id, s = ids[row], student[row].detach()
        q, p = formulas.softmax(s, 1.4), formulas.softmax(teacher[row], 1.4)
        mixture = (1 - a) * q[token_id] + a * p[token_id]
        share = (1 - a) * q[token_id] / mixture
        assert result[row].item() == pytest.approx(mixture.log().item(), rel=1e-12)
        expected = share * (one_hot(token_id) - q) / 1.4
        torch.testing.assert_close(gradient[row], expected, rtol=1e-11, atol=1e-15)


def test_mixture_of_one_model():
    student, teacher, ids = make_rows()
    of_student = mixture_token_log_probs(student, teacher, ids, 0)
    torch.testing.assert_close(of_student, token_log_probs(student, ids), rtol=1e-14, atol=0)
    expected = row_gradients(token_log_probs(student, ids), student)
    torch.testing.assert_close(row_gradients(of_student, student), expected)
    of_teacher = mixture_token_log_probs(student, teacher, ids, 1.0)
    torch.testing.assert_close(of_teacher, token_log_probs(teacher, ids), rtol=1e-14, atol=0)
    assert (row_gradients(of_teacher, student) == 0).all()


def test_mixture_of_zeros():
    """Ids that one model excludes, or both; and one whose probabilities underflow (e^-900)."""
    student = torch.tensor([[-INF, 0, 0], [1, 0, -INF], [-INF, 0, 0], [-900, 0, -INF]]).double()
    teacher = torch.tensor([[1, -INF, 1], [-INF, 0, 1], [-INF, 0, 0], [-INF, 0, -INF]]).double()
    ids, student = torch.tensor([0, 0, 0, 0]), student.requires_grad_()
    result = mixture_token_log_probs(student, teacher, ids, 0.25)
    q = 1 / (1 + math.exp(-1))
    expected = [math.log(0.25 / 2), math.log(0.75 * q), -INF, math.log(0.75) - 900]
    assert result.tolist() == pytest.approx(expected, rel=1e-14)
    gradient = row_gradients(result, student)
    # the student's share: 0, all, none of an impossible id, all
    assert gradient.tolist() == [
        [0, 0, 0], pytest.approx([1 - q, q - 1, 0]), [0, 0, 0], pytest.approx([1, -1, 0]),
    ]  # fmt: skip


def test_gradcheck_of_log_probs_and_mixtures():
    student, teacher, ids = make_rows(seed=2)
    weight = torch.tensor([0.1, 0.5, 0.0, 0.9], dtype=torch.float64)
    function = lambda s: (
        *token_log_probs(s, ids, temperature=1.6, return_entropy=True),
        mixture_token_log_probs(s, teacher, ids, weight, temperature=0.6),
    )
    assert torch.autograd.gradcheck(function, student)


# --- dtypes and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    student, teacher, ids = make_rows()
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    wide = student.detach().double(), teacher.double()
    ours = distillation_statistics(student, teacher, ids)
    truth = distillation_statistics(*wide, ids)
    for name, x, y in zip(ours._fields[:5], ours, truth, strict=False):
        assert x.dtype == torch.float32, name
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=1e-6)
    mixture = mixture_token_log_probs(student, teacher, ids, 0.5)
    assert mixture.dtype == torch.float32
    for output in (*(getattr(ours, name) for name in DIFFERENTIABLE), mixture):
        assert row_gradients(output, student).dtype == dtype


LOGITS, IDS = torch.zeros(2, 5), torch.tensor([1, 4])
BAD = [
    (token_log_probs, {"logits": LOGITS.int()}, TypeError, "logits must be float32"),
    (token_log_probs, {"token_ids": IDS + 1}, ValueError, r"token_ids must lie in \[0, 5\).* got 5"),
    (token_log_probs, {"token_ids": IDS[:1]}, ValueError, "token_ids must have the leading shape of logits"),
    (token_log_probs, {"token_ids": IDS.short()}, TypeError, "token_ids must be int64"),
    (token_log_probs, {"temperature": 0.0}, ValueError, "temperature must be positive"),
    (token_log_probs, {"ignore_index": None}, TypeError, "ignore_index must be an int"),
    (distillation_statistics, {"token_ids": -IDS}, ValueError, r"token_ids must lie in \[0, 5\).* got -1"),
    (distillation_statistics, {"teacher_logits": LOGITS[:, :4]}, ValueError, "5 columns .* 4"),
    (distillation_statistics, {"teacher_logits": LOGITS.clone().requires_grad_()}, ValueError, "detach"),
    (distillation_statistics, {"divergence": "kl"}, ValueError, "divergence must be one of"),
    (distillation_statistics, {"divergence": SymmetricKL(torch.tensor([0.5, 2]))}, ValueError, "weight of symmetric_kl"),
    (mixture_token_log_probs, {"teacher_weight": 1.1}, ValueError, r"teacher_weight must lie in \[0, 1\], got 1.1"),
    (mixture_token_log_probs, {"teacher_weight": torch.tensor([0.1, -0.5])}, ValueError, "got -0.5"),
    (mixture_token_log_probs, {"teacher_weight": torch.zeros(3)}, ValueError, "teacher_weight must have the leading shape"),
    (mixture_token_log_probs, {"teacher_weight": torch.zeros(2, dtype=torch.int64)}, TypeError, "floating-point"),
    (mixture_token_log_probs, {"teacher_weight": torch.zeros((), requires_grad=True)}, ValueError, "detach"),
    (mixture_token_log_probs, {"teacher_weight": "half"}, TypeError, "teacher_weight must be a number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "change", "error", "message"), BAD, ids=lambda x: getattr(x, "__name__", "")
)
def test_bad_input(function, change, error, message):
    if function is token_log_probs:
        arguments = {"logits": LOGITS}
    else:
        arguments = {"student_logits": LOGITS, "teacher_logits": LOGITS}
    if function is mixture_token_log_probs:
        arguments["teacher_weight"] = 0.5
    arguments["token_ids"] = IDS
    function(**arguments)
    with pytest.raises(error, match=message):
        function(**arguments | change)
