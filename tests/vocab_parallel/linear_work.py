"""What ranks do with the linear loss beside a case: heads as DTensors, given logits, memory, calls that differ."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from distill_ops import LinearDistillationLoss, groups, linear_distillation_loss, reference
from tests.support.allocations import measured_peak
from tests.support.linear_cases import Pair, make_pair
from tests.support.ranks import Member
from tests.vocab_parallel.work import Outcome, debug_mode, outcome

TOKENS, DIMS, N_COLS = (2, 4), (6, 8), 33
NAMES = "student_hidden", "student_weight", "student_bias"


def heads() -> Pair:
    return make_pair(TOKENS, N_COLS, DIMS, dtype=torch.float64, bias=True)


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss, and the gradients of a sum of it that is not plain."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)]


def cut(tensor: torch.Tensor, widths: tuple[int, ...], member: Member, dim: int = 0):
    return tensor.split(widths, dim)[member.rank].clone()


def given_logits(member: Member | None, widths, whole: bool, options: dict, oracle: bool = False):
    """Loss and gradients of this rank against logits that are there; without a member those of one process,
    by rank."""
    pair, more = heads(), {}
    logits = (pair.teacher_hidden @ pair.teacher_weight.t())[..., : sum(widths)]
    leaves = [pair.student_hidden, pair.student_weight, pair.student_bias]
    if member is not None:
        more = {"group": member.group}
        leaves[1:] = [cut(x, widths, member) for x in leaves[1:]]
        logits = logits if whole else cut(logits, widths, member, -1)
    leaves = [x.requires_grad_() for x in leaves]
    hidden, weight, bias = leaves
    function = reference.linear_distillation_loss if oracle else linear_distillation_loss
    loss = function(hidden, weight, student_bias=bias, teacher_logits=logits, **options, **more)
    return gradients(loss, leaves)


def split_tokens(member: Member, widths, counts: tuple[int, ...], options: dict) -> Outcome:
    """Each rank has so many of the tokens."""
    pair = heads()
    n = counts[member.rank]
    heads_of_rank = [cut(x, widths, member) for x in (pair.student_weight, pair.teacher_weight)]
    hidden = pair.student_hidden.flatten(0, 1)[:n], pair.teacher_hidden.flatten(0, 1)[:n]
    return outcome(
        lambda: linear_distillation_loss(
            hidden[0], heads_of_rank[0], hidden[1], heads_of_rank[1], group=member.group, **options
        )
    )


def called(member: Member, widths, way: str) -> tuple[list, list]:
    """Loss and gradients through a checkpoint, which calls the forward again, or of a module; and plainly."""
    pair = heads()
    teacher = pair.teacher_hidden, cut(pair.teacher_weight, widths, member)
    options = {
        "divergence": "jensen_shannon", "group": member.group, "memory_budget": 600,
        "gradient": "backward",
    }  # fmt: skip

    def loss(hidden, weight):
        return linear_distillation_loss(hidden, weight, *teacher, **options)

    def through(hidden, weight):
        if way == "module":
            return LinearDistillationLoss(**options)(hidden, weight, *teacher)
        return checkpoint(loss, hidden, weight, use_reentrant=False)

    leaves = [pair.student_hidden, cut(pair.student_weight, widths, member)]
    leaves = [x.requires_grad_() for x in leaves]
    return tuple(gradients(call(*leaves), leaves) for call in (through, loss))


def many_tokens(member: Member, n: int) -> int:
    """Collectives of the forward of that many tokens, which one block holds."""
    pair = make_pair((n,), 12, (4, 4))
    weight = pair.student_weight.requires_grad_()
    with groups.counted() as counted:
        linear_distillation_loss(
            pair.student_hidden.requires_grad_(), weight, *pair[2:4], group=member.group
        )
    return counted.collectives


def differ(member: Member, widths, of_rank: list[dict], debug: bool = False) -> Outcome:
    """Each rank calls with options of its own, "teacher rows" being how many of the teacher's it has."""
    pair, options = heads(), dict(of_rank[member.rank])
    teacher = cut(pair.teacher_weight, widths, member)[: options.pop("teacher rows", None)]
    weight = cut(pair.student_weight, widths, member).requires_grad_()

    def call():
        return linear_distillation_loss(
            pair.student_hidden, weight, pair.teacher_hidden, teacher, group=member.group, **options
        )

    if not debug:
        return outcome(call)
    with debug_mode():
        return outcome(call)


# --- DTensors --------------------------------------------------------------------------------------


def sharded(
    member: Member, n_cols: int, options: dict, by_mesh: bool, replicated: bool
) -> tuple[int, list[torch.Tensor]]:
    """Both heads are DTensors, sharded on their first dimension: collectives of the forward; loss and
    gradients, which are whole again."""
    pair, mesh = heads(), DeviceMesh.from_group(member.group, "cpu")

    def shard(x: torch.Tensor) -> DTensor:
        parts = x[:n_cols].chunk(member.size)
        part = parts[member.rank] if member.rank < len(parts) else x[:0]
        return DTensor.from_local(
            part.clone(), mesh, [Shard(0)], shape=x[:n_cols].shape, stride=x.stride()
        )

    leaves = [pair.student_hidden, shard(pair.student_weight), shard(pair.student_bias)]
    hidden, weight, bias = leaves = [x.detach().requires_grad_() for x in leaves]
    of_teacher = shard
    if replicated:
        of_teacher = lambda x: DTensor.from_local(x, mesh, [Replicate()])
    teacher = of_teacher(pair.teacher_weight[:n_cols]).requires_grad_()  # an unfrozen model's
    with groups.counted() as counted:
        loss = linear_distillation_loss(
            hidden, weight, pair.teacher_hidden, teacher, student_bias=bias,
            teacher_bias=of_teacher(pair.teacher_bias[:n_cols]), group=mesh if by_mesh else member.group, **options,
        )  # fmt: skip
    assert not isinstance(loss, DTensor)
    found = gradients(loss, leaves)
    for gradient in found[2:]:
        assert gradient.placements == (Shard(0),)
    return counted.collectives, [*found[:2], *(x.full_tensor() for x in found[2:])]


class Model(torch.nn.Module):
    """A body and a head; the forward returns hidden states, or a loss of both where it is given."""

    def __init__(self):
        super().__init__()
        pair = heads()
        self.body = torch.nn.Linear(DIMS[0], DIMS[0], bias=False, dtype=torch.float64)
        self.head = torch.nn.Linear(DIMS[0], N_COLS, dtype=torch.float64)
        with torch.no_grad():
            torch.nn.init.eye_(self.body.weight)
            self.head.weight.copy_(pair.student_weight)
            self.head.bias.copy_(pair.student_bias)

    def forward(self, x, loss=None):
        hidden = self.body(x)
        return hidden if loss is None else loss(hidden, self.head.weight, self.head.bias)


def model_loss(row: int, **options):
    """Of one of the rows of tokens."""
    pair = heads()

    def loss(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, pair.teacher_hidden[row], pair.teacher_weight, student_bias=bias,
            teacher_bias=pair.teacher_bias, divergence="reverse_kl", **options,
        )  # fmt: skip

    return pair.student_hidden[row], loss


def in_the_forward(model, x, loss, mesh):
    fully_shard(model, mesh=mesh["fsdp"])
    return model(x, loss)


def unsharded(model, x, loss, mesh):
    for module in (model.body, model.head, model):
        fully_shard(module, mesh=mesh["fsdp"])
    hidden = model(x)
    model.head.unshard()
    return loss(hidden, model.head.weight, model.head.bias)


def redistributed(model, x, loss, mesh):
    for module in (model.body, model.head, model):
        fully_shard(module, mesh=mesh["fsdp"])
    hidden, head = model(x), []
    for parameter in (model.head.weight, model.head.bias):
        part = parameter.redistribute(placements=[Replicate(), Shard(0)])
        head.append(part.to_local(grad_placements=[Partial("avg"), Shard(0)]))
    return loss(hidden, *head)


WAYS = {x.__name__: x for x in (in_the_forward, unsharded, redistributed)}


def two_dimensions(member: Member, way: str) -> dict[str, torch.Tensor]:
    """A head that FSDP2 and tensor parallelism shard: whole gradients of the mean over the first dimension of
    the mesh, each row of which has tokens of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = Model()
    parallelize_module(model.head, mesh["tp"], ColwiseParallel())
    x, loss = model_loss(mesh.get_local_rank("fsdp"), group=mesh["tp"])
    WAYS[way](model, x, loss, mesh).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def still_sharded(member: Member) -> list[Outcome]:
    """What the loss says of a head on a mesh of two dimensions, and of one that is sharded over other ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = Model()
    parallelize_module(model.head, mesh["tp"], ColwiseParallel())
    head = model.head.weight, model.head.bias
    found = []
    for group in (mesh["fsdp"], None):
        x, loss = model_loss(0, group=group)
        found.append(outcome(lambda x=x, loss=loss: loss(x, *head)))
    fully_shard(model, mesh=mesh["fsdp"])
    x, loss = model_loss(0, group=mesh["tp"])
    found.append(outcome(lambda: loss(x, model.head.weight, model.head.bias)))
    return found


def memory(member: Member, n_tokens: int, dim: int, width: int, options: dict) -> int:
    """The peak of a loss and its gradients above the rank's tensors, in bytes."""
    generator = torch.Generator().manual_seed(member.rank)
    hidden, weight = (torch.randn(n, dim, generator=generator) for n in (n_tokens, width))
    teacher = torch.randn(width, dim, generator=generator)
    leaves = hidden.clone().requires_grad_(), weight.requires_grad_()
    options = {**options, "group": member.group}
    return measured_peak(
        lambda: linear_distillation_loss(*leaves, hidden, teacher, **options).backward()
    )
