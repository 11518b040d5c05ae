"""A text corpus found on every machine: the Python standard library and its documentation.

The documents are the library's modules and the topics behind ``help()``; a byte-level BPE tokenizer
is trained on them, and each is cut into windows of a fixed length.
"""

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BEGIN = 0, 1
IGNORE = -100
HELD_OUT_EVERY = 20  # one document in twenty is never trained on

# Tests are not installed everywhere, third-party packages differ from machine to machine, codecs
# are tables of characters, and the source of the topics would repeat them.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
LEFT_OUT |= {"pydoc_data"}


class Batch(NamedTuple):
    """What a training step reads. Labels are aligned with the logits: shifted by one already (of
    Hugging Face labels the losses would take ``labels[:, 1:]``, and ``logits[:, :-1]``)."""

    input_ids: torch.Tensor  # [batch, length]
    labels: torch.Tensor  # [batch, length]; IGNORE past a document's end
    loss_mask: torch.Tensor  # [batch, length]; 0 past a document's end
    windows: torch.Tensor  # [batch]: their numbers in the corpus


@dataclass(frozen=True)
class Corpus:
    """Windows of ``length + 1`` tokens, the input and its continuation."""

    train: torch.Tensor  # [n_train, length + 1]
    held_out: torch.Tensor  # [n_held_out, length + 1]
    facts: dict[str, int]
    tokenizer: Tokenizer

    def batches(self, n_steps: int, batch_size: int, seed: int) -> list[Batch]:
        """Batches of training windows in random order; begins anew when the corpus is used up."""
        generator = torch.Generator().manual_seed(seed)
        n_epochs = -(-n_steps * batch_size // len(self.train))
        epochs = [torch.randperm(len(self.train), generator=generator) for _ in range(n_epochs)]
        order = torch.cat(epochs)[: n_steps * batch_size]
        return [as_batch(self.train, rows) for rows in order.split(batch_size)]

    def stream(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Batches of training windows without end, every epoch in a new order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for rows in order.split(batch_size):
                if len(rows) == batch_size:
                    yield as_batch(self.train, rows)

    def held_out_batches(self, n_batches: int, batch_size: int) -> list[Batch]:
        """Held-out windows, spread evenly over its documents; the same on every call."""
        spread = torch.linspace(0, len(self.held_out) - 1, n_batches * batch_size).long()
        return [as_batch(self.held_out, rows) for rows in spread.split(batch_size)]


def as_batch(corpus: torch.Tensor, windows: torch.Tensor) -> Batch:
    tokens = corpus[windows]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    inside = targets != PAD
    return Batch(inputs, targets.masked_fill(~inside, IGNORE), inside, windows)


def read_documents() -> list[str]:
    """The sources of the standard library, then the documentation topics."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(library.rglob("*.py"))
    paths = [path for path in paths if not LEFT_OUT & set(path.relative_to(library).parts)]
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in [*sources, *topics.values()] if text.strip()]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text has tokens, and none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<begin>"],  # their ids are PAD and BEGIN
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def cut_windows(tokenizer: Tokenizer, documents: list[str], length: int) -> torch.Tensor:
    """``[n, length + 1]``: neighbours share a token, so that every token is predicted once."""
    windows = []
    for encoding in tokenizer.encode_batch(documents):
        tokens = torch.tensor([BEGIN, *encoding.ids])
        n_windows = -(-(len(tokens) - 1) // length)
        padded = torch.full((n_windows * length + 1,), PAD)
        padded[: len(tokens)] = tokens
        windows.append(padded.unfold(0, length + 1, length))
    return torch.cat(windows)


def load_corpus(
    vocab_size: int, length: int, seed: int, max_documents: int | None = None
) -> Corpus:
    """Read, split by document, train the tokenizer on the training part, and cut into windows."""
    documents = read_documents()
    random.Random(seed).shuffle(documents)
    documents = documents[:max_documents]
    held_out = documents[::HELD_OUT_EVERY]
    train = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(train, vocab_size)
    corpus = Corpus(
        cut_windows(tokenizer, train, length),
        cut_windows(tokenizer, held_out, length),
        facts={
            "documents": len(documents),
            "characters": sum(map(len, documents)),
            "vocabulary": tokenizer.get_vocab_size(),
        },
        tokenizer=tokenizer,
    )
    tokens = {"train_tokens": corpus.train, "held_out_tokens": corpus.held_out}
    for name, windows in tokens.items():
        corpus.facts[name] = int((windows[:, 1:] != PAD).sum())
    return corpus
