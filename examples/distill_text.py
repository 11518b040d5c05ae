"""Distil a small language model on real text, with the eager loss and with distill_ops.

    python examples/distill_text.py

A Llama-style teacher is trained from scratch on the sources and documentation of the Python
standard library, on the CPU. Two students that start from the same weights then learn from it on
the same batches with MiniLLM's fine-tuning objective: one with the loss in eager PyTorch, the other
with ``distill_ops.distillation_loss``. Their loss curves must agree within 1e-3 at every step, or
the program fails. Curves, times and memory go to ``distill_text.json`` and ``distill_text.png``
under ``--out``. Needs transformers, tokenizers, matplotlib and rich.
"""

import ctypes
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from corpus import Batch, Corpus, load_corpus
from models import logits_of
from report import EAGER, OURS, console, draw, relative_differences, show, surroundings
from training import (
    Config,
    LossFunction,
    Student,
    check_tokenizers,
    config_from,
    options_of,
    train_in_turn,
    train_teacher,
)
from transformers import LlamaForCausalLM

import distill_ops
from distill_ops import LossComponents

TOLERANCE = 1e-3  # largest relative difference of the two losses at any step
KD_RATIO = 0.5  # share of the distillation term, by MiniLLM's name


def eager_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, batch: Batch
) -> LossComponents:
    """MiniLLM's objective as its finetune.py computes it."""
    vocab = student_logits.shape[-1]
    lm_loss = F.cross_entropy(student_logits.float().view(-1, vocab), batch.labels.reshape(-1))
    teacher_probs = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    inf_mask = torch.isinf(student_logits)
    log_probs = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(teacher_probs * log_probs, inf_mask, 0)
    per_token = products.sum(dim=-1)
    distil_loss = -(per_token * batch.loss_mask).sum() / batch.loss_mask.sum()
    loss = (1 - KD_RATIO) * lm_loss + KD_RATIO * distil_loss
    return LossComponents(loss, distil_loss.detach(), lm_loss.detach())


def fused_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, batch: Batch
) -> LossComponents:
    """The same in one pass over the logits."""
    return distill_ops.distillation_loss(
        student_logits,
        teacher_logits,
        loss_mask=batch.loss_mask,
        labels=batch.labels,
        hard_label_weight=1 - KD_RATIO,
        return_components=True,
    )


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
        loss_function(leaf, teacher_logits, batch).loss.backward()
        peak = high_water_mark() - before
    return peak


def distil(
    teacher: LlamaForCausalLM, corpus: Corpus, config: Config
) -> tuple[dict[str, Student], dict[str, float | None]]:
    """A student trained with each loss, and the MiB that each loss takes."""
    batches = corpus.batches(config.steps, config.batch_size, config.seed + 1)
    held_out = corpus.held_out_batches(config.held_out_batches, config.batch_size)
    students, peaks = {}, {}
    for name, loss_function in ((EAGER, eager_loss), (OURS, fused_loss)):
        student = Student.begin(config, partial(logits_of, teacher), loss_function)
        with torch.no_grad():
            logits = logits_of(student.model, batches[0]), logits_of(teacher, batches[0])
        students[name] = student
        peaks[name] = peak_memory_of_loss(loss_function, *logits, batches[0])
    train_in_turn(students.values(), batches, held_out, measure_every=config.steps)
    return students, peaks


def record_of(student: Student, loss_peak_mib: float | None) -> dict:
    rest_ms = [step - loss for step, loss in zip(student.step_ms, student.loss_ms, strict=True)]
    before, after = student.held_out.values()
    return {
        "median_ms": {
            "step": median(student.step_ms),
            "loss": median(student.loss_ms),
            "rest": median(rest_ms),
        },
        "loss_peak_mib": loss_peak_mib,
        "held_out_nats": {"before": before, "after": after},
        "losses": student.losses,
    }


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
    check_tokenizers(corpus, config)
    times.append(time.perf_counter())

    teacher, teacher_held_out = train_teacher(corpus, config)
    times.append(time.perf_counter())

    students, peaks = distil(teacher, corpus, config)
    times.append(time.perf_counter())

    stages = ("corpus_and_tokenizer", "teacher", "students")
    spans = (end - start for start, end in pairwise(times))
    return record | {
        "config": asdict(config) | {"kd_ratio": KD_RATIO},
        "corpus": corpus.facts,
        "seconds": dict(zip(stages, spans, strict=True)) | {"total": times[-1] - times[0]},
        "agreement": agreement(students),
        "teacher_held_out_nats": teacher_held_out,
        "logits_mib": config.batch_size * config.length * config.vocab_size * 4 / 2**20,
        "students": {name: record_of(student, peaks[name]) for name, student in students.items()},
    }


def main() -> None:
    options = options_of(__doc__, "distill_text", teacher_steps=320, steps=200)
    config, out = config_from(options), options.out
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
