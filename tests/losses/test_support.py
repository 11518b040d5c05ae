"""The loss on the student's or the teacher's K most likely tokens, against its float64 oracle."""

import math

import pytest
import torch

import distill_ops
from tests.support.cases import FLOAT_MASK, LABELS, OPTIONS, TOKENS, VIEWS
from tests.support.helpers import (
    assert_close,
    assert_close_to_reference,
    condition,
    make_logits,
    moved,
    run,
    run_reference,
)
from tests.support.linear_cases import CAPPED, make_pair

pytest.importorskip("triton")

from distill_ops import (
    JensenShannon,
    gather_log_probs,
    linear_support_distillation_loss,
    linear_topk_distillation_loss,
    reference,
    student_topk,
    support_distillation_loss,
    topk_distillation_loss,
)
from distill_ops.analysis import aot
from distill_ops.api import choices
from distill_ops.checks.slots import TAILS
from distill_ops.operators import transforms
from distill_ops.reference.linear import head_logits
from tests.interface.test_no_sync import ComputingOperations
from tests.support import declared
from tests.support.cases import DIVERGENCES

INF, NAN = math.inf, math.nan
EVERY = [*DIVERGENCES, declared.renyi_like(), declared.chi_squared()]
SUPPORTS = ("student", "teacher")


def make_pairs(shape, *, dtype=torch.float32, device="cpu", seed=0):
    """Logits of which no two in a row are equal, so that the K are the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    n_cols, pairs = shape[-1], []
    for width in (6.0, 5.0):  # so that no probability is the other's, either
        order = torch.rand(shape, generator=generator).argsort(-1)
        pairs.append(((order - n_cols // 2) * (width / n_cols)).to(dtype))
        distinct = pairs[-1].double().sort(-1).values.diff(dim=-1)
        assert (distinct > 0).all()
    return [x.to(device) for x in pairs]


def check_support(student, teacher, *, oracle=reference.support_distillation_loss, **options):
    """Hold the loss against its oracle; returns its result."""
    ours = run(support_distillation_loss, student, teacher, **options)
    options.pop("backend", None)
    assert ours.gradient.dtype == student.dtype
    eager, truth = (
        run_reference(student, teacher, double=double, oracle=oracle, **options)
        for double in (False, True)
    )
    known = {k: x for k, x in options.items() if k not in ("k", "support", "tail")}
    assert_close_to_reference(ours, eager, truth, condition(student, teacher, known))
    return ours


@pytest.mark.covering("divergence", "tail", "support", "dtype")
@pytest.mark.parametrize("divergence", EVERY, ids=lambda d: str(d)[:40])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(divergence, tail, support, dtype, backend, device):
    pair = make_pairs((2, 21), dtype=dtype, device=device)
    options = {"k": 5, "support": support, "tail": tail}
    check_support(*pair, divergence=divergence, backend=backend, **options)


# the others are the top-k loss's own affair
SHARED = {
    name: OPTIONS[name]
    for name in (
        "low_temperature", "none", "float_mask", "hard_temperature", "two_weights", "hard_only",
        "vocab_size_hard", "hard_backward", "ignore_index",
    )
}  # fmt: skip


@pytest.mark.covering("option", "support", "tail")
@pytest.mark.parametrize("option", SHARED)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", TAILS)
def test_options(option, support, tail, backend, device):
    """Rows that do not count are not read, nor columns beyond the vocabulary."""
    options = moved(SHARED[option], device)
    student, teacher = make_pairs((*TOKENS, 33), device=device)
    n_cols = options.setdefault("vocab_size", 29)
    student[..., n_cols:], teacher[..., n_cols:] = 50.0, NAN
    if options.get("ignore_index"):
        options["labels"] = options["labels"].clamp(min=0)
    unread = torch.zeros(TOKENS, dtype=torch.bool, device=device)
    if "labels" in options:
        unread |= options["labels"] == options.get("ignore_index", -100)
    if "loss_mask" in options:
        unread |= options["loss_mask"] == 0
    student[unread], teacher[unread] = NAN, NAN
    teacher = None if options.get("hard_label_weight") == 1 else teacher
    ours = check_support(
        student, teacher, k=4, support=support, tail=tail, backend=backend, **options
    )
    assert (ours.gradient[..., n_cols:] == 0).all()
    assert (ours.gradient[unread] == 0).all()


MORE_OF_TAILS = [
    ("forward_kl", {"tail": "drop", "mass_terms": True}),
    ("reverse_kl", {"tail": "restrict", "log_prob_floor": -2.0}),
]


@pytest.mark.parametrize(("divergence", "options"), MORE_OF_TAILS, ids=str)
def test_more_options_of_tails(divergence, options, backend, device):
    """They reach the loss, in both forms."""
    options = {"k": 4, "divergence": divergence, "backend": backend, **options}
    check_support(*make_pairs((2, 21), device=device), **options)
    check_linear(make_pair((2,), 21, device=device), **options)


@pytest.mark.covering("k", "tail", "divergence")
@pytest.mark.parametrize("k", [1, 21])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_one_token_and_all(k, tail, divergence, backend, device):
    """All of them are the dense loss."""
    pair = make_pairs((3, 21), device=device)
    options = {"divergence": divergence, "backend": backend}
    ours = check_support(*pair, k=k, tail=tail, **options)
    if k == 21:
        dense = run(distill_ops.distillation_loss, *pair, **options)
        torch.testing.assert_close(ours.loss, dense.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.gradient, dense.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.covering("divergence support", "tail")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl"])
def test_odd_rows(tail, support, divergence, backend, device):
    """Fewer finite logits than K, a teacher who excludes some of the K or all, and rows without a
    softmax, which leave the others alone."""
    student, teacher = make_pairs((7, 21), device=device)
    student[0, 2:], teacher[0, 1] = -INF, 5.0
    teacher[1, student[1].argmax()] = -INF
    teacher[2, student[2].topk(5).indices[1:]] = -INF
    teacher[3, 3:] = -INF
    student[4], teacher[5, 3] = -INF, INF
    options = {"k": 5, "support": support, "tail": tail, "divergence": divergence}
    ours = check_support(student, teacher, reduction="none", backend=backend, **options)
    assert ours.loss[[0, 1, 2, 3, 6]].isfinite().all()
    assert ours.loss[[4, 5]].isnan().all()


@pytest.mark.parametrize("view", ["shifted", "strided_columns"])
def test_views(view, backend, device):
    pair = [VIEWS[view](x) for x in make_pairs((2, 3, 21), device=device)]
    check_support(*pair, k=5, divergence="reverse_kl", backend=backend)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5)], ids=str)
def test_leading_shapes(shape, backend, device):
    pair = make_pairs(shape, device=device) if 0 not in shape else torch.zeros(2, *shape)
    for reduction in ("mean", "none"):
        check_support(*pair, k=2, reduction=reduction, backend=backend)


def test_parameters_as_tensors(backend, device):
    beta = (torch.arange(6.0).view(TOKENS) / 8 + 0.1).to(device)
    pair = make_pairs((*TOKENS, 21), device=device)
    check_support(*pair, k=4, divergence=JensenShannon(beta), backend=backend)


@pytest.mark.parametrize("support", SUPPORTS)
def test_it_is_the_three_steps(support, backend, device):
    """To the bit, in both gradient modes."""
    student, teacher = make_pairs((3, 40), dtype=torch.bfloat16, device=device)
    shared = {"temperature": 1.5, "divergence": "reverse_kl", "backend": backend}
    shared |= {"loss_mask": FLOAT_MASK[0].to(device), "upstream_seed": None}
    ids = student_topk(student if support == "student" else teacher, 6)
    log_probs = gather_log_probs(teacher, ids, temperature=1.5, backend=backend)
    steps = run(topk_distillation_loss, student, log_probs, teacher_ids=ids, **shared)
    for gradient in ("forward", "backward"):
        options = {"k": 6, "support": support, "gradient": gradient}
        ours = run(support_distillation_loss, student, teacher, **options, **shared)
        assert torch.equal(ours.loss, steps.loss)
        assert torch.equal(ours.gradient, steps.gradient)


@pytest.mark.parametrize("support", SUPPORTS)
def test_token_outputs(support, backend, device):
    """Of the whole student and of the teacher's K, in both forms: what teacher_mass adds up is there."""
    student, teacher = make_pairs((3, 21), device=device)
    options = {"k": 4, "support": support, "divergence": "reverse_kl", "temperature": 1.5}
    options |= {"labels": LABELS[0].to(device), "reduction": "none"}
    names = ("log_prob", "student_entropy", "student_argmax", "teacher_mass")
    names += ("teacher_argmax",) * (support == "teacher")
    _, ours = support_distillation_loss(
        student, teacher, token_outputs=names, backend=backend, **options
    )
    _, truth = reference.support_distillation_loss(
        student.double(), teacher.double(), token_outputs=names, **options
    )
    for name in names:
        mine, expected = getattr(ours, name), getattr(truth, name)
        torch.testing.assert_close(mine.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)
    ids = student_topk(student if support == "student" else teacher, 4)
    mass = gather_log_probs(teacher, ids, temperature=1.5).exp().sum(-1)
    mass[options["labels"] == -100] = 0.0
    torch.testing.assert_close(ours.teacher_mass, mass)
    pair = make_pair((3,), 21, device=device)
    _, of_heads = linear_support_distillation_loss(
        *pair[:4], token_outputs=names, backend=backend, **options
    )
    logits = (
        pair.student_hidden @ pair.student_weight.t(),
        pair.teacher_hidden @ pair.teacher_weight.t(),
    )
    _, expected = reference.support_distillation_loss(*logits, token_outputs=names, **options)
    for name in names:
        torch.testing.assert_close(
            getattr(of_heads, name), getattr(expected, name), rtol=1e-4, atol=1e-5
        )


def test_the_error_of_another_support_would_show():
    pair = make_pairs((3, 21))
    options = {"k": 5, "divergence": "reverse_kl"}
    found = [reference.support_distillation_loss(*pair, support=s, **options) for s in SUPPORTS]
    with pytest.raises(AssertionError):
        assert_close("loss", found[0], found[1], found[1].double())


def test_compiled():
    student, teacher = make_pairs((4, 21))
    torch.compiler.reset()
    step = lambda s, t: support_distillation_loss(s * 2.0, t, k=3, divergence="reverse_kl")
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    eager, graph = (run(f, student, teacher) for f in (step, compiled))
    assert torch.equal(graph.loss, eager.loss)
    torch.testing.assert_close(graph.gradient, eager.gradient, rtol=1e-6, atol=1e-8)


# --- from hidden states --------------------------------------------------------------------------


def check_linear(pair, *, backend, blocks=None, **options):
    """Hold the loss of heads, and the gradients of all their tensors, against the oracle on their
    logits."""
    counts = options.get("loss_mask", torch.ones(pair.student_hidden.shape[:-1])) != 0
    if "labels" in options:
        counts = counts & (options["labels"] != -100)
    options = moved(options, pair.student_hidden.device)
    heads = {x: options.pop(x) for x in CAPPED if x in options}

    def ours(*leaves):
        biases = dict(zip(("student_bias", "teacher_bias"), leaves[4:], strict=True))
        given = {**biases, **heads, **options, **(blocks or {})}
        return linear_support_distillation_loss(*leaves[:4], backend=backend, **given)

    def theirs(*leaves):
        dtype = torch.promote_types(leaves[0].dtype, torch.float32)
        n_cols = options.get("vocab_size", len(leaves[1]))
        logits = []
        for side, i in (("student", 0), ("teacher", 1)):
            numbers = heads.get(f"{side}_logit_scale", 1.0), heads.get(f"{side}_softcap")
            tensors = *leaves[2 * i : 2 * i + 2], leaves[4 + i]
            logits.append(head_logits(*tensors, *numbers, ~counts, n_cols, dtype))
        rest = {
            k: x for k, x in options.items() if k not in ("gradient", "logits_dtype", "vocab_size")
        }
        return reference.support_distillation_loss(logits[0], logits[1].detach(), **rest)

    found = []
    for function, double in ((ours, False), (theirs, False), (theirs, True)):
        leaves = pair.map(lambda x, double=double: x.double() if double else x).trained(
            pair.student
        )
        loss = function(*leaves)
        factor = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
        (loss * factor.to(loss.device)).sum().backward()
        found.append([loss.detach(), *(getattr(leaves, name).grad for name in pair.student)])
    for i, (mine, eager, truth) in enumerate(zip(*found, strict=True)):
        if pair.student_hidden.dtype == torch.float32:
            error, of_eager = ((x - truth).abs().max() for x in (mine, eager))
            assert error <= 2 * of_eager + 4e-6 * truth.abs().max(), f"result {i}: {error}"
        else:
            assert_close(f"result {i}", mine, eager, truth)
    return found[0]


@pytest.mark.covering("divergence", "tail", "gradient support")
@pytest.mark.parametrize("divergence", EVERY, ids=lambda d: str(d)[:40])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_heads(divergence, tail, support, gradient, backend, device):
    pair = make_pair((3,), 21, bias=True, device=device)
    options = {"k": 5, "support": support, "tail": tail, "gradient": gradient}
    check_linear(pair, divergence=divergence, backend=backend, **options)


@pytest.mark.parametrize(
    ("support", "dtype", "reduction"),
    [("student", torch.float32, "mean"), ("teacher", torch.bfloat16, "none")],
    ids=str,
)
def test_blocks_of_heads(support, dtype, reduction, backend, device):
    """Two tokens at a time, with hidden states of NaN where nothing counts between them."""
    pair = make_pair(dtype=dtype, device=device)
    counts = (FLOAT_MASK != 0) & (LABELS != -100)
    pair.student_hidden[~counts], pair.teacher_hidden[~counts] = NAN, NAN
    check_linear(
        pair, k=4, support=support, divergence="reverse_kl", loss_mask=FLOAT_MASK, labels=LABELS,
        hard_label_weight=0.3, temperature=1.7, reduction=reduction, vocab_size=29, backend=backend,
        blocks={"memory_budget": 1200, "kept_tokens": 4}, **CAPPED,
    )  # fmt: skip


def test_heads_without_a_teacher(backend, device):
    pair = make_pair(device=device)
    labels = LABELS.to(device)
    hard = {"labels": labels, "hard_label_weight": 1.0, "backend": backend}
    ours, expected = (
        function(*pair[:2], None, None, **more, **hard)
        for function, more in (
            (linear_support_distillation_loss, {"k": 3}), (linear_topk_distillation_loss, {}),
        )
    )  # fmt: skip
    assert torch.equal(ours, expected)


# --- what it launches, multiplies and holds ------------------------------------------------------

FACTS = aot.TARGETS["sm_90"].facts


@pytest.fixture
def without_values(monkeypatch):
    """The Triton path without a GPU: operators' bodies on tensors of the meta device."""
    monkeypatch.setattr(choices, "INTERPRETED", True)
    monkeypatch.setattr(transforms, "dispatches", lambda *_: False)


def launched(call):
    """The kernels that a call launches, and PyTorch's own operations."""
    with ComputingOperations() as computing:
        launches = aot.record(call, FACTS)
    return [launch.kernel.__name__ for launch in launches], computing.names


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", ["none", "forward", "backward"])
def test_launches(gradient, masked, without_values):
    """One for the teacher's log-probabilities beside those of the top-k loss; one selection."""
    student, teacher = (torch.empty(4, 33, dtype=torch.bfloat16, device="meta") for _ in range(2))
    options = {"loss_mask": torch.empty(4, device="meta")} if masked else {}
    student.requires_grad_(gradient != "none")
    if gradient != "none":
        options["gradient"] = gradient

    def call():
        loss = support_distillation_loss(student, teacher, k=4, backend="triton", **options)
        if gradient != "none":
            (loss * 0.5).sum().backward()

    names, computing = launched(call)
    weights, after = ["weights_kernel"] * masked, {"forward": ["scale_kernel"], "none": []}
    expected = [*weights, "gather_kernel", *weights, "topk_kernel", "total_kernel"]
    assert names == expected + after.get(gradient, ["topk_kernel"])
    assert sum(name.startswith("aten::topk") for name in computing) == 1
    assert not any(name.startswith(("aten::nonzero", "aten::_local")) for name in computing)


def test_launches_of_a_gather(without_values):
    """One, whatever the mask's dtype, and no operation of PyTorch's."""
    logits = torch.empty(4, 33, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(4, 3, dtype=torch.int64, device="meta")
    for mask in (None, *(torch.empty(4, dtype=x, device="meta") for x in (torch.bool, torch.half))):
        call = lambda mask=mask: gather_log_probs(logits, ids, loss_mask=mask, backend="triton")
        assert launched(call) == (["gather_kernel"], [])


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("gradient", ["none", "forward", "backward"])
def test_products_of_heads(gradient, support, without_values):
    """The student's logits are formed once for choice and loss: four products, two without a gradient;
    a backward that forms them again chooses again."""
    pair = make_pair(dtype=torch.bfloat16).map(lambda x: x.to("meta"))
    leaves = pair.trained(pair.student if gradient != "none" else ())
    options = {} if gradient == "none" else {"gradient": gradient}

    def call():
        loss = linear_support_distillation_loss(
            *leaves[:4], k=4, support=support, backend="triton", **options
        )
        if gradient != "none":
            (loss * 0.5).sum().backward()

    names, computing = launched(call)
    products = [x for x in computing if x.startswith(("aten::mm", "aten::addmm"))]
    passes = 2 if gradient == "backward" else 1
    assert len(products) == {"none": 2, "forward": 4, "backward": 6}[gradient]
    assert names.count("gather_kernel") == names.count("topk_kernel") == passes
    assert sum(x.startswith("aten::topk") for x in computing) == passes


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most entries of a tensor that any operation makes, but for those of sizes that are allowed."""

    def __init__(self, given, allowed=()):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.allowed, self.entries = allowed, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.given and storage.nbytes() not in self.allowed:
                    self.entries = max(self.entries, storage.nbytes() // x.itemsize)
        return result


def test_memory(monkeypatch):
    """Neither form makes a tensor of tokens by vocabulary, beside the gradient of logits."""
    monkeypatch.setattr(
        transforms, "dispatches", lambda *_: False
    )  # the mode sees operators' bodies
    monkeypatch.setattr("distill_ops.selection.CPU_CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(
        "distill_ops.cpu.rows.BUFFER_BYTES", 5 * 4 * 2000
    )  # two rows in each of five
    monkeypatch.setattr("distill_ops.cpu.topk.TOPK_ELEMENTS", 2000)
    n_rows, n_cols, k = 64, 1000, 4
    pair = make_logits((n_rows, n_cols))
    with Largest(pair) as held:
        support_distillation_loss(*pair, k=k, divergence="reverse_kl")
    assert 2000 <= held.entries <= 4000
    leaves = make_pair((n_rows,), n_cols).trained(("student_hidden", "student_weight"))
    budget = 4 * 4 * (3 * n_cols + 3 * 24)  # four rows under work
    with Largest(leaves[:4], {x.nbytes for x in leaves[:2]}) as held:
        linear_support_distillation_loss(*leaves[:4], k=k, memory_budget=budget).backward()
    assert 4 * n_cols <= held.entries <= 5 * n_cols
