"""What ranks do beside a case: functions that ``tests/support/ranks.py`` calls in each process of a group."""

import contextlib
import datetime
import random
import time
from typing import NamedTuple

import torch
import torch._dynamo  # of DTensors and compiled calls: here once, instead of in each process
import torch._functorch.aot_autograd
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import distill_ops
from distill_ops import groups
from tests.support.allocations import measured_peak
from tests.support.forms import CALLED
from tests.support.ranks import Member
from tests.vocab_parallel.cases import Case
from tests.vocab_parallel.results import flat, run_case


def runs(member: Member, case: Case, n: int) -> list[dict[str, torch.Tensor]]:
    """A case's results n times, between which memory is filled with NaN and given back."""
    generator, found, kept = random.Random(member.rank), [], []
    for _ in range(n):
        blocks = [torch.full((generator.randint(1, 400),), float("nan")) for _ in range(8)]
        generator.shuffle(blocks)
        kept = [*kept[-2:], blocks[::2]]
        del blocks
        found.append(run_case(member, case))
    return found


class Traffic(NamedTuple):
    """What a rank communicated."""

    collectives: int
    bytes: int


def traffic(member: Member, case: Case, more: int = 0) -> tuple[Traffic, Traffic]:
    """Of the forward and of the backward, ``more`` gathers of nothing being added to the forward."""
    tensors, options = case.part(member.rank)
    form = case.of_form
    leaves = {name: tensors[name].requires_grad_() for name in form.students}
    given = {**tensors, **leaves}
    positional = [given.pop(name) for name in form.positional]
    counts = []
    with groups.counted() as counted:
        outputs = form.function(*positional, **given, **options, group=member.group)
        for _ in range(more):
            groups.resolve(member.group.group_name).all_gather(torch.zeros(1))
    counts.append(Traffic(counted.collectives, counted.bytes))
    total = sum(x.sum() for x in flat(outputs) if x.requires_grad)
    with groups.counted() as counted:
        if form.students:
            total.backward()
    counts.append(Traffic(counted.collectives, counted.bytes))
    return tuple(counts)


def memory(member: Member, shape: tuple[int, int], options: dict) -> int:
    """The peak of a loss and its gradient above the rank's logits, in bytes."""
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(member.rank))
    student.requires_grad_()
    options = {**options, "group": member.group, "vocab_offset": member.rank * shape[1]}
    return measured_peak(
        lambda: distill_ops.distillation_loss(student, teacher, **options).backward()
    )


class Outcome(NamedTuple):
    """How a call ended: the error's type and message, none of which: ``error`` is None."""

    error: str | None
    message: str
    seconds: float


def outcome(function) -> Outcome:
    begin = time.monotonic()
    try:
        function()
    except Exception as e:
        return Outcome(type(e).__name__, str(e), time.monotonic() - begin)
    return Outcome(None, "", time.monotonic() - begin)


def call(member: Member, case: Case) -> Outcome:
    return outcome(lambda: run_case(member, case))


def one_raises(member: Member, case: Case, wrong: dict, seconds: float) -> Outcome:
    """Rank 1's options are wrong, in a group of its own whose timeout is some seconds."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    tensors, options = case.part(member.rank)
    if member.rank == 1:
        options |= wrong
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    return outcome(lambda: distill_ops.distillation_loss(student, teacher, **options, group=group))


@contextlib.contextmanager
def debug_mode():
    distill_ops.set_debug(True)
    try:
        yield
    finally:
        distill_ops.set_debug(False)


def in_debug_mode(member: Member, cases: list[Case]) -> Outcome:
    """Each rank calls as its own case says."""
    with debug_mode():
        return outcome(lambda: run_case(member, cases[member.rank]))


def narrower_teacher(member: Member, case: Case) -> Outcome:
    """The teacher's part lacks a column on every rank."""
    tensors, options = case.part(member.rank)
    student, teacher = tensors["student_logits"], tensors["teacher_logits"][..., :-1]
    return outcome(
        lambda: distill_ops.distillation_loss(student, teacher, **options, group=member.group)
    )


def as_dtensor(member: Member, width: int, total: int) -> DTensor:
    shape = torch.Size([2, total])
    mesh = DeviceMesh.from_group(member.group, "cpu")
    part = torch.zeros(2, width)
    return DTensor.from_local(part, mesh, [Shard(1)], shape=shape, stride=(total, 1))


def uneven_dtensor(member: Member) -> Outcome:
    logits = as_dtensor(member, (8, 11, 11)[member.rank], 30)
    return outcome(lambda: distill_ops.distillation_loss(logits, logits))


def inplace_dtensor(member: Member) -> Outcome:
    logits = as_dtensor(member, 10, 20)
    student = logits.clone().requires_grad_() * 1.0
    return outcome(lambda: distill_ops.distillation_loss(student, logits, inplace=True))


def unread_row(member: Member) -> tuple[float, float]:
    """Gradients of two hidden states, of which the first is NaN and its loss is left out afterwards."""
    hidden = torch.ones(2, 3)
    hidden[0] = torch.nan
    hidden.requires_grad_()
    generator = torch.Generator().manual_seed(member.rank)
    student, teacher = torch.randn(2, 4, 3, generator=generator)
    loss = distill_ops.linear_distillation_loss(
        hidden, student, torch.ones(2, 3), teacher, reduction="none", group=member.group
    )
    loss.backward(torch.tensor([0.0, 1.0]))
    return tuple(hidden.grad.abs().sum(-1).tolist())


def raise_on_one(member: Member, wrong: bool = True) -> float:
    """The sum of ranks and one each, which rank 1 leaves out where that is wrong."""
    if wrong and member.rank == 1:
        raise ZeroDivisionError
    total = torch.tensor(member.rank + 1)
    dist.all_reduce(total, group=member.group)
    return total.item()


def called(member: Member, form: str, tensors: dict, options: dict) -> tuple[Outcome, object]:
    """How a call with these tensors of the whole vocabulary ends on this rank, each having its columns of
    the logits, and what it gives."""
    tensors = {
        name: x.tensor_split(member.size, -1)[member.rank] if name.endswith("logits") else x
        for name, x in tensors.items()
    }
    found = []
    ended = outcome(
        lambda: found.append(CALLED[form].function(**tensors, **options, group=member.group))
    )
    return ended, found
