"""The model of ``system2.py``: training on some words of a text, sampling with a cache, accuracy."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from models import Optimizer
from system2_tasks import ANSWER, Example, Vocabulary
from transformers import DynamicCache, LlamaForCausalLM

from distill_ops import distillation_loss
from distill_ops.methods.system2 import Labels, Record, to_labels

DIRECT = f"{{question}} {ANSWER}"  # how an answer is asked for at once


def records_of(pairs: Sequence[tuple[str, str]]) -> list[Record]:
    """Labelled data as ``to_labels`` takes it."""
    return [Record(i, *pair, 1.0, True, "kept", "") for i, pair in enumerate(pairs)]


def batches(
    records: Sequence[Record], words: Vocabulary, prompt: str, size: int, seed: int
) -> Iterator[Labels]:
    """Without end: the records in a new order each time, some at a time."""
    chance, records = random.Random(seed), list(records)
    size = min(size, len(records))
    while True:
        chance.shuffle(records)
        for start in range(0, len(records) - size + 1, size):
            chosen = records[start : start + size]
            yield to_labels(chosen, words.encode, prompt=prompt, eos_token_id=0)


def train(
    model: LlamaForCausalLM,
    data: Iterator[Labels],
    steps: int,
    learning_rate: float,
    validate: Callable[[LlamaForCausalLM], float] | None = None,
    every: int = 25,
    patience: int | None = None,
) -> tuple[LlamaForCausalLM | None, list[float]]:
    """Trains in place: with ``validate`` a copy of its best weights, of those looked at, and the values.

    Of the values the first is from before training. ``patience`` is so many without a rise, after
    which it stops.
    """
    optimizer = Optimizer(model, learning_rate, max(1, steps))
    values, best = [], None

    def look() -> bool:
        nonlocal best
        values.append(validate(model))
        if best is None or values[-1] > max(values[:-1]):
            best = copy.deepcopy(model)
        since = len(values) - 1 - values.index(max(values))
        return patience is not None and since >= patience

    if validate:
        look()
    for step in range(1, steps + 1):
        batch = next(data)
        # no attention mask: padding comes last, and causal attention never looks ahead
        logits = model(input_ids=batch.ids, use_cache=False).logits
        distillation_loss(
            logits, None, labels=batch.labels, loss_mask=batch.weights, hard_label_weight=1.0
        ).backward()
        optimizer.step()
        if validate and (step % every == 0 or step == steps) and look():
            break
    return best, values


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    most: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """``[B, P]`` to ``[B, at most most]``: sampled, or the most likely ones at temperature 0."""
    cache, found, ended = DynamicCache(), [], torch.zeros(len(ids), dtype=torch.bool)
    while len(found) < most and not ended.all():
        # the cache's name differs between versions of transformers: its place does not
        logits = model(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if temperature:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            ids = logits.argmax(-1, keepdim=True)
        ids = ids.masked_fill(ended[:, None], 0)
        ended |= ids[:, 0] == 0
        found.append(ids)
    return torch.cat(found, 1)


def texts_of(
    model: LlamaForCausalLM, words: Vocabulary, prompts: Sequence[str], most: int,
    temperature: float = 0.0, generator: torch.Generator | None = None,
) -> list[str]:  # fmt: skip
    """What the model writes after each prompt; these are equally long."""
    ids = torch.tensor([words.encode(prompt) for prompt in prompts])
    return [words.decode(x) for x in generate(model, ids, most, temperature, generator).tolist()]


def direct_accuracy(
    model: LlamaForCausalLM, words: Vocabulary, examples: Sequence[Example]
) -> float:
    """The share of right answers at once, each the most likely one."""
    prompts = [DIRECT.format(question=example.question) for example in examples]
    most = len(words.encode(examples[0].answer)) + 1
    texts = texts_of(model, words, prompts, most)
    return sum(t == x.answer for t, x in zip(texts, examples, strict=True)) / len(examples)
