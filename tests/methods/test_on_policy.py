"""``methods.on_policy`` against its float64 reference, and at the edges."""

import math

import pytest
import torch

import distill_ops
from distill_ops import JensenShannon
from distill_ops.methods import on_policy
from distill_ops.reference.on_policy import on_policy_linear_loss, on_policy_loss
from tests.support.helpers import make_logits, to_float64

B, S, V, D = 3, 5, 11, 4
NAN, INF = math.nan, math.inf
OLD = {"behaviour_log_probs": True}  # stands for a tensor, as the others that are True
TRUNCATE, MASK, CLIP = (OLD | {"importance": name} for name in ("truncate", "mask", "clip"))
OPTIONS = {
    "full": {},
    "full, any divergence": {"divergence": JensenShannon(0.3), "temperature": 2.0},
    "full, weights": {"token_weights": True, "reduction": "sum"},
    "full, each": {"reduction": "none", "token_weights": True},
    "full, truncate": TRUNCATE | {"bounds": (0.0, 1.1), "token_weights": True},
    "full, prefix": TRUNCATE | {"bounds": (0.0, INF), "importance_level": "prefix"},
    "support": {"objective": "support", "k": 3},
    "support, sum": {"objective": "support", "k": 3, "reduction": "sum", "temperature": 0.7},
    "support, mask": MASK | {"objective": "support", "k": 4, "tail": "restrict", "support": "teacher"},
    "support, weights": {"objective": "support", "k": 2, "token_weights": True, "normalizer": 7},
    "sampled": {"objective": "sampled", "temperature": 1.5},
    "sampled, mask": MASK | {"objective": "sampled", "bounds": (0.9, 1.2), "reward_clip": 0.4},
    "sampled, prefix": MASK | {"objective": "sampled", "importance_level": "prefix"},
    "sampled, clip": CLIP | {"objective": "sampled", "bounds": (0.95, 1.05), "token_weights": True},
    "support, served": {"objective": "support", "k": 3, "teacher_log_probs": True},
    "sampled, dual clip": CLIP | {"objective": "sampled", "dual_clip": 1.1, "bounds": (0.95, 1.05)},
    "sampled, served": TRUNCATE | {"objective": "sampled", "teacher_log_probs": True},
}  # fmt: skip
OBJECTIVES = ("full", "support, mask", "sampled, clip", "sampled, served")


class Batch:
    """Tokens of ragged lengths, padded on both sides: a row of one, a row of none."""

    def __init__(self, dtype=torch.float64, shape=(B, S)):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype)
        self.ids = torch.randint(V, shape, generator=generator)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        if self.mask.numel():
            self.mask[0, 1:] = True
            self.mask[1, -1:] = True
        self.logits = make_logits((*shape, V), dtype=dtype)
        self.heads = draw(*shape, D), draw(V, D), draw(*shape, D), draw(V, D)
        self.tensors = {
            "teacher_log_probs": -2.0 + 0.1 * draw(*shape),
            "token_weights": draw(*shape),
        }

        self.tensors["token_weights"].view(-1)[2:3] = 0  # of a token that counts
        ids, noise = self.ids, 0.2 * draw(*shape)  # a policy near the student
        self.behaviours = {
            False: distill_ops.token_log_probs(self.logits[0], ids).to(dtype) + noise,
            True: distill_ops.linear_token_log_probs(*self.heads[:2], ids).to(dtype) + noise,
        }

    def options(self, name, linear=False):
        tensors = self.tensors | {"behaviour_log_probs": self.behaviours[linear].clamp(max=0)}
        return {k: tensors[k] if v is True else v for k, v in OPTIONS[name].items()}

    def call(self, function, name, linear, *, mask=None, **more):
        """The result, and the gradients of the student's tensors."""
        students = self.heads[:2] if linear else self.logits[:1]
        teachers = self.heads[2:] if linear else self.logits[1:]
        leaves = [x.detach().clone().requires_grad_() for x in students]
        options = self.options(name, linear) | more
        if "teacher_log_probs" in options and options["objective"] == "sampled":
            teachers = [None] * len(teachers)
        mask = self.mask if mask is None else mask
        found = function(*leaves, *teachers, self.ids, mask, **options)
        upstream = torch.linspace(0.5, 1.5, max(found.loss.numel(), 1)).reshape(found.loss.shape)
        (found.loss * upstream.to(found.loss.dtype)).sum().backward()
        return found._replace(loss=found.loss.detach()), [x.grad for x in leaves]

    def map(self, function):
        self.ids, self.mask = function(self.ids), function(self.mask)
        self.logits = [function(x) for x in self.logits]
        self.heads = [x if i % 2 else function(x) for i, x in enumerate(self.heads)]
        self.tensors = {k: function(x) for k, x in self.tensors.items()}
        self.behaviours = {k: function(x) for k, x in self.behaviours.items()}
        return self


FUNCTIONS = {False: on_policy.loss, True: on_policy.linear_loss}
REFERENCES = {False: on_policy_loss, True: on_policy_linear_loss}
linear = pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])


def assert_same(found, expected, **tolerance):
    (ours, our_gradients), (theirs, their_gradients) = found, expected
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    for name, x in zip(theirs._fields, theirs, strict=True):
        y = getattr(ours, name)
        if x is None:  # the fused call may not come by it; what it has the reference has
            assert y is None, name
            continue
        torch.testing.assert_close(y, x, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        assert not y.requires_grad
    for x, y in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@linear
@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(name, linear):
    batch = Batch()
    found, expected = (batch.call(of[linear], name, linear) for of in (FUNCTIONS, REFERENCES))
    assert_same(found, expected)
    assert expected[1][0].norm() > 1e-3


@linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_dtypes(name, dtype, linear):
    """Numbers in float32, the gradient in the logits' own dtype."""
    batch = Batch(dtype)
    found, gradients = batch.call(FUNCTIONS[linear], name, linear)
    wide = Batch(dtype).map(to_float64)
    wide.heads = [to_float64(x) for x in wide.heads]
    expected, truth = wide.call(REFERENCES[linear], name, linear)
    assert found.loss.dtype == found.student_entropy.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(gradients, truth, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 4 * eps + 1e-5


CALLS = (
    "distillation_statistics", "support_distillation_loss", "token_log_probs",
    "linear_distillation_statistics", "linear_support_distillation_loss", "linear_token_log_probs",
)  # fmt: skip


@linear
@pytest.mark.parametrize("name", OPTIONS)
def test_one_fused_call(name, linear, monkeypatch):
    made = []
    for function in CALLS:
        original = getattr(on_policy, function)
        counted = lambda *a, original=original, **k: (
            made.append(original.__name__) or original(*a, **k)
        )
        monkeypatch.setattr(on_policy, function, counted)
    Batch().call(FUNCTIONS[linear], name, linear)
    assert len(made) == 1, made
    assert made[0].startswith("linear") == linear


# --- tokens that do not count ----------------------------------------------------------------------


def poisoned(batch, value):
    """NaN or infinities, and ids beyond the vocabulary, wherever a token does not count."""
    kept = batch.mask

    def poison(x):
        if x.dtype == torch.bool:
            return x
        if x.dtype == torch.int64:
            return x.masked_fill(~kept, V + 5)
        return x.masked_fill(~(kept if x.dim() == 2 else kept[..., None]), value)

    return batch.map(poison)


@pytest.mark.covering("name linear", "value")
@linear
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_does_not_count_is_not_read(name, value, linear):
    function = FUNCTIONS[linear]
    found, expected = poisoned(Batch(), value).call(function, name, linear), Batch()
    assert_same(found, expected.call(function, name, linear), rtol=0, atol=0)


@linear
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_may_be_anywhere(name, linear):
    """The tokens of a row at another place: the same loss, and gradients that move with them."""
    shift = lambda x: torch.cat([x[:, 1:], x[:, :1]], 1)
    apart = Batch().map(shift)  # row 0 was padded on the left, and is on the right
    (one, _), (other, _) = (
        batch.call(FUNCTIONS[linear], name, linear) for batch in (Batch(), apart)
    )
    if OPTIONS[name].get("reduction") == "none":
        one = one._replace(loss=shift(one.loss))
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-12, atol=0)
    for field, x in zip(one._fields, one, strict=True):
        if x is not None and x.dim() == 2 and field != "loss":
            torch.testing.assert_close(getattr(other, field), shift(x), rtol=1e-12, atol=1e-15)


@linear
@pytest.mark.parametrize("shape", [(0, S), (B, 0), (B, 1)], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_lengths_of_0_and_1(name, shape, linear):
    batch = Batch(shape=shape)
    found, expected = (batch.call(of[linear], name, linear) for of in (FUNCTIONS, REFERENCES))
    assert_same(found, expected)
    assert found[0].student_log_prob.shape == shape
    if 0 in shape:
        assert found[0].loss == 0


@linear
@pytest.mark.parametrize("name", OPTIONS)
def test_no_token_counts(name, linear):
    """0 with a gradient of 0, whatever is there; no ratio of 0 to 0."""
    batch = Batch()
    batch.mask = torch.zeros_like(batch.mask)
    found, gradients = poisoned(batch, NAN).call(FUNCTIONS[linear], name, linear)
    assert all(not x.any() for x in found if x is not None)
    assert all(not x.any() for x in gradients if x.dim() == 3)
    assert not gradients[-1].isnan().any()


def test_an_id_to_ignore_does_not_count():
    batch = Batch()
    ids = batch.ids.masked_fill(~batch.mask, -100)
    ones = torch.ones_like(batch.mask)
    found = on_policy.loss(*batch.logits, ids, ones)
    assert torch.equal(found.loss, on_policy.loss(*batch.logits, batch.ids, batch.mask).loss)
    found = on_policy.loss(*batch.logits, ids.masked_fill(ids == -100, 0), ones, ignore_index=0)
    kept = (ids != 0) & (ids != -100)
    assert torch.equal(found.loss, on_policy.loss(*batch.logits, batch.ids, kept).loss)


def test_a_float_mask_weighs_and_is_counted():
    """``1 / length`` makes the mean over sequences of their means; token weights do not count."""
    batch = Batch()
    losses = on_policy.loss(*batch.logits, batch.ids, batch.mask, reduction="none").loss
    lengths = batch.mask.sum(1, keepdim=True)
    found = on_policy.loss(*batch.logits, batch.ids, batch.mask / lengths.clamp(min=1)).loss
    torch.testing.assert_close(found, (losses.sum(1) / lengths[:, 0])[:2].mean())
    weights = torch.full_like(losses, 3.0)
    found = on_policy.loss(*batch.logits, batch.ids, batch.mask, token_weights=weights).loss
    torch.testing.assert_close(found, 3 * losses.sum() / batch.mask.sum())


# --- views, padding of the vocabulary, compilation, the record ------------------------------------


def test_views_are_read_where_they_are():
    batch = Batch()
    logits = [torch.cat([x, x[:, :1]], 1) for x in batch.logits]
    found = on_policy.loss(*(x[:, :-1] for x in logits), batch.ids, batch.mask)
    assert torch.equal(found.loss, on_policy.loss(*batch.logits, batch.ids, batch.mask).loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padded_vocabularies(name):
    batch, wide = Batch(), Batch()
    wide.logits = [
        torch.cat([x, x.new_full((B, S, n), NAN)], -1)
        for x, n in zip(batch.logits, (2, 3), strict=True)
    ]
    wide.heads = [
        torch.cat([x, x.new_full((2, D), NAN)]) if i % 2 else x for i, x in enumerate(batch.heads)
    ]
    for linear, function in FUNCTIONS.items():
        (one, gradients), (other, wider) = (
            x.call(function, name, linear, **options)
            for x, options in ((batch, {}), (wide, {"vocab_size": V}))
        )
        torch.testing.assert_close(other.loss, one.loss, rtol=1e-12, atol=0)
        more = wider[1][V:] if linear else wider[0][..., V:]
        assert not more.any()
        torch.testing.assert_close(wider[0][..., : gradients[0].shape[-1]], gradients[0])


@pytest.mark.parametrize(
    "name",
    [
        "support, mask",
        *(
            pytest.param(x, marks=pytest.mark.full)
            for x in ("full", "sampled, clip", "sampled, served")
        ),
    ],
)
def test_under_compile(name):
    batch = Batch(torch.float32)
    call = lambda student: on_policy.loss(
        student, None if name == "sampled, served" else batch.logits[1], batch.ids, batch.mask,
        **batch.options(name),
    ).loss  # fmt: skip
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch.logits[0]), call(batch.logits[0]))


def test_the_record_is_what_the_names_say():
    """Against the package's own functions."""
    batch = Batch()
    found = on_policy.loss(*batch.logits, batch.ids, batch.mask)
    expected = distill_ops.distillation_statistics(
        *batch.logits, batch.ids.masked_fill(~batch.mask, -100)
    )
    for name in ("divergence", "student_log_prob", "teacher_log_prob", "teacher_entropy"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for kind in ("k1", "k2", "k3"):
        estimate = distill_ops.reverse_kl_estimate(
            expected.student_log_prob, expected.teacher_log_prob, kind=kind
        )
        assert torch.equal(getattr(found, kind), estimate)
