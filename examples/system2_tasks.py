"""Tasks with a scratchpad for ``system2.py``: questions, the steps to their answers, and perturbations.

Every task is text of words with spaces between, and each word is a token. Questions of a task are
equally long. A scratchpad repeats a piece of the question before what follows from it. Those that a
model learns from hold slips, with what follows from them: its samples then err as often, each in its
own way, and that is what a vote can find.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

END, THINK, ANSWER = "<end>", "think:", "answer:"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Example(NamedTuple):
    """One question, how it is reasoned about with what it comes to, and the true answer."""

    question: str
    steps: str
    concluded: str
    answer: str


Undo = Callable[[str], str] | None
Perturbation = Callable[[Mapping[str, Any]], tuple[dict[str, str], Undo]]


@dataclass(frozen=True)
class Task:
    """Questions without end, and how one is asked differently."""

    name: str
    about: str  # what is asked, for people
    words: tuple[str, ...]  # the vocabulary, but for what all tasks have
    make: Callable[[random.Random, float], Example]
    perturbations: tuple[Perturbation, ...]

    def examples(
        self, n: int, chance: random.Random, seen: set[str], slips: float = 0.0
    ) -> list[Example]:
        """New ones: questions that are not among ``seen``, which has them afterwards.

        ``slips`` is the probability that a step of the scratchpad is wrong.
        """
        found = []
        while len(found) < n:
            example = self.make(chance, slips)
            if example.question not in seen:
                seen.add(example.question)
                found.append(example)
        return found


class Vocabulary:
    """Words to ids and back; ``encode`` is a tokenizer as ``to_labels`` takes it."""

    def __init__(self, task: Task):
        self.words = (END, THINK, ANSWER, *task.words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """Up to the end token; all of them where there is none."""
        words = [self.words[i] for i in ids]
        return " ".join(words[: words.index(END)] if END in words else words)


def last_letters(n_words: int = 4, n_known: int = 150, seed: int = 0) -> Task:
    """The last letter of each of some made-up words, whose spelling is the scratchpad."""
    chance = random.Random(seed)
    known: set[str] = set()
    while len(known) < n_known:
        known.add("".join(chance.choices(LETTERS, k=chance.randint(3, 5))))
    words = sorted(known)

    def make(chance: random.Random, slips: float) -> Example:
        asked, steps, concluded = chance.choices(words, k=n_words), [], []
        for word in asked:
            last = chance.choice(LETTERS) if chance.random() < slips else word[-1]
            steps.append(" ".join([word, *word[:-1], last]))
            concluded.append(last)
        answer = " ".join(word[-1] for word in asked)
        return Example(" ".join(asked), " ".join(steps), " ".join(concluded), answer)

    def backwards(fields: Mapping[str, Any]) -> tuple[dict[str, str], Undo]:
        return {"question": reverse(fields["question"])}, reverse

    return Task(
        "last letters", f"the last letters of {n_words} words, of {n_known} made-up ones",
        (*words, *LETTERS), make, (backwards,),
    )  # fmt: skip


def reverse(text: str) -> str:
    return " ".join(reversed(text.split()))


def coin_flip(n_people: int = 4) -> Task:
    """How a coin lies after some people have flipped it or not; its state after each is the scratchpad."""
    names = ["".join(parts) for parts in product("bdkt", "aeio", ["n"])]
    acts, states = ("flips", "keeps"), ("heads", "tails")

    def make(chance: random.Random, slips: float) -> Example:
        question, steps, state, true = [], [], 0, 0
        for name in chance.sample(names, n_people):
            act = chance.randrange(2)
            true ^= act == 0
            state ^= (act == 0) ^ (chance.random() < slips)
            question.append(f"{name} {acts[act]}")
            steps.append(f"{name} {states[state]}")
        return Example(" ".join(question), " ".join(steps), states[state], states[true])

    def another_order(fields: Mapping[str, Any]) -> tuple[dict[str, str], Undo]:
        words = fields["question"].split()
        turns = list(zip(words[::2], words[1::2], strict=True))
        return {"question": " ".join(" ".join(turn) for turn in reversed(turns))}, None

    return Task(
        "coin flip", f"heads or tails, after {n_people} people flipped a coin or kept it",
        (*names, *acts, *states), make, (another_order,),
    )  # fmt: skip


def arithmetic(n_steps: int = 5, modulus: int = 19) -> Task:
    """A chain of operations, modulo a prime; the intermediate results are the scratchpad."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

    def make(chance: random.Random, slips: float) -> Example:
        value = true = chance.randrange(modulus)
        question, steps = [str(value)], []
        for _ in range(n_steps):
            sign, by = chance.choice("+-*"), chance.randint(2, 9)
            true = operations[sign](true, by) % modulus
            value = operations[sign](value, by) % modulus
            if chance.random() < slips:
                value = chance.randrange(modulus)
            question.append(f"{sign}{by}")
            steps.append(f"{sign}{by} {value}")
        return Example(" ".join(question), " ".join(steps), str(value), str(true))

    return Task(
        "arithmetic", f"{n_steps} operations one after the other, modulo {modulus}",
        (*map(str, range(modulus)), *(f"{x}{by}" for x in operations for by in range(2, 10))), make, (),
    )  # fmt: skip
