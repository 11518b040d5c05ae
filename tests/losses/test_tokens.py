"""Token log-probabilities, entropies, statistics and mixtures against the oracle, on every path."""

import math

import pytest
import torch

import distill_ops
from distill_ops import SymmetricKL, reference
from distill_ops.divergences.built_in import BUILT_IN
from tests.support.declared import renyi_like
from tests.support.helpers import assert_close, make_ids, make_logits, to_float64

INF = float("inf")
DIVERGENCES = [*(kind() for kind in BUILT_IN.values()), renyi_like()]
DIFFERENTIABLE = ("divergence", "student_log_prob", "student_entropy")


def gradients(function, student, arguments, options):
    """Results of a function of the student's logits, and the gradient of their weighted sum."""
    leaf = student.detach().clone(memory_format=torch.preserve_format)
    if leaf.stride() != student.stride():
        leaf = torch.empty_strided(student.size(), student.stride(), dtype=student.dtype)
        leaf = leaf.to(student.device).copy_(student)
    leaf.requires_grad_()
    outputs = function(leaf, *arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator, total = torch.Generator().manual_seed(9), 0.0
    for x in outputs:
        if x.requires_grad:
            factor = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            total = total + (x.masked_fill(~x.detach().isfinite(), 0.0) * factor.to(x)).sum()
    total.backward()
    return [x.detach() for x in outputs], leaf.grad


def hold(name, student, *arguments, backend, scales=None, **options):
    """Hold one function against its oracle: every result, and the gradient of all together.

    ``scales``: of a result's terms, where they cancel in it."""
    ours, gradient = gradients(
        getattr(distill_ops, name), student, arguments, {**options, "backend": backend}
    )
    eager, eager_gradient = gradients(getattr(reference, name), student, arguments, options)
    wide = [to_float64(x) for x in arguments]
    if isinstance(options.get("divergence"), distill_ops.Divergence):
        options = options | {"divergence": options["divergence"].map_tensors(to_float64)}
    truth, true_gradient = gradients(getattr(reference, name), to_float64(student), wide, options)
    for i, (mine, theirs, expected) in enumerate(zip(ours, eager, truth, strict=True)):
        if expected.dtype == torch.bool:
            assert torch.equal(mine, expected)
            continue
        assert mine.dtype == torch.promote_types(student.dtype, torch.float32)
        assert_close(f"{name} {i}", mine, theirs, expected, 8.0 if scales else 1.0)
    assert gradient.dtype == student.dtype
    assert_close(f"gradient of {name}", gradient, eager_gradient, true_gradient)
    return ours, gradient


# --- log-probabilities and entropies -------------------------------------------------------------


@pytest.mark.covering("shape dtype", "return_entropy dtype")
@pytest.mark.parametrize(
    "shape", [(5,), (3, 33), (2, 3, 130), (4, 4096), (2, 4099), (0, 7)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("return_entropy", [True, False], ids=["entropy", "alone"])
def test_log_probs(shape, dtype, return_entropy, backend, device):
    logits, _ = make_logits(shape, dtype=dtype, device=device)
    ids = make_ids(shape[:-1], shape[-1], device=device)
    options = {"return_entropy": return_entropy, "backend": backend}
    results, _ = hold("token_log_probs", logits, ids, **options)
    assert len(results) == 1 + return_entropy
    assert all(x.shape == shape[:-1] for x in results)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("offset", [0.0, -3e4])
def test_log_probs_of_views_at_a_temperature(temperature, offset, backend, device):
    logits, _ = make_logits((3, 6, 300), offset=offset, device=device)
    options = {"temperature": temperature, "return_entropy": True, "backend": backend}
    for view in (logits[:, :-1], logits[..., 3:], logits[:, 1:, 5:299], logits.transpose(0, 1)):
        hold("token_log_probs", view, make_ids(view.shape[:-1], 290, device=device), **options)


def test_one_entropy_alone_gives_its_gradient(backend, device):
    """Autograd hands over no gradient for a result that is not used."""
    logits, _ = make_logits((3, 40), device=device)
    ids, grads = make_ids((3,), 40, device=device), []
    for function, options in (
        (distill_ops.token_log_probs, {"backend": backend}), (reference.token_log_probs, {}),
    ):  # fmt: skip
        leaf = logits.clone().requires_grad_()
        function(leaf, ids, return_entropy=True, **options)[1].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def odd_rows(dtype=torch.float32):
    """Rows with -inf, the lowest float, certainty, NaN, +inf and nothing; and their ids."""
    logits, teacher = make_logits((9, 600), dtype=dtype)
    lowest = torch.finfo(dtype).min
    ids = make_ids((9,), 600, ignored=False)
    logits[0, :300], ids[0] = -INF, 2  # an impossible token, and first tiles all -inf
    logits[1, 10:], ids[1] = lowest, 3
    ids[2] = 599
    logits[2, :599] = lowest
    logits[3], logits[3, 5], ids[3] = -INF, 3.0, 5  # certain
    logits[4, 7] = 3e4 if dtype == torch.float16 else 1e5
    logits[5, 9] = math.nan
    logits[6, 11] = INF
    logits[7] = -INF
    return logits, teacher, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_odd_rows(dtype, temperature, backend, device):
    logits, _, ids = odd_rows(dtype)
    options = {"temperature": temperature, "return_entropy": True, "backend": backend}
    (log_probs, entropies), gradient = hold(
        "token_log_probs", logits.to(device), ids.to(device), **options
    )
    assert log_probs[0] == -INF
    assert entropies[3] == 0
    assert gradient[8].isfinite().all()


def test_an_ignored_row_is_not_read(backend, device):
    logits, teacher = make_logits((4, 70), device=device)
    ids = make_ids((4,), 70, device=device, ignored=False)
    ids[2] = -1
    logits[2], teacher[2] = math.nan, math.nan
    options = {"ignore_index": -1, "backend": backend}
    for name, arguments in (
        ("token_log_probs", (ids,)), ("distillation_statistics", (teacher, ids)),
        ("mixture_token_log_probs", (teacher, ids, 0.4)),
    ):  # fmt: skip
        results, gradient = hold(name, logits, *arguments, **options)
        assert all(x[2] == 0 for x in results)
        assert (gradient[2] == 0).all()


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.covering("divergence", "dtype")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics(divergence, dtype, backend, device):
    student, teacher = make_logits((4, 1500), dtype=dtype, device=device)
    ids = make_ids((4,), 1500, device=device)
    options = {"divergence": divergence, "temperature": 1.3, "backend": backend}
    hold("distillation_statistics", student, teacher, ids, scales=True, **options)


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
def test_statistics_with_zeros(divergence, backend, device):
    """Either model excludes columns, of ids too; the student's other terms stay unrestricted."""
    student, teacher = make_logits((6, 150), device=device)
    ids = torch.tensor([3, 0, 8, 3, 140, 5], device=device)
    student[1, 20:90], teacher[2, 100:] = -INF, -INF
    student[3, :70], teacher[3, :3] = -INF, -INF
    teacher[4, 140] = -INF
    options = {"divergence": divergence, "backend": backend}
    hold("distillation_statistics", student, teacher, ids, scales=True, **options)


@pytest.mark.covering("divergence dtype")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loss_of_coefficients(divergence, dtype, backend, device):
    """The statistics and the gradient are the same bits as of the statistics weighed afterwards, though
    it is made in the forward; an ignored token's coefficients are not looked at."""
    whole, teacher = (x[:, :-1] for x in make_logits((3, 3, 130), dtype=dtype, device=device))
    ids = make_ids((3, 2), 130, device=device)
    draw = torch.Generator().manual_seed(2)
    advantages, mask = (torch.randn(3, 2, generator=draw).to(device) for _ in range(2))
    mask = mask > 0
    given = mask, advantages.masked_fill(ids == -100, math.nan), torch.tensor(-0.1, device=device)
    options = {"divergence": divergence, "temperature": 0.8, "backend": backend}
    leaf, other = (whole.detach().clone().requires_grad_() for _ in range(2))
    call = distill_ops.distillation_statistics
    loss, found = call(leaf, teacher, ids, coefficients=given, **options)
    loss.backward()
    expected = call(other, teacher, ids, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not any(x.requires_grad for x in found)
    terms = expected.divergence, expected.student_log_prob, expected.student_entropy
    factors = mask.float(), advantages, given[2]
    total = sum((x * y).sum() for x, y in zip(factors, terms, strict=True))
    torch.testing.assert_close(loss, total)
    total.backward()
    assert torch.equal(leaf.grad, other.grad)
    assert leaf.grad.abs().sum() > 0


def test_a_row_that_no_coefficient_asks_for_takes_no_gradient(backend, device):
    """Its statistics are made all the same: here they are NaN."""
    student, teacher = make_logits((3, 40), device=device)
    student[1], ids = math.nan, make_ids((3,), 40, device=device, ignored=False)
    student.requires_grad_()
    asked = torch.tensor([1.0, 0.0, 2.0], device=device)
    loss, found = distill_ops.distillation_statistics(
        student, teacher, ids, coefficients=(asked, -asked, None), backend=backend
    )
    loss.backward()
    assert loss.isfinite()
    assert found.divergence.isnan().tolist() == [False, True, False]
    assert student.grad.isfinite().all()
    assert student.grad.any(-1).tolist() == [True, False, True]


def test_statistics_of_odd_rows(backend, device):
    student, teacher, ids = odd_rows()
    arguments = (teacher.to(device), ids.to(device))
    options = {"divergence": "jensen_shannon", "backend": backend}
    hold("distillation_statistics", student.to(device), *arguments, scales=True, **options)


def test_statistics_of_views_and_parameters(backend, device):
    student, teacher = make_logits((2, 5, 333), device=device)
    ids = make_ids((2, 4), 333, device=device)
    weight = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"divergence": SymmetricKL(weight), "backend": backend}
    views = student[:, :-1], teacher[:, 1:]
    hold("distillation_statistics", *views, ids, scales=True, **options)


def test_each_result_alone_gives_its_gradient(backend, device):
    """The gradient of one result; of the divergence of models without a common token it is NaN, which
    leaves the others alone."""
    student, teacher = make_logits((3, 64), device=device)
    student[1, :32], teacher[1, 32:] = -INF, -INF
    ids = torch.tensor([1, 40, 7], device=device)
    for name in DIFFERENTIABLE:
        grads = []
        for module, options in ((distill_ops, {"backend": backend}), (reference, {})):
            leaf = student.clone().requires_grad_()
            found = module.distillation_statistics(leaf, teacher, ids, **options)
            getattr(found, name).sum().backward()
            grads.append(leaf.grad)
        assert grads[0][1].isnan().all() == (name == "divergence")
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_top1_agreement_takes_the_first_of_equals(backend, device):
    """Equal maxima far apart, in other tiles and lanes, and in the partial last tile."""
    student = torch.zeros(5, 4099)
    teacher = torch.zeros(5, 4099)
    for row, (ours, theirs) in enumerate(
        [
            ((9, 4098), (9,)),
            ((4098, 2050), (4098,)),
            ((2050, 4098), (2050, 9)),
            ((), ()),
            ((), (1,)),
        ]
    ):
        student[row, list(ours)] = 5.0
        teacher[row, list(theirs)] = 5.0
    ids = torch.zeros(5, dtype=torch.int64)
    arguments = (x.to(device) for x in (student, teacher, ids))
    found = distill_ops.distillation_statistics(*arguments, backend=backend)
    assert found.top1_agreement.tolist() == [True, False, False, True, False]


def test_only_the_students_results_require_grad(backend, device):
    student, teacher = make_logits((2, 9), device=device)
    ids = torch.tensor([1, 2], device=device)
    found = distill_ops.distillation_statistics(
        student.requires_grad_(), teacher, ids, backend=backend
    )
    assert [x.requires_grad for x in found] == [True, True, False, True, False, False]


# --- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0, "0-d", "per token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixture(weight, dtype, backend, device):
    student, teacher = make_logits((2, 3, 130), dtype=dtype, device=device)
    ids = make_ids((2, 3), 130, device=device)
    teacher[0, 0, ids[0, 0]] = -INF
    if isinstance(weight, str):
        shape = () if weight == "0-d" else (2, 3)
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"temperature": 1.4, "backend": backend}
    hold("mixture_token_log_probs", student, teacher, ids, weight, **options)


def test_same_bits_alone_and_among_others(backend, device):
    student, teacher = make_logits((6, 512), device=device)
    ids = make_ids((6,), 512, device=device, ignored=False)

    def run(rows):
        leaf = student[rows].clone().requires_grad_()
        found = distill_ops.distillation_statistics(leaf, teacher[rows], ids[rows], backend=backend)
        sum(getattr(found, name).sum() for name in DIFFERENTIABLE).backward()
        return [x.detach() for x in found], leaf.grad

    together, gradient = run(slice(None))
    alone, its_gradient = run(slice(4, 5))
    assert all(torch.equal(x[4:5], y) for x, y in zip(together, alone, strict=True))
    assert torch.equal(gradient[4:5], its_gradient)


def test_float64(device, backend):
    if backend == "triton":
        with pytest.raises(ValueError, match="float64"):
            distill_ops.token_log_probs(
                torch.zeros(1, 3).double(), torch.tensor([0]), backend=backend
            )
        return
    student, teacher = make_logits((3, 40), dtype=torch.float64)
    ids = make_ids((3,), 40)
    ours = distill_ops.distillation_statistics(student, teacher, ids)
    theirs = reference.distillation_statistics(student, teacher, ids)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


LOGITS, IDS = torch.zeros(2, 5), torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        ("token_log_probs", (LOGITS, IDS + 1), {}, ValueError, r"token_ids must lie in \[0, 5\)"),
        ("token_log_probs", (LOGITS, IDS), {"backend": "cuda"}, ValueError, "backend must be one of"),
        ("token_log_probs", (LOGITS, IDS), {"temperature": -1}, ValueError, "temperature must be"),
        ("distillation_statistics", (LOGITS, LOGITS[:, :4], IDS), {}, ValueError, "5 columns .* 4"),
        ("mixture_token_log_probs", (LOGITS, LOGITS, IDS, 2.0), {}, ValueError, "teacher_weight must"),
    ],
)  # fmt: skip
def test_bad_input(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        getattr(distill_ops, function)(*arguments, **options)
