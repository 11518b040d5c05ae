"""What a rollout of MiniLLM and the updates on it take, part by part.

    python examples/minillm_parts.py --page docs/examples.md

Takes the way of training of ``minillm.py`` with its models, untrained: what they have learned does not
change their time. Writes ``minillm_parts.json`` under ``--out``, and the table into the page.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import minillm
from corpus import load_corpus
from minillm_arms import ARMS, MINILLM, Arm
from models import TimedOptimizer, make_model
from report import console, in_page, surroundings
from rich.progress import track
from rich.table import Table
from training import RESULTS, positive

BEGIN, END = "<!-- minillm-parts:begin -->", "<!-- minillm-parts:end -->"
HEADINGS = ("part of a step", "ms", "share")


def measure(config: minillm.ArmConfig, n_rollouts: int) -> dict:
    """Milliseconds a step of every part, over so many rollouts after a first one that is not counted."""
    corpus = load_corpus(config.vocab_size, config.length, config.seed, config.max_documents)
    student, teacher = (
        make_model(config.vocab_size, hidden, layers, config.seed)
        for hidden, layers in (
            (config.student_hidden, config.student_layers),
            (config.teacher_hidden, config.teacher_layers),
        )
    )
    optimizer = TimedOptimizer(student, ARMS[MINILLM].learning_rate)
    arm = Arm(student, teacher.requires_grad_(False), corpus, config, optimizer, config.seed)
    steps = ARMS[MINILLM].way(arm)
    a_rollout = config.passes * -(-config.rollouts // config.batch_size)
    for _ in range(a_rollout):
        next(steps)
    arm.parts.clear()
    for _ in track(range(n_rollouts * a_rollout), "steps", console=console):
        next(steps)
    n_steps = n_rollouts * a_rollout
    return {
        "steps": n_steps,
        "steps_a_rollout": a_rollout,
        "ms": {name: seconds / n_steps * 1e3 for name, seconds in arm.parts.items()},
    }


def rows_of(record: dict) -> list[tuple[str, str, str]]:
    total = sum(record["ms"].values())
    parts = [(name, f"{ms:.1f}", f"{ms / total:.0%}") for name, ms in record["ms"].items()]
    return [*parts, ("a step", f"{total:.1f}", "100%")]


def block_of(record: dict) -> str:
    rows = [HEADINGS, ("---", "---:", "---:"), *rows_of(record)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    machine, versions = record["machine"], record["versions"]
    return (
        f"A step of MiniLLM, a rollout shared by its {record['steps_a_rollout']} steps; mean of "
        f"{record['steps']}:\n\n{table}\n\n"
        f"`{record['command']}`, {machine['torch_threads']} threads of {machine['cpu']}, torch "
        f"{versions['torch']}, {record['date'][:10]}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=positive, default=8, help="to measure (default 8)")
    parser.add_argument("--out", type=Path, help="folder to write to (default examples/results)")
    parser.add_argument("--page", type=Path, help="that has the two markers")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    options = parser.parse_args()
    out = options.out or (Path(tempfile.mkdtemp("_minillm_parts")) if options.quick else RESULTS)
    arguments = ["--out", str(out), *(["--quick"] if options.quick else [])]
    config = minillm.config_of(minillm.options_of(arguments), seed=0)
    record = surroundings() | {"config": asdict(config)} | measure(config, options.rollouts)
    (out / "minillm_parts.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table(*HEADINGS)
    for row in rows_of(record):
        table.add_row(*row)
    console.print(table)
    if options.page:
        options.page.write_text(in_page(options.page.read_text(), block_of(record), BEGIN, END))


if __name__ == "__main__":
    main()
