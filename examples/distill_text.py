"""Distil a small language model on real text, with the eager loss and with distill_ops.

    python examples/distill_text.py

A Llama-style teacher is trained from scratch on the sources and documentation of the Python
standard library, on the CPU. Two students that start from the same weights then learn from it on
the same batches with MiniLLM's fine-tuning objective: one with the loss in eager PyTorch, the other
with ``distill_ops.distillation_loss``. Their loss curves must agree within 1e-3 at every step, or
the program fails. Curves, times and memory go to ``distill_text.json`` and ``distill_text.png``
under ``--out``. Needs transformers, tokenizers, matplotlib and rich.
"""

import argparse
import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from corpus import Batch, Corpus, load_corpus
from models import Optimizer, held_out_loss, logits_of, make_model
from report import EAGER, OURS, console, draw, relative_differences, show, surroundings
from rich.progress import track
from transformers import LlamaForCausalLM

import distill_ops

TOLERANCE = 1e-3  # largest relative difference of the two losses at any step
KD_RATIO = 0.5  # share of the distillation term, by MiniLLM's name
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    """Sizes for two CPU cores; a vocabulary large enough for the loss to be a real share of a step."""

    teacher_steps: int
    steps: int
    seed: int
    vocab_size: int = 16384
    length: int = 128
    batch_size: int = 8
    teacher_hidden: int = 256
    teacher_layers: int = 4
    student_hidden: int = 128
    student_layers: int = 2
    teacher_learning_rate: float = 3e-3
    # Two losses round differently, and training amplifies it: with noise of 1e-7 in the gradient the
    # curves part by up to 1e-3 at a rate of 3e-3 and by 2e-6 at 1e-3, so the check needs the latter.
    student_learning_rate: float = 1e-3
    kd_ratio: float = KD_RATIO
    held_out_batches: int = 8


LossFunction = Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor]


def eager_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """MiniLLM's objective as its finetune.py computes it."""
    vocab = student_logits.shape[-1]
    lm_loss = F.cross_entropy(student_logits.float().view(-1, vocab), batch.labels.reshape(-1))
    teacher_probs = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    inf_mask = torch.isinf(student_logits)
    log_probs = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(teacher_probs * log_probs, inf_mask, 0)
    per_token = products.sum(dim=-1)
    distil_loss = -(per_token * batch.loss_mask).sum() / batch.loss_mask.sum()
    return (1 - KD_RATIO) * lm_loss + KD_RATIO * distil_loss


def fused_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """The same in one pass over the logits."""
    return distill_ops.distillation_loss(
        student_logits,
        teacher_logits,
        loss_mask=batch.loss_mask,
        labels=batch.labels,
        hard_label_weight=1 - KD_RATIO,
    )


def train_teacher(corpus: Corpus, config: Config) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """The teacher, trained on hard labels alone, and its held-out loss before and after."""
    model = make_model(config.vocab_size, config.teacher_hidden, config.teacher_layers, config.seed)
    optimizer = Optimizer(model, config.teacher_learning_rate, config.teacher_steps)
    batches = corpus.batches(config.teacher_steps, config.batch_size, config.seed)
    unseen = corpus.held_out_batches(config.held_out_batches, config.batch_size)
    before = held_out_loss(model, unseen)
    for batch in track(batches, "teacher", console=console):
        logits = logits_of(model, batch)
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        optimizer.step()
    return model.requires_grad_(False), {"before": before, "after": held_out_loss(model, unseen)}


def peak_memory_of_loss(
    loss_function: LossFunction, logits: torch.Tensor, teacher_logits: torch.Tensor, batch: Batch
) -> float | None:
    """MiB that the loss and its backward to the logits need above what the process holds before.

    From Linux's high-water mark of resident memory; None on other systems.
    """

    def high_water_mark() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    peak = None
    for _ in range(2):  # the first call also loads code and starts threads: the second counts
        leaf = logits.detach().requires_grad_()
        try:
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # freed memory that is kept would hide what is taken
                libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is held now
            before = high_water_mark()
        except (OSError, TypeError):  # no /proc, and on Windows no CDLL(None)
            return None
        loss_function(leaf, teacher_logits, batch).backward()
        peak = high_water_mark() - before
    return peak


@dataclass
class Student:
    """A model in training with one of the losses, and its records."""

    model: LlamaForCausalLM
    optimizer: Optimizer
    loss_function: LossFunction
    loss_peak_mib: float | None = None
    held_out_before: float = math.nan  # nats a token
    held_out_after: float = math.nan
    losses: list[float] = field(default_factory=list)  # nats a token, one a step
    step_ms: list[float] = field(default_factory=list)
    loss_ms: list[float] = field(default_factory=list)  # forward, and backward to the logits

    def step(self, teacher: LlamaForCausalLM, batch: Batch) -> None:
        """One step of training, timed as a whole and over the loss alone.

        The loss is differentiated to a leaf that shares the logits' memory, and the model from
        there: the same gradient at no cost, and the loss's own time can be told apart.
        """
        start = time.perf_counter()
        with torch.no_grad():
            teacher_logits = logits_of(teacher, batch)
        logits = logits_of(self.model, batch)
        leaf = logits.detach().requires_grad_()

        loss_start = time.perf_counter()
        loss = self.loss_function(leaf, teacher_logits, batch)
        loss.backward()
        loss_end = time.perf_counter()

        logits.backward(leaf.grad)
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.loss_ms.append((loss_end - loss_start) * 1e3)
        self.losses.append(loss.item())

    def record(self) -> dict:
        rest_ms = [step - loss for step, loss in zip(self.step_ms, self.loss_ms, strict=True)]
        return {
            "median_ms": {
                "step": median(self.step_ms),
                "loss": median(self.loss_ms),
                "rest": median(rest_ms),
            },
            "loss_peak_mib": self.loss_peak_mib,
            "held_out_nats": {"before": self.held_out_before, "after": self.held_out_after},
            "losses": self.losses,
        }


def distil(teacher: LlamaForCausalLM, corpus: Corpus, config: Config) -> dict[str, Student]:
    """Train one student with each loss, on the same batches and from the same weights.

    The two take turns on each batch, and in turn go first: whatever slows the machine down for a
    while then slows both.
    """
    students = {}
    for name, loss_function in ((EAGER, eager_loss), (OURS, fused_loss)):
        model = make_model(
            config.vocab_size, config.student_hidden, config.student_layers, config.seed + 1
        )
        optimizer = Optimizer(model, config.student_learning_rate, config.steps)
        students[name] = Student(model, optimizer, loss_function)

    batches = corpus.batches(config.steps, config.batch_size, config.seed + 1)
    unseen = corpus.held_out_batches(config.held_out_batches, config.batch_size)
    for student in students.values():
        student.held_out_before = held_out_loss(student.model, unseen)
        with torch.no_grad():
            logits = logits_of(student.model, batches[0]), logits_of(teacher, batches[0])
        student.loss_peak_mib = peak_memory_of_loss(student.loss_function, *logits, batches[0])

    in_order = list(students.values())
    for batch in track(batches, "students", console=console):
        for student in in_order:
            student.step(teacher, batch)
        in_order.reverse()

    for student in students.values():
        student.held_out_after = held_out_loss(student.model, unseen)
    return students


def agreement(students: dict[str, Student]) -> dict[str, float | int | bool]:
    """The two curves compared at every step."""
    differences = relative_differences(students[EAGER].losses, students[OURS].losses)
    worst = max(differences)
    return {
        "tolerance": TOLERANCE,
        "largest_relative_difference": worst,
        "at_step": differences.index(worst),
        "agree": worst <= TOLERANCE,
    }


def run(config: Config) -> dict:
    """The whole experiment; all that ``distill_text.json`` holds."""
    record = surroundings()
    times = [time.perf_counter()]
    corpus = load_corpus(config.vocab_size, config.length, config.seed)
    facts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in corpus.facts.items())
    console.print(f"corpus: {facts}")
    times.append(time.perf_counter())

    teacher, teacher_held_out = train_teacher(corpus, config)
    times.append(time.perf_counter())

    students = distil(teacher, corpus, config)
    times.append(time.perf_counter())

    stages = ("corpus_and_tokenizer", "teacher", "students")
    spans = (end - start for start, end in pairwise(times))
    return record | {
        "config": asdict(config),
        "corpus": corpus.facts,
        "seconds": dict(zip(stages, spans, strict=True)) | {"total": times[-1] - times[0]},
        "agreement": agreement(students),
        "teacher_held_out_nats": teacher_held_out,
        "logits_mib": config.batch_size * config.length * config.vocab_size * 4 / 2**20,
        "students": {name: student.record() for name, student in students.items()},
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive, help="of each student (default 200)")
    parser.add_argument("--teacher-steps", type=positive, help="of the teacher (default 320)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, help="folder to write to (default examples/results)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="12 steps of each, under a minute, by default written to a temporary folder",
    )
    options = parser.parse_args()
    teacher_steps, steps = (12, 12) if options.quick else (320, 200)
    config = Config(options.teacher_steps or teacher_steps, options.steps or steps, options.seed)
    out = options.out or (Path(tempfile.mkdtemp("_distill_text")) if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)

    record = run(config)
    (out / "distill_text.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, out / "distill_text.png")
    show(record)
    console.print(f"written to {out}")
    found = record["agreement"]
    if not found["agree"]:
        sys.exit(
            f"FAILED: at step {found['at_step']} the losses of the two students differ by "
            f"{found['largest_relative_difference']:.1e} relative, {TOLERANCE:.0e} is allowed"
        )


if __name__ == "__main__":
    main()
