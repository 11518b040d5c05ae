"""Who computes a loss over a vocabulary that ranks split: ours, MiniLLM's formulation, eager PyTorch on
gathered logits, and torch's ``loss_parallel``, each a function of one rank's part."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

import distill_ops
from distill_ops import groups

HARD_LABEL = "cross_entropy"  # the hard label alone


@dataclass
class Part:
    """What one rank has; ``whole_*`` are all columns, for the provider of one process."""

    student: torch.Tensor  # [N, V / P] leaf
    teacher: torch.Tensor  # [N, V / P]
    labels: torch.Tensor  # [N]
    whole_student: torch.Tensor  # [N, V] leaf
    whole_teacher: torch.Tensor
    offset: int
    mesh: DeviceMesh
    sent: dict[str, int] = field(default_factory=lambda: {"collectives": 0, "bytes": 0})

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def count(self, sent: torch.Tensor) -> torch.Tensor:
        self.sent["collectives"] += 1
        self.sent["bytes"] += sent.numel() * sent.element_size()
        return sent

    def all_reduce(self, x: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
        dist.all_reduce(self.count(x), op, group=self.group)
        return x


def ours(loss: str, part: Part) -> torch.Tensor:
    hard = loss == HARD_LABEL
    options = (
        {"divergence": loss} if not hard else {"labels": part.labels, "hard_label_weight": 1.0}
    )
    with groups.counted() as counter:
        found = distill_ops.distillation_loss(
            part.student, None if hard else part.teacher, group=part.group, vocab_offset=part.offset,
            **options,
        )  # fmt: skip
    part.sent = vars(counter).copy()
    return found


def one_process(loss: str, part: Part) -> torch.Tensor:
    hard = loss == HARD_LABEL
    options = (
        {"divergence": loss} if not hard else {"labels": part.labels, "hard_label_weight": 1.0}
    )
    teacher = None if hard else part.whole_teacher
    return distill_ops.distillation_loss(part.whole_student, teacher, **options)


class _SoftCrossEntropy(torch.autograd.Function):
    """MiniLLM's: five all-reduces, and both probability tensors kept in float32."""

    @staticmethod
    def forward(ctx, logits, targets, part):
        most = part.all_reduce(logits.max(-1).values, dist.ReduceOp.MAX)
        logits = logits - most.unsqueeze(-1)
        exponentials = logits.exp()
        total = part.all_reduce(exponentials.sum(-1))
        probs = exponentials.div_(total.unsqueeze(-1))
        most = part.all_reduce(targets.max(-1).values, dist.ReduceOp.MAX)
        exponentials = (targets - most.unsqueeze(-1)).exp()
        target_total = part.all_reduce(exponentials.sum(-1))
        target_probs = exponentials.div_(target_total.unsqueeze(-1))
        expected = part.all_reduce((logits * target_probs).sum(-1))
        ctx.save_for_backward(probs, target_probs)
        return total.log() - expected

    @staticmethod
    def backward(ctx, upstream):
        probs, target_probs = ctx.saved_tensors
        return (probs - target_probs) * upstream.unsqueeze(-1), None, None


def minillm(loss: str, part: Part) -> torch.Tensor:
    return _SoftCrossEntropy.apply(part.student.float(), part.teacher.float(), part).mean()


class _Gather(torch.autograd.Function):
    """All columns; the gradient of this rank's part of them."""

    @staticmethod
    def forward(ctx, x, part):
        parts = [torch.empty_like(x) for _ in range(part.mesh.size())]
        dist.all_gather(parts, part.count(x), group=part.group)
        ctx.columns = part.offset, part.offset + x.shape[-1]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, upstream):
        return upstream[:, slice(*ctx.columns)], None


def gathered(loss: str, part: Part) -> torch.Tensor:
    """Eager PyTorch, every rank on the whole vocabulary."""
    student = _Gather.apply(part.student, part)
    if loss == HARD_LABEL:
        return F.cross_entropy(student.float(), part.labels)
    teacher = _Gather.apply(part.teacher, part)
    log_q = F.log_softmax(student.float(), -1)
    if loss == "soft_cross_entropy":
        return -(F.softmax(teacher.float(), -1) * log_q).sum(-1).mean()
    log_p = F.log_softmax(teacher.float(), -1)
    divergence = partial(F.kl_div, reduction="batchmean", log_target=True)
    if loss == "forward_kl":
        return divergence(log_q, log_p)
    if loss == "reverse_kl":
        return divergence(log_p, log_q)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return (divergence(log_m, log_p) + divergence(log_m, log_q)) / 2


def torch_parallel(loss: str, part: Part) -> torch.Tensor:
    """Under ``loss_parallel``, which its backward needs too, and which does not nest."""
    logits = DTensor.from_local(part.student, part.mesh, [Shard(1)], run_check=False)
    labels = DTensor.from_local(part.labels, part.mesh, [Replicate()], run_check=False)
    return F.cross_entropy(logits, labels)


def count_torch_parallel(loss: str, part: Part) -> None:
    """Its collectives happen inside PyTorch, which counts them, but not their bytes."""
    with CommDebugMode() as seen, loss_parallel():
        torch_parallel(loss, part)
    part.sent = {"collectives": seen.get_total_counts(), "bytes": None}


@dataclass(frozen=True)
class Provider:
    name: str
    label: str
    function: Callable[[str, Part], torch.Tensor]
    losses: tuple[str, ...] = ()  # none: all of them


PROVIDERS = (
    Provider("ours", "distill_ops", ours),
    Provider("one_process", "distill_ops, one process", one_process),
    Provider("minillm", "MiniLLM's formulation", minillm, ("soft_cross_entropy",)),
    Provider("gathered", "eager on gathered logits", gathered),
    Provider("torch", "torch loss_parallel", torch_parallel, (HARD_LABEL,)),
)
