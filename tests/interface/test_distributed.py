"""Data-parallel training: a step of two processes equals the step of one on the whole batch.

Both DDP and FSDP2 average gradients over the processes, so the loss is told to divide by the global
token count over their number (semantics.md, section 4). The processes hold different counts.
"""

import contextlib
import datetime
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distill_ops import DistillationLoss, distillation_loss
from tests.support.helpers import assert_close

WORLD = 2
SEQUENCES, LENGTH, IDS, WIDTH, VOCAB = 16, 5, 12, 8, 33
MICRO_BATCHES = 4
LEARNING_RATE = 8.0  # an update about as large as the parameters, which then do not hide it
PATIENCE = 120  # seconds until processes that wait for each other are ended

OPTIONS = {
    "soft": {},
    "hard": {"divergence": "reverse_kl", "temperature": 2.0, "hard_label_weight": 0.3},
    "backward": {"divergence": "jensen_shannon", "gradient": "backward"},
}


class Student(torch.nn.Module):
    """Embedding and head; the loss is a submodule, so that the wrapper's forward returns it."""

    def __init__(self, options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding(IDS, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB)
        self.loss = DistillationLoss(**options)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, ids, teacher, **arguments):
        return self.loss(self.head(self.embedding(ids)), teacher, **arguments)


def make_batch():
    """Ids, teacher logits and labels; the first half of the sequences has fewer labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IDS, (SEQUENCES, LENGTH), generator=generator)
    teacher = torch.randn(SEQUENCES, LENGTH, VOCAB, generator=generator) * 2
    labels = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=generator)
    drawn = torch.rand(SEQUENCES, LENGTH, generator=generator)
    few = torch.arange(SEQUENCES)[:, None] < SEQUENCES // WORLD
    return ids, teacher, labels.masked_fill(drawn < torch.where(few, 0.7, 0.2), -100)


def part(batch, index, count):
    return [tensor.chunk(count)[index] for tensor in batch]


def step(model, micro_batches, normalizer, unsynchronised):
    """One optimizer step; every micro-batch but the last runs under ``unsynchronised``."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for i, (ids, teacher, labels) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else unsynchronised():
            model(ids, teacher, labels=labels, normalizer=normalizer).backward()
    optimizer.step()


@contextlib.contextmanager
def without_gradient_sync(model):
    """FSDP2's counterpart of DDP's ``no_sync``."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def data_parallel(model):
    wrapped = DistributedDataParallel(model)
    return wrapped, wrapped.no_sync


def fully_sharded(model):
    for module in (model.embedding, model.head, model):
        fully_shard(module)
    return model, lambda: without_gradient_sync(model)


WRAPPERS = {"DDP": data_parallel, "FSDP2": fully_sharded}
CASES = [
    (wrapper, option, micro_batches)
    for wrapper in WRAPPERS
    for option, micro_batches in [*((o, 1) for o in OPTIONS), ("hard", MICRO_BATCHES)]
]


def distributed_step(rank, wrapper, option, n_micro_batches):
    model = Student(OPTIONS[option])
    wrapped, unsynchronised = WRAPPERS[wrapper](model)
    mine = part(make_batch(), rank, WORLD)
    count = (mine[2] != -100).sum().float()
    dist.all_reduce(count)
    micro_batches = [part(mine, i, n_micro_batches) for i in range(n_micro_batches)]
    step(wrapped, micro_batches, count / WORLD, unsynchronised)
    return {
        name: (p.full_tensor() if wrapper == "FSDP2" else p).detach()
        for name, p in model.named_parameters()
    }


def work(rank, folder):
    """What each process does: every case, one after the other; saves the parameters."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # not the address that the machine's name happens to resolve to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )  # fmt: skip
    try:
        torch.save({case: distributed_step(rank, *case) for case in CASES}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The parameters of each process after each case's step. A failure brings its traceback."""
    folder = tmp_path_factory.mktemp("processes")
    context = mp.spawn(work, (str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"no end after {PATIENCE} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def whole_step(option, dtype):
    """The parameters after the step of one process on the whole batch."""
    model = Student(OPTIONS[option]).to(dtype)
    ids, teacher, labels = make_batch()
    step(model, [(ids, teacher.to(dtype), labels)], (labels != -100).sum(), None)
    return {name: p.detach() for name, p in model.named_parameters()}


def compare(ours, option):
    """By the numeric rule: truth is the step in float64, and what float32 may lose is measured on
    the step of one process."""
    eager, truth = whole_step(option, torch.float32), whole_step(option, torch.float64)
    assert set(ours) == set(truth)
    for name in truth:
        assert_close(name, ours[name], eager[name], truth[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_of_two_processes_is_the_step_of_one(case, results):
    _, option, _ = case
    for of_a_rank in results:
        compare(of_a_rank[case], option)
    assert all(
        torch.equal(results[0][case][name], results[1][case][name]) for name in results[0][case]
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_the_comparison_sees_a_local_count(option):
    """Averaging the processes' own means, the usual mistake, is not the mean over the batch."""
    model, total = Student(OPTIONS[option]), 0.0
    batch = make_batch()
    counts = [(part(batch, rank, WORLD)[2] != -100).sum().item() for rank in range(WORLD)]
    assert counts[0] < counts[1]
    for rank in range(WORLD):
        ids, teacher, labels = part(batch, rank, WORLD)
        total = total + model(ids, teacher, labels=labels) / WORLD
    total.backward()
    torch.optim.SGD(model.parameters(), LEARNING_RATE).step()
    ours = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(AssertionError, match="entry"):
        compare(ours, option)


def test_the_module_inside_is_the_function():
    """What the processes run through the module, once more through the function."""
    student = Student(OPTIONS["hard"])
    ids, teacher, labels = make_batch()
    logits = student.head(student.embedding(ids))
    expected = distillation_loss(logits, teacher, labels=labels, **OPTIONS["hard"])
    assert torch.equal(student(ids, teacher, labels=labels), expected)
