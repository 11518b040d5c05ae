"""Tiny tokenizers that are trained here, and pairs of them that differ in one thing."""

import json

from distill_ops.methods.tokenizers import check_same_tokenizer
from tests.support import optional

optional("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

CORPUS = ["the cat and the other cat sat on the mat, the end", "a banana band and an anagram"] * 4
TEXTS = {"plain": "the cat sat", "other": "naïve 日本  \n\tx 👍🏽"}


def train(specials=("<s>", "</s>"), corpus=CORPUS, merges=30, prefix_space=False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 256 + merges,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


BASE = train()
N = BASE.get_vocab_size()


def with_added(*tokens: str, special: bool = True, of: Tokenizer = BASE) -> Tokenizer:
    tokenizer = Tokenizer.from_str(of.to_str())
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    return tokenizer


def fast(tokenizer: Tokenizer, **options):
    transformers = optional("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **options}
    )


def check(student, teacher, **options):
    return check_same_tokenizer(student, teacher, **{"texts": TEXTS, **options})


def row(report, compared: str):
    (found,) = (row for row in report.rows if row.compared.startswith(compared))
    return found


def permuted(tokenizer: Tokenizer, a: str, b: str) -> Tokenizer:
    """Of the same tokens, two of which have each other's ids."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return Tokenizer.from_str(json.dumps(content))


def slow(words: dict[str, int]):
    """A tokenizer of transformers in Python, of whole words."""
    transformers = optional("transformers")

    class Words(transformers.PreTrainedTokenizer):
        def __init__(self, **options):
            self.words = dict(words)
            super().__init__(**options)

        @property
        def vocab_size(self):
            return len(self.words)

        def get_vocab(self):
            return {**self.words, **self.added_tokens_encoder}

        def _tokenize(self, text, **options):
            return text.split()

        def _convert_token_to_id(self, token):
            return self.words.get(token, self.words["<unk>"])

        def _convert_id_to_token(self, index):
            return list(self.words)[index]

    return Words(unk_token="<unk>", pad_token="<pad>")
