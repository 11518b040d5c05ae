"""Who is measured: a provider is a name and a way to get a loss function for a case."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import distill_ops

from ..core.records import EAGER, OURS
from . import peers
from .cases import MODES, Case
from .eager import FORMULAS
from .records import COMPILE, OURS_BACKWARD, OURS_INPLACE

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # student, teacher -> mean


@dataclass(frozen=True)
class Provider:
    """``build`` gives the loss function of a case, or raises :class:`peers.Skipped`.

    ``native``: it computes in the logits' dtype, not in float32, and is as exact as that allows.
    ``inplace``: its gradient overwrites the student's logits.
    """

    name: str  # in the command line and the JSON
    label: str  # in tables and plots
    build: Callable[[Case, torch.device], LossFunction]
    native: bool = False
    inplace: bool = False
    modes: tuple[str, ...] = MODES


def eager(case: Case, device: torch.device) -> LossFunction:
    return partial(FORMULAS[case.loss], dtype=torch.float32)


def native(case: Case, device: torch.device) -> LossFunction:
    if case.dtype == "float32":
        raise peers.Skipped("the same as eager for float32 logits")
    return partial(FORMULAS[case.loss], dtype=None)


def compiled(case: Case, device: torch.device) -> LossFunction:
    torch.compiler.reset()  # earlier shapes would count towards the recompilation limit
    formula = FORMULAS[case.loss]

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return formula(student, teacher, torch.float32)

    return torch.compile(loss, dynamic=False)


def ours(case: Case, device: torch.device) -> LossFunction:
    return partial(distill_ops.distillation_loss, divergence=case.loss)


def ours_backward(case: Case, device: torch.device) -> LossFunction:
    return partial(ours(case, device), gradient="backward")


def ours_inplace(case: Case, device: torch.device) -> LossFunction:
    return partial(ours(case, device), inplace=True)


TRAIN = ("train",)  # without a gradient there is no other way to hold it


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(EAGER, "eager float32", eager),
        Provider("native", "eager native", native, native=True),
        Provider(COMPILE, "torch.compile", compiled),
        Provider("liger", "liger-kernel", peers.liger),
        Provider("trl", "TRL", peers.trl, native=True),
        Provider("fla", "fla", peers.fla),
        Provider(OURS, "distill_ops", ours),
        Provider(OURS_BACKWARD, "distill_ops, backward", ours_backward, modes=TRAIN),
        Provider(OURS_INPLACE, "distill_ops, inplace", ours_inplace, inplace=True, modes=TRAIN),
    )
}
