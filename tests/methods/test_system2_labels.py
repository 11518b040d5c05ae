"""``to_labels`` and ``to_messages``: shifted labels, padding and packing, tokenizers, and both losses."""

import pytest
import torch
import torch.nn.functional as F

from distill_ops import distillation_loss, linear_distillation_loss
from distill_ops.methods.system2 import to_labels, to_messages
from tests.support.curations import END, HOW, codes, record
from tests.support.recipes import causal_model

RECORDS = [record("abc", "de"), record("f", "ghij", 0.5), record("kl", "m", 0.75)]


def by_hand(asked, target):
    """Ids and labels of one record, token by token."""
    ids = codes(asked + target) + [END]
    labels = [
        ids[t + 1] if t + 1 >= len(asked) and t + 1 < len(ids) else -100 for t in range(len(ids))
    ]
    return ids, labels


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_padded(side, multiple):
    batch = to_labels(RECORDS, codes, padding_side=side, pad_to_multiple_of=multiple, **HOW)
    width = -(-6 // multiple) * multiple
    assert batch.ids.shape == (3, width)
    assert batch.records == [[0], [1], [2]]
    assert batch.skipped == []
    for row, one in enumerate(RECORDS):
        ids, labels = by_hand(one.input, one.target)
        there = batch.attention_mask[row] == 1
        assert there.sum() == len(ids)
        assert there[: len(ids)].all() if side == "right" else there[-len(ids) :].all()
        assert batch.ids[row][there].tolist() == ids
        assert batch.labels[row][there].tolist() == labels
        assert batch.position_ids[row][there].tolist() == list(range(len(ids)))
        assert (batch.ids[row][~there] == 0).all()
        assert (batch.labels[row][~there] == -100).all()
    assert ((batch.labels == -100) == (batch.weights == 0)).all()
    assert batch.ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.weights.dtype == torch.float32


def test_packed():
    batch = to_labels(RECORDS, codes, max_length=10, pack=True, **HOW)
    assert batch.records == [[0], [1, 2]]  # 6, then 6 + 4
    ids = [by_hand(one.input, one.target)[0] for one in RECORDS]
    labels = [by_hand(one.input, one.target)[1] for one in RECORDS]
    assert batch.ids.tolist() == [ids[0] + [0] * 4, ids[1] + ids[2]]
    assert batch.labels.tolist() == [labels[0] + [-100] * 4, labels[1] + labels[2]]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0] * 4, [1] * 6 + [2] * 4]
    assert batch.position_ids.tolist() == [[*range(6), *range(4)], [*range(6), *range(4)]]
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 16, 20]
    assert batch.cu_seqlens.dtype == torch.int32
    mask = batch.block_mask()
    assert mask.shape == (2, 1, 10, 10)
    for row in range(2):
        for t in range(10):
            for s in range(10):
                same = batch.segment_ids[row, t] == batch.segment_ids[row, s]
                assert mask[row, 0, t, s] == (same and s <= t)
    added = batch.block_mask(torch.float16)
    assert ((added == 0) == mask).all()
    assert (added[~mask] == torch.finfo(torch.float16).min).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_runs_of_padded_rows(side):
    batch = to_labels(RECORDS, codes, padding_side=side, **HOW)
    starts = batch.cu_seqlens.tolist()
    segments = batch.segment_ids.flatten()
    changes = (segments[1:] != segments[:-1]).nonzero().flatten() + 1
    assert starts == sorted({0, 6, 12, 18, *changes.tolist()})
    assert [i for i, at in enumerate(batch.position_ids.flatten().tolist()) if at == 0] == starts[
        :-1
    ]


def test_weights():
    of = lambda **how: to_labels(RECORDS, codes, **HOW, **how).weights
    assert of().sum(-1).tolist() == [3, 5, 2]
    assert torch.allclose(of(weighting="record").sum(-1), torch.ones(3))
    assert of(weighting="agreement").amax(-1).tolist() == [1.0, 0.5, 0.75]
    assert of(weighting=lambda one: len(one.input)).amax(-1).tolist() == [3, 1, 2]
    with pytest.raises(ValueError, match="must be finite and not negative, got -1"):
        of(weighting=lambda one: -1)


SKIPPED = [
    (record("a", None), "no answer"),
    (record("a", ""), "no answer"),
    (record("a", "b")._replace(kept=False), "no answer"),
    (record("", "b"), "no prompt"),
    (record("a" * 7, "b"), "prompt longer than the window"),
    (record("a", "b" * 8), "target longer than the window"),
    (record("a", "b" * 7), "target longer than the window"),
]


def test_what_gives_no_labels_is_named():
    records = [one for one, _ in SKIPPED]
    batch = to_labels([*records, RECORDS[0]], codes, max_length=8, **HOW)
    assert batch.skipped == [(i, reason) for i, (_, reason) in enumerate(SKIPPED)]
    assert batch.records == [[len(SKIPPED)]]
    with pytest.raises(ValueError, match="records must hold at least one, got none"):
        to_labels([], codes, **HOW)


@pytest.mark.parametrize("how", [{"pad_to_multiple_of": 4}, {"pack": True, "max_length": 8}])
def test_a_batch_that_is_skipped_has_no_loss(how):
    """A data loader's loop goes on: one row, which a model can be run on, and a gradient of zeros."""
    loader = torch.utils.data.DataLoader(
        [record("a", None), RECORDS[0]],
        1,
        collate_fn=lambda one: to_labels(one, codes, **HOW, **how),
    )
    with pytest.warns(UserWarning, match=r"none of the 1 records gives labels \(no answer\)"):
        first, second = loader
    assert (first.records, first.skipped, second.records) == ([[]], [(0, "no answer")], [[0]])
    assert first.ids.shape == first.labels.shape == (1, how.get("max_length", 4))
    assert first.attention_mask.sum() == 1
    assert (first.labels == -100).all()
    model = causal_model(0)
    mask = first.block_mask() if "pack" in how else first.attention_mask
    out = model.model(first.ids, attention_mask=mask, position_ids=first.position_ids)
    hidden, weight = out.last_hidden_state, model.lm_head.weight
    options = {"labels": first.labels, "loss_mask": first.weights, "hard_label_weight": 1.0}
    for loss in (
        distillation_loss(hidden @ weight.T, None, **options),
        linear_distillation_loss(hidden, weight, None, None, **options),
    ):
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        assert all((grad == 0).all() for grad in grads)


def test_a_long_prompt_is_cut_on_the_left_and_no_target_is():
    records = [record("abcdefgh", "xy"), record("a", "b" * 6), record("abc", "b" * 7)]
    batch = to_labels(records, codes, max_length=8, truncate="left", **HOW)
    assert batch.ids[0].tolist() == [*codes("defghxy"), END]
    assert batch.labels[0].tolist() == [-100] * 4 + [*codes("xy"), END, -100]
    assert batch.skipped == [(2, "target longer than the window")]


def cross_entropy(logits, batch):
    """Of the tokens of each target, unshifted by hand: the weighted mean."""
    total = weight = 0.0
    for row in range(len(logits)):
        for t in range(logits.shape[1] - 1):
            if batch.labels[row, t] == -100:
                continue
            assert batch.labels[row, t] == batch.ids[row, t + 1]
            w = batch.weights[row, t].item()
            total = total + w * F.cross_entropy(logits[row, t].double(), batch.ids[row, t + 1])
            weight += w
    return total / weight


@pytest.mark.parametrize(
    "how", [{}, {"padding_side": "left"}, {"pack": True, "max_length": 12}], ids=str
)
def test_both_losses_take_them(how):
    """Of a small causal model, padding and other records' tokens make no difference to any record."""
    model = causal_model(0).eval()
    batch = to_labels(RECORDS, codes, weighting="agreement", **HOW, **how)
    mask = batch.block_mask() if "pack" in how else batch.attention_mask
    hidden = model.model(
        batch.ids, attention_mask=mask, position_ids=batch.position_ids
    ).last_hidden_state
    logits = hidden @ model.lm_head.weight.T
    options = {"labels": batch.labels, "loss_mask": batch.weights, "hard_label_weight": 1.0}
    loss = distillation_loss(logits, None, **options)
    linear = linear_distillation_loss(hidden, model.lm_head.weight, None, None, **options)
    torch.testing.assert_close(loss.double(), cross_entropy(logits, batch))
    torch.testing.assert_close(linear, loss)
    alone = [
        cross_entropy(model(one.ids).logits, one)
        for one in (to_labels([x], codes, **HOW) for x in RECORDS)
    ]
    n = torch.tensor([3, 5, 2]) * torch.tensor([x.agreement for x in RECORDS])
    expected = sum(a * b for a, b in zip(alone, n, strict=True)) / n.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert torch.isfinite(model.lm_head.weight.grad).all()
    if "pack" in how:  # the model finds them by the position ids alone, too
        found = model(batch.ids, position_ids=batch.position_ids, use_cache=False).logits
        there = batch.attention_mask == 1
        torch.testing.assert_close(found[there], logits[there])


def test_prompts_and_messages():
    asked = {"question": "Which?", "options": ["x", "y"], "n": 3}
    one = record(asked, "B")
    shown = to_messages(one, prompt="{question}\n{options}\n", system="Be short.")
    assert shown == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Which?\n(A) x\n(B) y\n"},
        {"role": "assistant", "content": "B"},
    ]
    assert to_messages(one._asdict(), prompt=lambda x: str(x["n"]))[0]["content"] == "3"
    batch = to_labels([{"input": "ab", "target": "c"}], codes, prompt="z{question}z", **HOW)
    assert batch.ids.tolist() == [[*codes("zabzc"), END]]
    with pytest.raises(ValueError, match="record must be kept, with a target"):
        to_messages(record("a", None))
    with pytest.raises(
        ValueError, match=r"prompt needs the field 'question' of each input, got \['n'\]"
    ):
        to_messages(record({"n": 3}, "x"))
    with pytest.raises(TypeError, match="prompt must return a str, got 3"):
        to_messages(one, prompt=lambda x: 3)
    with pytest.raises(TypeError, match="records must have an input, a str or a mapping"):
        to_messages({"target": "x"})


WRONG = [
    (
        {"truncate": "right"},
        ValueError,
        "truncate must be one of 'skip', 'left'.*a target is never cut",
    ),
    ({"padding_side": "both"}, ValueError, "padding_side must be one of 'right', 'left'"),
    ({"special_tokens": "split"}, ValueError, "special_tokens must be one of 'skip', 'keep'"),
    (
        {"weighting": "length"},
        ValueError,
        "weighting must be one of 'token', 'record', 'agreement'",
    ),
    ({"pack": True}, ValueError, "pack=True makes rows of max_length tokens.*max_length=None"),
    ({"pack": True, "max_length": 9, "padding_side": "left"}, ValueError, "padding_side='left'"),
    ({"pack": 1}, TypeError, "pack must be True or False"),
    ({"max_length": 1}, ValueError, "max_length must be at least 2, got 1"),
    ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be at least 1"),
    ({"eos_token_id": "auto"}, ValueError, "tokenizer has no eos_token_id: pass eos_token_id="),
    ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be an int"),
    ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0"),
    ({"chat": True}, ValueError, "eos_token_id is the chat template's with chat=True, got 2"),
    (
        {"chat": True, "eos_token_id": None},
        TypeError,
        "chat=True needs a tokenizer with apply_chat_template",
    ),
    ({"system": "Be short."}, ValueError, "system needs chat=True: put it into prompt"),
    (
        {"tokenizer": None},
        TypeError,
        "tokenizer must be one of transformers, tokenizers or tiktoken, or a function",
    ),
    ({"tokenizer": "gpt2"}, TypeError, "or a function of a text to its ids, got 'gpt2'"),
    (
        {"tokenizer": lambda text: {"input_ids": [1]}},
        TypeError,
        "tokenizer must return a list of ids, got {'input_ids",
    ),
    ({"records": RECORDS[0]}, TypeError, "records must be an iterable of records, got Record"),
    ({"records": [record("a", 4)]}, TypeError, "target of a record must be a str or None, got 4"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG)
def test_what_is_refused(change, error, words):
    call = {"records": RECORDS, "tokenizer": codes, **HOW} | change
    with pytest.raises(error, match=words):
        to_labels(call.pop("records"), call.pop("tokenizer"), **call)
