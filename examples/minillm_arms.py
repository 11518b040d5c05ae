"""The ways of training on that ``minillm.py`` compares, each a generator of optimizer steps.

All start from the same student. What a way needs before it can take a step (samples, the teacher's
logits) it makes between two ``yield``s, so that the clock around ``next`` counts all of it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from corpus import PAD, Batch, Corpus
from models import TimedOptimizer, continuation_logits, logits_of, sample
from training import Sizes
from transformers import LlamaForCausalLM

from distill_ops import distillation_loss, token_log_probs
from distill_ops.methods import minillm, on_policy

MINILLM, SAMPLED, FULL = "MiniLLM", "on-policy (token)", "on-policy (vocabulary)"
SOFT, SFT, SEQUENCE = "soft cross-entropy", "further SFT", "sequence-level KD"


@dataclass(frozen=True, kw_only=True)
class ArmConfig(Sizes):
    """A vocabulary and windows small enough for two cores to have the time for samples: a step of the
    student on its own samples costs several on text.

    As in practice the student has less text than its teacher had. On all of it a student this small
    still learns from text as fast as from its teacher: ``--student-windows 50000`` shows that.
    """

    vocab_size: int = 4096
    length: int = 64  # of the windows of text, and of a prompt with its continuation
    prompt_length: int = 16
    batch_size: int = 16
    teacher_hidden: int = 128
    teacher_layers: int = 3
    student_hidden: int = 64
    teacher_learning_rate: float = 6e-3
    student_windows: int = 4000  # of text that students learn from and take prompts from
    seconds: float = 40.0  # of every way of training on
    sft_seconds: float = 40.0  # of the student that they start from
    sft_learning_rate: float = 1e-2
    n_measures: int = 4  # of a way of training on, after the first
    judged_samples: int = 256
    max_documents: int | None = None
    rollouts: int = 64  # sampled at once, to be used in batches
    # MiniLLM's, as in its scripts; sequence-level KD uses its samples as often, on-policy ways once
    passes: int = 4
    teacher_share: float = 0.2
    lm_coef: float = 1.0
    kd_ratio: float = 0.5

    @property
    def n_sampled(self) -> int:
        return self.length - self.prompt_length


def prompts_of(windows: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """The beginnings ``[n, prompt_length]`` of those windows that are long enough."""
    beginnings = windows[:, :prompt_length]
    return beginnings[(beginnings != PAD).all(-1)]


class Samples(NamedTuple):
    """Prompts with their continuations, as a model reads them."""

    ids: torch.Tensor  # [batch, length]
    tokens: torch.Tensor  # [batch, n_sampled]: the continuation alone
    mask: torch.Tensor  # [batch, n_sampled]: all true, as continuations have one length


@dataclass
class Arm:
    """A student, what it learns from, and the optimizer."""

    student: LlamaForCausalLM
    teacher: LlamaForCausalLM
    corpus: Corpus
    config: ArmConfig
    optimizer: TimedOptimizer
    seed: int
    parts: dict[str, float] = field(default_factory=dict)  # seconds

    def __post_init__(self) -> None:
        self.prompts = prompts_of(self.corpus.train, self.config.prompt_length)
        self.generator = torch.Generator().manual_seed(self.seed)

    def text(self) -> Iterator[Batch]:
        return self.corpus.stream(self.config.batch_size, self.seed)

    def sampled(self, model: LlamaForCausalLM, processors: tuple = ()) -> Samples:
        """``rollouts`` continuations of prompts drawn from the training text."""
        config, generator = self.config, self.generator
        rows = torch.randint(len(self.prompts), (config.rollouts,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        ids = sample(model, self.prompts[rows], config.n_sampled, seed, processors)
        tokens = ids[:, -config.n_sampled :]
        return Samples(ids, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def batches(self, passes: int) -> Iterator[torch.Tensor]:
        """Rows of the rollouts, in a new order every time."""
        for _ in range(passes):
            order = torch.randperm(self.config.rollouts, generator=self.generator)
            yield from order.split(self.config.batch_size)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return continuation_logits(self.student, ids, self.config.n_sampled)

    @torch.no_grad()
    def teacher_logits(self, ids: torch.Tensor) -> torch.Tensor:
        return continuation_logits(self.teacher, ids, self.config.n_sampled)

    @torch.no_grad()
    def teacher_on_text(self, batch: Batch) -> torch.Tensor:
        return logits_of(self.teacher, batch)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens within to the seconds of that part."""
        start = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def step(self, loss: torch.Tensor) -> float:
        loss.backward()
        self.optimizer.step()
        return loss.item()


def supervised(arm: Arm) -> Iterator[float]:
    """SFT: cross-entropy with the text."""
    for batch in arm.text():
        logits = logits_of(arm.student, batch)
        yield arm.step(distillation_loss(logits, None, labels=batch.labels, hard_label_weight=1.0))


def soft_cross_entropy(arm: Arm) -> Iterator[float]:
    """The teacher's whole distribution on the text: what MiniLLM's ``finetune.py`` calls KD."""
    for batch in arm.text():
        logits, teacher_logits = logits_of(arm.student, batch), arm.teacher_on_text(batch)
        yield arm.step(distillation_loss(logits, teacher_logits, loss_mask=batch.loss_mask))


def sequence_level(arm: Arm) -> Iterator[float]:
    """SFT on what the teacher samples (Kim and Rush, arXiv:1606.07947)."""
    while True:
        samples = arm.sampled(arm.teacher)
        for rows in arm.batches(arm.config.passes):
            logits = arm.logits(samples.ids[rows])
            labels = samples.tokens[rows]
            yield arm.step(distillation_loss(logits, None, labels=labels, hard_label_weight=1.0))


def whole_vocabulary(arm: Arm) -> Iterator[float]:
    """Reverse KL over the vocabulary at every position of what the student sampled."""
    while True:
        samples = arm.sampled(arm.student)
        for rows in arm.batches(1):
            ids, tokens, mask = (part[rows] for part in samples)
            logits, teacher_logits = arm.logits(ids), arm.teacher_logits(ids)
            yield arm.step(on_policy.loss(logits, teacher_logits, tokens, mask).loss)


def sampled_token(arm: Arm) -> Iterator[float]:
    """Policy gradient of log(q/p) of the tokens that the student sampled, which has changed a little
    before it comes to the last of them."""
    while True:
        samples = arm.sampled(arm.student)
        with torch.no_grad():
            behaviour = token_log_probs(arm.logits(samples.ids), samples.tokens)
        for rows in arm.batches(1):
            ids, tokens, mask = (part[rows] for part in samples)
            logits, teacher_logits = arm.logits(ids), arm.teacher_logits(ids)
            found = on_policy.loss(
                logits, teacher_logits, tokens, mask, objective="sampled",
                behaviour_log_probs=behaviour[rows], importance="truncate",
            )  # fmt: skip
            yield arm.step(found.loss)


def mini_llm(arm: Arm) -> Iterator[float]:
    """Policy gradient of the sequences' reverse KL, with the loss on plain text beside it.

    Both losses are differentiated to leaves that share the logits' memory, and the model from there: the
    same gradient at no cost, and each part's time can be told.
    """
    config, text = arm.config, arm.text()
    while True:
        with arm.part("sampling, both models"):
            mixed = minillm.MixedSampling(arm.teacher, teacher_share=config.teacher_share)
            samples = arm.sampled(arm.student, (mixed,))
        with arm.part("samples read by both models"), torch.no_grad():
            logits, teacher_logits = arm.logits(samples.ids), arm.teacher_logits(samples.ids)
        with arm.part("scores, advantages, weights"):
            old = token_log_probs(logits, samples.tokens)
            of_teacher = token_log_probs(teacher_logits, samples.tokens)
            advantages = minillm.advantages(of_teacher, old, samples.mask)
            weights = minillm.importance_weights(old, mixed.log_probs(samples.ids), samples.mask)
        for rows in arm.batches(config.passes):
            ids, tokens, mask = (part[rows] for part in samples)
            batch = next(text)
            with arm.part("student forward"):
                outputs = arm.logits(ids), logits_of(arm.student, batch)
            with arm.part("teacher on text"):
                of_text = arm.teacher_on_text(batch)
            on_samples, on_text = (x.detach().requires_grad_() for x in outputs)
            with arm.part("MiniLLM's loss, forward + backward"):
                found = minillm.loss(
                    on_samples, teacher_logits[rows], tokens, mask,
                    advantages=advantages[rows], old_log_probs=old[rows], weights=weights[rows],
                )  # fmt: skip
                found.loss.backward()
            with arm.part("plain-text loss, forward + backward"):
                plain = minillm.pretraining_loss(
                    on_text, of_text, batch.labels, lm_coef=config.lm_coef, kd_ratio=config.kd_ratio
                )
                plain.loss.backward()
            with arm.part("student backward"):
                torch.autograd.backward(outputs, [on_samples.grad, on_text.grad])
            with arm.part("optimizer"):
                arm.optimizer.step()
            yield (found.loss + plain.loss).item()


class Way(NamedTuple):
    """How to train on, and at which rate: what ``minillm.py --tune`` chose for it."""

    way: Callable[[Arm], Iterator[float]]
    learning_rate: float


ARMS = {
    MINILLM: Way(mini_llm, 1e-2),
    SAMPLED: Way(sampled_token, 1e-3),
    FULL: Way(whole_vocabulary, 1e-2),
    SOFT: Way(soft_cross_entropy, 3e-2),
    SEQUENCE: Way(sequence_level, 1e-3),
    SFT: Way(supervised, 1e-3),
}
