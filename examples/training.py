"""What the examples on real text have in common: sizes, the teacher, a student in training."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Batch, Corpus
from models import Optimizer, held_out_loss, logits_of, make_model
from report import console
from rich.progress import track
from transformers import LlamaForCausalLM

from distill_ops import LossComponents, TeacherTopK
from distill_ops.methods.tokenizers import check_same_tokenizer

Target = torch.Tensor | TeacherTopK  # the teacher's logits [batch, length, vocab], or some of them
RESULTS = Path(__file__).parent / "results"
LossFunction = Callable[[torch.Tensor, Target, Batch], LossComponents]  # of the student's logits


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """For two CPU cores; a vocabulary large enough for the loss to be a real share of a step."""

    teacher_steps: int
    seed: int
    held_out_batches: int
    vocab_size: int = 16384
    length: int = 128
    batch_size: int = 8
    teacher_hidden: int = 256
    teacher_layers: int = 4
    student_hidden: int = 128
    student_layers: int = 2
    teacher_learning_rate: float = 3e-3


@dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Of students that take so many steps."""

    steps: int
    # Two losses round differently, and training amplifies it: with noise of 1e-7 in the gradient the
    # curves part by up to 1e-3 at a rate of 3e-3 and by 2e-6 at 1e-3, so the check needs the latter.
    student_learning_rate: float = 1e-3


def check_tokenizers(corpus: Corpus, config: Sizes) -> None:
    """Before anything is trained: column j of both models' logits must be the same token.

    These two share the corpus's tokenizer, so only the width of their logits could be wrong; of models
    that come with a tokenizer each, both are passed.
    """
    tokenizers = corpus.tokenizer, corpus.tokenizer
    columns = {"student_columns": config.vocab_size, "teacher_columns": config.vocab_size}
    report = check_same_tokenizer(*tokenizers, **columns).raise_if_unusable()
    console.print("tokenizers:", "\n".join(report.lines()), markup=False)


def train_teacher(
    corpus: Corpus, config: Sizes, tied: bool = True
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """The teacher, trained on hard labels alone, and its held-out loss before and after."""
    sizes = config.vocab_size, config.teacher_hidden, config.teacher_layers
    model = make_model(*sizes, config.seed, tied=tied)
    optimizer = Optimizer(model, config.teacher_learning_rate, config.teacher_steps)
    batches = corpus.batches(config.teacher_steps, config.batch_size, config.seed)
    unseen = corpus.held_out_batches(config.held_out_batches, config.batch_size)
    before = held_out_loss(model, unseen)
    for batch in track(batches, "teacher", console=console):
        logits = logits_of(model, batch)
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        optimizer.step()
    return model.requires_grad_(False), {"before": before, "after": held_out_loss(model, unseen)}


@dataclass
class Student:
    """A model in training with one of the losses, and its records."""

    model: LlamaForCausalLM
    optimizer: Optimizer
    ask_teacher: Callable[[Batch], Target]
    loss_function: LossFunction
    held_out: dict[int, float] = field(default_factory=dict)  # nats a token, after so many steps
    losses: list[float] = field(default_factory=list)  # nats a token, one a step
    divergences: list[float] = field(default_factory=list)  # the part of it that is the teacher's
    step_ms: list[float] = field(default_factory=list)
    teacher_ms: list[float] = field(default_factory=list)  # getting what the loss compares with
    loss_ms: list[float] = field(default_factory=list)  # forward, and backward to the logits

    @classmethod
    def begin(
        cls, config: Config, ask_teacher: Callable[[Batch], Target], loss_function: LossFunction
    ) -> "Student":
        """Untrained, with the same weights on every call."""
        sizes = config.vocab_size, config.student_hidden, config.student_layers
        model = make_model(*sizes, config.seed + 1)
        optimizer = Optimizer(model, config.student_learning_rate, config.steps)
        return cls(model, optimizer, ask_teacher, loss_function)

    def step(self, batch: Batch) -> None:
        """One step of training, timed as a whole, over the teacher and over the loss alone.

        The loss is differentiated to a leaf that shares the logits' memory, and the model from
        there: the same gradient at no cost, and the loss's own time can be told apart.
        """
        start = time.perf_counter()
        with torch.no_grad():
            target = self.ask_teacher(batch)
        teacher_end = time.perf_counter()
        logits = logits_of(self.model, batch)
        leaf = logits.detach().requires_grad_()

        loss_start = time.perf_counter()
        loss, divergence, _ = self.loss_function(leaf, target, batch)
        loss.backward()
        loss_end = time.perf_counter()

        logits.backward(leaf.grad)
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.teacher_ms.append((teacher_end - start) * 1e3)
        self.loss_ms.append((loss_end - loss_start) * 1e3)
        self.losses.append(loss.item())
        self.divergences.append(divergence.item())


def train_in_turn(
    students: Iterable[Student], batches: list[Batch], held_out: list[Batch], measure_every: int
) -> None:
    """Train on the same batches, with the held-out loss before, at intervals and after.

    The students take turns on each batch, and in turn go first: whatever slows the machine down for
    a while then slows them all.
    """
    in_order = list(students)

    def measure(n_steps: int) -> None:
        for student in in_order:
            student.held_out[n_steps] = held_out_loss(student.model, held_out)

    measure(0)
    for n_steps, batch in enumerate(track(batches, "students", console=console), 1):
        for student in in_order:
            student.step(batch)
        in_order.reverse()
        if n_steps % measure_every == 0 or n_steps == len(batches):
            measure(n_steps)


def options_of(
    description: str, name: str, *, teacher_steps: int, steps: int
) -> argparse.Namespace:
    """The command line, and what follows from it; the folder ``out`` exists."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive, help=f"of each student (default {steps})")
    parser.add_argument(
        "--teacher-steps", type=positive, help=f"of the teacher (default {teacher_steps})"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, help="folder to write to (default examples/results)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="12 steps of each and less held-out text, under a minute; by default written to a "
        "temporary folder",
    )
    options = parser.parse_args()
    if options.quick:
        teacher_steps = steps = 12
    options.teacher_steps = options.teacher_steps or teacher_steps
    options.steps = options.steps or steps
    options.held_out_batches = 2 if options.quick else 8
    options.out = options.out or (Path(tempfile.mkdtemp(f"_{name}")) if options.quick else RESULTS)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def config_from(options: argparse.Namespace, kind: type[Sizes] = Config) -> Sizes:
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind) if f.name in options})


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
