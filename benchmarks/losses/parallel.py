"""``python -m benchmarks.parallel``: losses over a vocabulary that ranks split, gloo processes of one
thread each on this machine. Forward + backward.

A round is every provider once, after a barrier; its time is the slowest rank's. "One process" has the
whole vocabulary and one thread, while the others wait. Every provider is first checked on a few tokens
against the reference in float64. Bytes are those that a rank hands to its collectives. Freed memory stays with
the processes (glibc's MALLOC_ variables): fetching it anew from the system would be half of some steps.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

from distill_ops import reference

from ..core.machine import RESULTS, describe, machine_line
from ..core.markdown import markdown_table
from ..core.records import OURS, Measured, group_by_case, load, save
from ..core.screen import make_console, make_table, number
from ..core.timing import Times
from .parallel_providers import HARD_LABEL, PROVIDERS, Part, Provider, count_torch_parallel

RECORDS = "vocab-parallel-cpu.json"  # of a full run
LOSSES = ("soft_cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", HARD_LABEL)
ONE, TOLERANCE, CHECKED_TOKENS = "one_process", 1e-4, 8


@dataclass(frozen=True, kw_only=True)
class ParallelRecord(Measured):
    """A provider on a loss."""

    ranks: int
    times_ours: float | None = None  # its median over ours
    collectives: int | None = None  # of a step
    bytes_a_token: float | None = None  # that a rank hands to them; None: not known
    error: float | None = None  # the largest, relative, of value and gradient


def make_part(tokens: int, vocab: int, mesh) -> Part:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(tokens, vocab, generator=generator) for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    width = vocab // mesh.size()
    offset = mesh.get_local_rank() * width
    columns = slice(offset, offset + width)
    parts = (x[:, columns].contiguous() for x in (student, teacher))
    part = Part(*parts, labels, student, teacher, offset, mesh)
    part.student.requires_grad_()
    part.whole_student.requires_grad_()
    return part


def leaf_of(provider: Provider, part: Part) -> torch.Tensor:
    return part.whole_student if provider.name == ONE else part.student


def step(provider: Provider, loss: str, part: Part) -> torch.Tensor:
    """Forward + backward."""
    leaf_of(provider, part).grad = None
    if provider.name == "torch":
        with loss_parallel():  # around the backward too
            found = provider.function(loss, part)
            found.backward()
        return found.to_local() if hasattr(found, "to_local") else found
    found = provider.function(loss, part)
    found.backward()
    return found


def error_of(provider: Provider, loss: str, part: Part) -> float:
    """The largest relative error of value and gradient, over the ranks."""
    wide = part.whole_student.detach().double().requires_grad_()
    if loss == HARD_LABEL:
        truth = reference.distillation_loss(wide, None, labels=part.labels, hard_label_weight=1.0)
    else:
        truth = reference.distillation_loss(wide, part.whole_teacher.double(), divergence=loss)
    truth.backward()
    found = step(provider, loss, part)
    expected = wide.grad
    if provider.name != ONE:
        expected = expected[:, part.offset : part.offset + part.student.shape[1]]
    gradient = leaf_of(provider, part).grad
    errors = [
        abs(found.item() - truth.item()) / abs(truth.item()),
        ((gradient - expected).norm() / expected.norm()).item(),
    ]
    worst = torch.tensor(max(errors) if all(e == e for e in errors) else float("inf"))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def run_loss(loss: str, options: argparse.Namespace, mesh) -> list[dict]:
    """Of all providers, on one rank; the same on every rank but for its own reading of the clock."""
    few = make_part(CHECKED_TOKENS, options.vocab, mesh)
    part = make_part(options.tokens, options.vocab, mesh)
    providers = [p for p in PROVIDERS if not p.losses or loss in p.losses]
    errors, sent = {}, {}
    for provider in providers:
        errors[provider.name] = error_of(provider, loss, few)
        if not errors[provider.name] <= TOLERANCE:
            raise ValueError(f"{provider.label} of {loss}: error {errors[provider.name]:.1e}")
        part.sent = {"collectives": 0, "bytes": 0}
        step(provider, loss, part)
        if provider.name == "torch":
            count_torch_parallel(loss, part)
        sent[provider.name] = part.sent
    times = {provider.name: [] for provider in providers}
    for _ in range(options.rounds):
        for provider in providers:
            waits = provider.name == ONE and mesh.get_local_rank() > 0
            dist.barrier()
            start = time.perf_counter()
            if not waits:
                step(provider, loss, part)
            slowest = torch.tensor(0.0 if waits else time.perf_counter() - start)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times[provider.name].append(slowest.item() * 1e3)
            leaf_of(provider, part).grad = None
    found = {name: Times.of(readings) for name, readings in times.items()}
    records = []
    for provider in providers:
        counted, its_times = sent[provider.name], found[provider.name]
        one = provider.name == ONE
        n_bytes = counted["bytes"]
        records.append(
            ParallelRecord(
                case=f"{loss} {options.tokens}x{options.vocab} float32", loss=loss,
                tokens=options.tokens, vocab=options.vocab, dtype="float32",
                provider=provider.name, label=provider.label, ranks=1 if one else options.ranks,
                times_ours=its_times.median_ms / found[OURS].median_ms,
                collectives=0 if one else counted["collectives"],
                bytes_a_token=None if n_bytes is None else n_bytes / options.tokens,
                error=errors[provider.name], **asdict(its_times),
            )
        )  # fmt: skip
    return records


def rank_main(rank: int, options: argparse.Namespace, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks
    )
    mesh = init_device_mesh("cpu", (options.ranks,))
    records = [record for loss in options.losses for record in run_loss(loss, options, mesh)]
    if rank == 0:
        facts = describe(torch.device("cpu"), options.arguments, "benchmarks.parallel")
        save(Path(results), records, facts)
    dist.destroy_process_group()


HEADER = (
    "loss", "provider", "ranks", "ms", "20-80%", "of ours", "collectives", "bytes a token and rank",
)  # fmt: skip


def _row(r: ParallelRecord) -> list[str]:
    sent = "–" if r.bytes_a_token is None else f"{r.bytes_a_token:,.0f}"
    return [
        r.loss, r.label, str(r.ranks), number(r.median_ms), f"{number(r.low_ms)}-{number(r.high_ms)}",
        number(r.times_ours, "x"), str(r.collectives), sent,
    ]  # fmt: skip


def markdown(records: Sequence[ParallelRecord], facts: dict[str, object]) -> str:
    """The table of docs/vocab-parallel.md."""
    first = records[0]
    lines = markdown_table(list(HEADER), map(_row, records), n_names=2)
    lines += [
        "",
        f"[{first.tokens}, {first.vocab}] {first.dtype}, forward + backward, medians of {first.rounds} rounds; "
        f"gloo, {max(r.ranks for r in records)} processes of one thread each. Collectives and bytes are of "
        "one forward and backward; bytes are what a rank hands over. Freed memory stays with the processes.",
        "",
        f"`{facts['command']}` on {machine_line(facts)}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes (default 2)")
    add("--tokens", type=int, default=512)
    add("--vocab", type=int, default=32000, help="a multiple of the ranks")
    add("--rounds", type=int, default=20)
    add("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    add(
        "--json", type=Path, help="where the records go (default: a full run's, benchmarks/results)"
    )
    options = parser.parse_args(arguments)
    options.arguments = list(arguments)
    if options.vocab % options.ranks:
        parser.error(f"--vocab {options.vocab} must be a multiple of --ranks {options.ranks}")
    with tempfile.TemporaryDirectory() as folder:
        path = options.json or (Path(folder) / "records.json" if arguments else None)
        path = path or RESULTS / RECORDS
        for name in (
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TRIM_THRESHOLD_",
        ):  # of processes that start now
            os.environ.setdefault(name, str(1 << 32))
        start = functools.partial(mp.spawn, nprocs=options.ranks)
        start(rank_main, args=(options, f"{folder}/store", str(path)))
        records, facts = load(path, ParallelRecord)
    console = make_console()
    console.print(machine_line(facts))
    for case, of_case in group_by_case(records).items():
        console.print(make_table(case, HEADER[1:], [_row(r)[1:] for r in of_case]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
