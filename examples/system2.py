"""System 2 distillation from end to end: what scratchpads agree on becomes a direct answer.

    python examples/system2.py --seeds 3

A small transformer, trained from scratch on questions with a scratchpad, is System 2; the same model,
trained further on a few labelled direct answers until its validation stops rising, is System 1. On
questions without labels System 2 is sampled, curated (``distill_ops.methods.system2.curate``), and
System 1 is trained on the answers alone with the fused hard-label loss. Beside it: the same training
on System 2's first answers without a filter, and on the true answers. Tasks: last letters, coin flip,
and as a negative control arithmetic, where arXiv:2407.06023 found no gain. Printed, and written to
``system2.json`` and ``system2.png`` under ``--out``. Needs transformers, matplotlib and rich.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from models import make_model
from report import console, surroundings
from rich.progress import Progress
from system2_model import DIRECT, batches, direct_accuracy, records_of, texts_of, train
from system2_report import draw, show
from system2_tasks import (
    ANSWER,
    THINK,
    Example,
    Task,
    Vocabulary,
    arithmetic,
    coin_flip,
    last_letters,
)
from training import RESULTS, positive
from transformers import LlamaForCausalLM

from distill_ops.methods.system2 import Method, Record, Step, curate


def stated(text: str) -> str | None:
    """The answer that a scratchpad ends with; None where it does not come to one."""
    _, found, answer = text.rpartition(ANSWER)
    return answer.strip() or None if found else None


THOUGHT = f"{{question}} {THINK}"
SCRATCHPAD = Method("scratchpad", (Step("scratchpad", THOUGHT),), parse=stated)
CONTROL, N_STAGES = "arithmetic", 6


@dataclass(frozen=True)
class Sizes:
    """Of one task: two CPU cores, a minute or two."""

    hidden: int = 64
    layers: int = 2
    spread: float = 0.08  # of untrained weights; with 0.02 so small a model learns slowly
    demonstrations: int = 20000  # with a scratchpad
    slips: float = 0.08  # the probability that a step of those is wrong
    base_steps: int = 500
    labelled: int = 50  # direct answers
    unlabelled: int = 4000
    student_steps: int = 1000
    validation: int = 200
    test: int = 500
    batch_size: int = 64
    learning_rate: float = 4e-3
    student_learning_rate: float = 3e-3
    n: int = 8  # samples
    min_agreement: float = 0.5
    temperature: float = 1.0


TASKS: dict[str, tuple[Task, Sizes]] = {
    task.name: (task, sizes)
    for task, sizes in (
        (last_letters(), Sizes()),
        (coin_flip(), Sizes(labelled=24, base_steps=150, unlabelled=10000)),
        (arithmetic(), Sizes(base_steps=800, unlabelled=10000)),
    )
}
QUICK = {
    "demonstrations": 200, "base_steps": 8, "labelled": 8, "unlabelled": 12, "student_steps": 4,
    "validation": 20, "test": 20, "batch_size": 8, "min_agreement": 0.0,
}  # fmt: skip


class Experiment:
    """One task with one seed."""

    def __init__(self, task: Task, sizes: Sizes, seed: int, tell: Callable[[str], None]):
        self.task, self.sizes, self.seed, self.tell = task, sizes, seed, tell
        self.words = Vocabulary(task)
        chance, seen = random.Random(seed), set()
        self.test, self.validation, self.few, self.unlabelled = (
            task.examples(n, chance, seen)
            for n in (sizes.test, sizes.validation, sizes.labelled, sizes.unlabelled)
        )
        self.demonstrations = task.examples(sizes.demonstrations, chance, seen, sizes.slips)

    def run(self) -> dict:
        """All that is reported of it."""
        start, sizes = time.perf_counter(), self.sizes
        self.tell("System 2")
        system2 = make_model(len(self.words), sizes.hidden, sizes.layers, self.seed, sizes.spread)
        reasoned = [(x.question, f"{x.steps} {ANSWER} {x.concluded}") for x in self.demonstrations]
        data = batches(records_of(reasoned), self.words, THOUGHT, sizes.batch_size, self.seed)
        train(system2, data, sizes.base_steps, sizes.learning_rate)
        self.tell("System 1")
        system1, of_system1 = self.direct(system2, answers_of(self.few), patience=8)
        self.tell("samples")
        curation, filtered, unfiltered, of_system2 = self.sampled(system2)
        students = {}
        for name, records in (
            ("filtered", filtered), ("unfiltered", unfiltered), ("true", answers_of(self.unlabelled))
        ):  # fmt: skip
            self.tell(f"{name} answers")
            _, found = self.direct(system1, records)
            students[name] = found | {"precision": self.precision(records)}
        return {
            "seed": self.seed,
            "system1": of_system1,
            "system2": of_system2,
            "curation": curation,
            "students": students,
            "parameters": sum(weight.numel() for weight in system2.parameters()),
            "seconds": time.perf_counter() - start,
        }

    def direct(
        self, model: LlamaForCausalLM, records: Sequence[Record], patience: int | None = None
    ) -> tuple[LlamaForCausalLM, dict]:
        """The best, by validation, of a copy of a model that is trained to answer at once.

        Without a record it stays what it is.
        """
        sizes, student = self.sizes, copy.deepcopy(model)
        best, curve = train(
            student,
            batches(records, self.words, DIRECT, sizes.batch_size, self.seed),
            sizes.student_steps if records else 0,
            sizes.student_learning_rate,
            lambda model: direct_accuracy(model, self.words, self.validation),
            patience=patience,
        )
        return best, {
            "accuracy": direct_accuracy(student, self.words, self.test),
            "best": direct_accuracy(best, self.words, self.test),
            "records": len(records),
            "tokens": len(self.words.encode(self.test[0].answer)) + 1,
            "validation": curve,
        }

    def sampled(self, system2: LlamaForCausalLM) -> tuple[dict, list[Record], list[Record], dict]:
        """Curated, and without a filter: one sample a question, whatever it says; and System 2 itself."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(self.seed)
        most = max(len(x.steps.split()) + len(x.answer.split()) for x in self.demonstrations) + 2

        def sample_fn(prompts: list[str]) -> list[str]:
            return texts_of(system2, self.words, prompts, most, sizes.temperature, generator)

        questions = [x.question for x in self.unlabelled]
        curation = curate(
            questions, SCRATCHPAD, sample_fn, n=sizes.n, perturbations=self.task.perturbations,
            min_agreement=sizes.min_agreement, batch_size=1024,
        )  # fmt: skip
        filtered = [record for record in curation if record.kept]
        once = curate(questions, SCRATCHPAD, sample_fn, n=1, min_agreement=0, batch_size=1024)
        unfiltered = [record for record in once if record.kept]
        texts = sample_fn([THOUGHT.format(question=x.question) for x in self.test])
        right = sum(stated(text) == x.answer for text, x in zip(texts, self.test, strict=True))
        return (
            {
                "yield": curation.summary.share,
                "reasons": dict(curation.summary.reasons),
                "samples": sizes.n * (1 + len(self.task.perturbations)),
            },
            filtered,
            unfiltered,
            {
                "accuracy": right / len(self.test),
                "tokens": sum(len(text.split()) + 1 for text in texts) / len(texts),
            },
        )

    def precision(self, records: Sequence[Record]) -> float | None:
        """The share of targets that are right; None of no record."""
        right = sum(record.target == self.unlabelled[record.index].answer for record in records)
        return right / len(records) if records else None


def answers_of(examples: Sequence[Example]) -> list[Record]:
    return records_of([(x.question, x.answer) for x in examples])


def experiment(seeds: Sequence[int], quick: bool) -> Iterator[dict]:
    """All that ``system2.json`` holds, once more after each seed."""
    start = time.perf_counter()
    chosen = {
        name: (task, replace(sizes, **QUICK) if quick else sizes)
        for name, (task, sizes) in TASKS.items()
    }
    runs: dict[str, list[dict]] = {name: [] for name in chosen}
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(seeds) * len(chosen) * N_STAGES)

        def tell(text: str) -> None:
            progress.update(bar, advance=1, description=text)

        for seed in seeds:
            for name, (task, sizes) in chosen.items():
                said = f"seed {seed}, {name}: {{}}".format
                found = Experiment(task, sizes, seed, lambda x, said=said: tell(said(x))).run()
                runs[name].append(found)
            yield surroundings(("torch", "transformers", "distill_ops")) | {
                "seconds": time.perf_counter() - start,
                "tasks": {
                    name: {
                        "about": task.about,
                        "control": name == CONTROL,
                        "sizes": asdict(sizes),
                        "seeds": runs[name],
                    }
                    for name, (task, sizes) in chosen.items()
                },
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=1, help="so many (default 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--out", type=Path, help="folder to write to (default examples/results)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps of each training, a few seconds, and models that have learned nothing; by "
        "default written to a temporary folder",
    )
    options = parser.parse_args()
    out = options.out or (Path(tempfile.mkdtemp("_system2")) if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for record in experiment(seeds, options.quick):
        (out / "system2.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, out / "system2.png")
    show(record)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
