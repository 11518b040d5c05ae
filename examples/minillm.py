"""Train a small language model on its own samples, by MiniLLM and by what one would try instead.

    python examples/minillm.py --seeds 3

A teacher is trained on the sources and documentation of the Python standard library, and a student on
a small part of them, on the CPU. Six ways of training on then start from that student and have the
same number of seconds, in which all counts that a way needs, sampling and the teacher too:

- MiniLLM (arXiv:2306.08543): policy gradient on samples of a mixture of student and teacher, with the
  single-step term, the clipped ratio and the loss on plain text;
- on-policy distillation of the sampled token, and of the whole vocabulary, by reverse KL;
- soft cross-entropy with the teacher on text, sequence-level KD (SFT on the teacher's samples), and
  further SFT.

Each is judged by the reverse KL to the teacher on its own samples, by forward KL and perplexity on
held-out text, and by the entropy of what it samples. All goes to ``minillm.json`` and
``minillm.png`` under ``--out``. Needs transformers, tokenizers, matplotlib and rich.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Corpus, load_corpus
from minillm_arms import ARMS, Arm, ArmConfig, prompts_of, supervised
from minillm_report import BEFORE, TEACHER, draw, show, summary_of
from models import TimedOptimizer, continuation_logits, logits_of, make_model, sample
from report import console, surroundings
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from training import RESULTS, check_tokenizers, positive, train_teacher
from transformers import LlamaForCausalLM

from distill_ops import distillation_metrics

NAME = "minillm"
N_SHOWN = 3  # samples kept of each model
TUNING_SEED = 1000  # of --tune, not among those that are reported
GRID = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates that --tune tries


class Judge:
    """Measures students on held-out text and on their own continuations of held-out prompts.

    Prompts, text and the seed of sampling are the same on every call, so that differences between
    students are less noisy than the values.
    """

    def __init__(self, teacher: LlamaForCausalLM, corpus: Corpus, config: ArmConfig):
        self.teacher, self.config = teacher, config
        prompts = prompts_of(corpus.held_out, config.prompt_length)
        spread = torch.linspace(0, len(prompts) - 1, config.judged_samples).long()
        self.prompts = prompts[spread]
        self.text = corpus.held_out_batches(config.held_out_batches, config.batch_size)
        with torch.no_grad():
            self.teacher_logits = [logits_of(teacher, batch) for batch in self.text]

    @torch.no_grad()
    def on_text(self, student: LlamaForCausalLM) -> dict[str, float]:
        """Means over the tokens of held-out text, in nats, and the perplexity of its labels."""
        forward_kl = cross_entropy = n_tokens = 0
        for batch, teacher_logits in zip(self.text, self.teacher_logits, strict=True):
            logits = logits_of(student, batch)
            found = distillation_metrics(logits, teacher_logits)
            forward_kl += found.forward_kl[batch.loss_mask].sum().item()
            labels = batch.labels.flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            cross_entropy += losses.item()
            n_tokens += int(batch.loss_mask.sum())
        perplexity = math.exp(cross_entropy / n_tokens)
        return {"forward_kl": forward_kl / n_tokens, "perplexity": perplexity}

    @torch.no_grad()
    def on_samples(self, student: LlamaForCausalLM) -> dict[str, float]:
        """Means over the positions of fresh continuations, in nats.

        The standard error is that of the mean over continuations: positions of one are related.
        """
        n_tokens = self.config.n_sampled
        reverse_kls, entropies = [], []
        for i, prompts in enumerate(self.prompts.split(64)):
            ids = sample(student, prompts, n_tokens, seed=self.config.seed + i)
            logits, teacher_logits = (
                continuation_logits(model, ids, n_tokens) for model in (student, self.teacher)
            )
            found = distillation_metrics(logits, teacher_logits)
            reverse_kls.append(found.reverse_kl.mean(-1))
            entropies.append(found.student_entropy.mean(-1))
        reverse_kl = torch.cat(reverse_kls)
        return {
            "reverse_kl": reverse_kl.mean().item(),
            "reverse_kl_standard_error": (reverse_kl.std() / len(reverse_kl) ** 0.5).item(),
            "entropy": torch.cat(entropies).mean().item(),
        }

    def __call__(self, student: LlamaForCausalLM) -> dict[str, float]:
        return self.on_samples(student) | self.on_text(student)

    def samples(self, student: LlamaForCausalLM) -> torch.Tensor:
        prompts = self.prompts[:: max(1, len(self.prompts) // N_SHOWN)][:N_SHOWN]
        return sample(student, prompts, self.config.n_sampled, self.config.seed)


def train(
    name: str,
    arm: Arm,
    way: Callable[[Arm], Iterator[float]],
    seconds: float,
    measure: Callable[[LlamaForCausalLM], dict[str, float]],
    n_measures: int,
) -> list[dict[str, float]]:
    """Take steps for so many seconds, not counting the measurements between and after, which it
    returns. The last step begins before the time is over."""
    clock, n_steps, steps, curve = 0.0, 0, way(arm), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=seconds)
        for i in range(1, n_measures + 1):
            while clock < seconds * i / n_measures:
                arm.optimizer.progress = clock / seconds
                start = time.perf_counter()
                next(steps)
                clock += time.perf_counter() - start
                n_steps += 1
                progress.update(task, completed=min(clock, seconds))
            curve.append({"seconds": clock, "steps": n_steps} | measure(arm.student))
    return curve


def begin(config: ArmConfig) -> tuple[Arm, Judge, dict]:
    """Corpus, teacher and the student by SFT, who judges them, and the record of it."""
    corpus = load_corpus(config.vocab_size, config.length, config.seed, config.max_documents)
    check_tokenizers(corpus, config)
    start = time.perf_counter()
    teacher, _ = train_teacher(corpus, config)
    teacher_seconds = time.perf_counter() - start
    judge = Judge(teacher, corpus, config)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(corpus.train), generator=generator)[: config.student_windows]
    corpus = replace(corpus, train=corpus.train[chosen])
    sizes = config.vocab_size, config.student_hidden, config.student_layers
    student = make_model(*sizes, config.seed + 1)
    optimizer = TimedOptimizer(student, config.sft_learning_rate)
    arm = Arm(student, teacher, corpus, config, optimizer, config.seed + 1)
    curve = train("student by SFT", arm, supervised, config.sft_seconds, judge, 1)
    record = {
        "seed": config.seed,
        "corpus": corpus.facts,
        "parameters": {
            "teacher": sum(p.numel() for p in teacher.parameters()),
            "student": sum(p.numel() for p in student.parameters()),
        },
        TEACHER: {"seconds": teacher_seconds} | judge(teacher),
        BEFORE: curve[-1],
    }
    return arm, judge, record


def train_on(begun: Arm, judge: Judge, name: str, learning_rate: float) -> tuple[Arm, list[dict]]:
    """A copy of the student, trained on in the way of that name, and its measurements."""
    student = copy.deepcopy(begun.student)
    optimizer = TimedOptimizer(student, learning_rate)
    seed = begun.config.seed + 2
    arm = replace(begun, student=student, optimizer=optimizer, seed=seed)
    config = begun.config
    return arm, train(name, arm, ARMS[name].way, config.seconds, judge, config.n_measures)


def run_seed(config: ArmConfig) -> dict:
    """All ways of training on from one student, with samples of each."""
    start = time.perf_counter()
    begun, judge, record = begin(config)
    shown = {TEACHER: judge.samples(begun.teacher), BEFORE: judge.samples(begun.student)}
    arms = {}
    for name, entry in ARMS.items():
        arm, curve = train_on(begun, judge, name, entry.learning_rate)
        arms[name] = [record[BEFORE] | {"seconds": 0.0, "steps": 0}, *curve]
        shown[name] = judge.samples(arm.student)
    decode = begun.corpus.tokenizer.decode_batch
    prompt = config.prompt_length
    texts = {name: decode(ids[:, prompt:].tolist()) for name, ids in shown.items()}
    texts["prompt"] = decode(shown[BEFORE][:, :prompt].tolist())
    seconds = time.perf_counter() - start
    return record | {"arms": arms, "samples": texts, "total_seconds": seconds}


def tune(config: ArmConfig, names: Iterable[str], known: dict) -> Iterator[dict]:
    """Ways of training on at every rate of the grid, from the student of a seed of its own.

    Each gets the rate with the lowest reverse KL on its own samples, the measure by which all are
    compared, be it the way's own objective or not. Gives what is known after every way, beside what
    was ``known`` of others.
    """
    begun, judge, record = begin(replace(config, n_measures=1))
    found, chosen, tried = (dict(known.get(key, {})) for key in ("found", "chosen", "tried_for"))
    for name in names:
        ends = {rate: train_on(begun, judge, name, rate)[1][-1] for rate in GRID}
        chosen[name] = min(GRID, key=lambda rate: ends[rate]["reverse_kl"])
        found[name] = {str(rate): end for rate, end in ends.items()}
        tried[name] = {"sft_seconds": config.sft_seconds, "seconds": config.seconds}
        yield record | {"grid": GRID, "found": found, "chosen": chosen, "tried_for": tried}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=1, help="runs, of seeds 0, 1, ...")
    parser.add_argument(
        "--seconds", type=float, help="of SFT and of every way of training on (default 40)"
    )
    parser.add_argument(
        "--student-windows", type=positive, help="of text for the student (default 4000)"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default examples/results)")
    parser.add_argument(
        "--tune", nargs="*", choices=ARMS, metavar="WAY",
        help=f"try learning rates on seed {TUNING_SEED} instead: of all ways, or of those named, the "
        f"others being left as they are in the file",
    )  # fmt: skip
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and a fraction of a second of each, to see that it runs; by default "
        "written to a temporary folder",
    )
    options = parser.parse_args(arguments)
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        parser.error(f"--seconds must be positive, got {options.seconds}")
    options.out = options.out or (Path(tempfile.mkdtemp(f"_{NAME}")) if options.quick else RESULTS)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def config_of(options: argparse.Namespace, seed: int) -> ArmConfig:
    config = ArmConfig(teacher_steps=1600, seed=seed, held_out_batches=8)
    if options.quick:
        config = replace(
            config, teacher_steps=2, held_out_batches=1, vocab_size=512, max_documents=20,
            length=24, batch_size=4, rollouts=4, passes=1, judged_samples=4, n_measures=1,
            teacher_hidden=64, teacher_layers=1, student_hidden=32, student_layers=1,
            sft_seconds=0.02, seconds=0.02,
        )  # fmt: skip
    if options.seconds is not None:
        config = replace(config, seconds=options.seconds, sft_seconds=options.seconds)
    if options.student_windows is not None:
        config = replace(config, student_windows=options.student_windows)
    return config


def main() -> None:
    options = options_of()
    record = surroundings()
    if options.tune is not None:
        config = config_of(options, TUNING_SEED)
        path = options.out / f"{NAME}_tuning.json"
        known = json.loads(path.read_text()) if options.tune and path.exists() else {}
        for found in tune(config, options.tune or ARMS, known):
            record |= {"config": asdict(config)} | found
            path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"chosen: {record['chosen']}\nwritten to {path}")
        return
    record |= {"config": asdict(config_of(options, 0)), "seeds": []}
    record["config"]["learning_rates"] = {name: arm.learning_rate for name, arm in ARMS.items()}
    for seed in range(options.seeds):
        console.rule(f"seed {seed}")
        record["seeds"].append(run_seed(config_of(options, seed)))
        record["summary"] = summary_of(record["seeds"])  # after every seed: an end loses one
        (options.out / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.out / f"{NAME}.png")
    show(record)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
