"""``to_labels`` with tokenizers: their special tokens, ends and padding, chat templates, tiktoken."""

import pytest

from distill_ops.methods.system2 import to_labels
from tests.support import optional
from tests.support.curations import HOW, codes, record

RECORDS = [record("abc", "de")]


WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|user|>",
    "<|end|>",
    "a",
    "b",
    "c",
    "4",
    "?",
    "system",
    "\n",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a {{ m.content }} <|end|>"
    "{% else %}<|user|> {{ m.content }} <|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def word_tokenizer():
    tokenizers = optional("tokenizers")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens([*WORDS[:6]])
    found.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return found


def fast_tokenizer():
    transformers = optional("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.mark.parametrize("make", [word_tokenizer, fast_tokenizer])
def test_tokenizers(make):
    tokenizer = make()
    how = {} if make is fast_tokenizer else {"eos_token_id": 2, "pad_token_id": 3}
    records = [record("a b ?", "4"), record("a x", "c x")]
    batch = to_labels(records, tokenizer, **how)
    # the beginning's special token, not the end's; words that are unknown are no special token
    assert batch.ids.tolist() == [[1, 6, 7, 10, 9, 2], [1, 6, 0, 8, 0, 2]]
    assert batch.labels.tolist() == [[-100] * 3 + [9, 2, -100], [-100] * 2 + [8, 0, 2, -100]]
    spelled = [record("a </s> b", "4"), record("a", "4 <|end|>"), record("a", "4 <s>")]
    batch = to_labels([*records, *spelled], tokenizer, **how)
    assert batch.skipped == [(i, "special token in the text") for i in (2, 3, 4)]
    kept = to_labels(spelled[1:2], tokenizer, special_tokens="keep", **how)
    assert kept.labels.tolist() == [[-100, 9, 5, 2, -100]]
    batch = to_labels([record("a b c ?", "4")], tokenizer, max_length=5, truncate="left", **how)
    assert batch.ids.tolist() == [[1, 8, 10, 9, 2]]
    empty = to_labels([record("", "4")], tokenizer, **how)
    assert empty.ids.tolist() == [[1, 9, 2]]


def test_the_chat_template_makes_the_text():
    batch = to_labels([record("b ?", "4")], fast_tokenizer(), chat=True, system="system")
    assert [
        WORDS[i] for i in batch.ids[0]
    ] == "<|user|> system <|end|> <|user|> b ? <|end|> a 4 <|end|>".split()
    assert batch.labels.tolist() == [[-100] * 7 + [9, 5, -100]]
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = "{% if add_generation_prompt %}c{% else %}a{% endif %}"
    with pytest.raises(
        ValueError, match="chat template does not begin a chat with its generation prompt"
    ):
        to_labels([record("b ?", "4")], tokenizer, chat=True)


def test_a_long_chat_is_cut_where_the_user_speaks():
    how = {"chat": True, "system": "system", "truncate": "left"}
    whole = to_labels([record("a b c ?", "4")], fast_tokenizer(), chat=True, system="system")
    assert whole.ids.shape[1] == 12
    batch = to_labels([record("a b c ?", "4")], fast_tokenizer(), max_length=10, **how)
    assert [
        WORDS[i] for i in batch.ids[0]
    ] == "<|user|> system <|end|> <|user|> c ? <|end|> a 4 <|end|>".split()
    assert batch.labels.tolist() == [[-100] * 7 + [9, 5, -100]]
    records = [record("a b c ?", "4"), record("b ?", "4")]
    batch = to_labels(records, fast_tokenizer(), max_length=9, **how)
    assert batch.ids.shape == (2, 9)
    with pytest.warns(UserWarning, match="prompt longer than the window"):
        assert to_labels(records, fast_tokenizer(), max_length=8, **how).skipped[0][0] == 0
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | upper")
    with pytest.warns(UserWarning, match="prompt longer than the window"):  # not as it was given
        to_labels(records, tokenizer, max_length=9, **how)


def test_what_a_chat_says_of_special_tokens_and_padding():
    tokenizer = fast_tokenizer()
    with pytest.raises(
        ValueError, match="system spells a special token of the tokenizer, got 'a </s>'"
    ):
        to_labels([record("b", "4")], tokenizer, chat=True, system="a </s>")
    kept = to_labels(
        [record("b", "4")], tokenizer, chat=True, system="a </s>", special_tokens="keep"
    )
    assert 2 in kept.ids
    tokenizer.pad_token = None
    batch = to_labels([record("b", "4"), record("b ?", "4")], tokenizer, chat=True)
    assert batch.ids[0, -1] == tokenizer.eos_token_id
    assert batch.attention_mask[0, -1] == 0


class Encoding:
    """As tiktoken's: it refuses a text that spells a special token, unless told."""

    special_tokens_set = {"<|endoftext|>"}
    eot_token = 1

    def encode_single_token(self, text):
        return {"<|endoftext|>": 1}[text]

    def encode(self, text, *, allowed_special=frozenset()):
        if "<|endoftext|>" in text and allowed_special != "all":
            raise ValueError("Encountered text corresponding to disallowed special token")
        first, *others = text.split("<|endoftext|>")
        ids = codes(first)
        for other in others:
            ids += [1, *codes(other)]
        return ids


def test_an_encoding_of_tiktoken():
    spelled = record("a<|endoftext|>", "b")
    batch = to_labels([RECORDS[0], spelled], Encoding())
    assert batch.ids.tolist() == [[*codes("abcde"), 1]]
    assert batch.skipped == [(1, "special token in the text")]
    kept = to_labels([spelled], Encoding(), special_tokens="keep")
    assert kept.ids.tolist() == [[10, 1, 11, 1]]
    with pytest.raises(
        ValueError, match=r"tokenizer fails on the text 'a<\|end.*pass the Encoding itself"
    ):
        to_labels([spelled], Encoding().encode, eos_token_id=1)


class Slow:
    """Of transformers, without a list of added tokens."""

    all_special_ids, unk_token_id, bos_token_id, eos_token_id = [7, 2], None, None, 2

    def encode(self, text, add_special_tokens):
        return [7 if x == "#" else 10 + ord(x) - ord("a") for x in text]


def test_special_tokens_of_a_tokenizer_that_lists_their_ids():
    batch = to_labels([record("a#", "b"), record("a", "b")], Slow())
    assert batch.skipped == [(0, "special token in the text")]


def test_a_tokenizer_that_cuts_or_pads_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.enable_truncation(4)
    with pytest.raises(
        ValueError, match=r"tokenizer has truncation switched on: call its no_truncation\(\)"
    ):
        to_labels(RECORDS, tokenizer, **HOW)
