"""Other packages' losses, where they can be imported and take the case."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F

from .cases import Case
from .form_cases import FormCase


class Skipped(Exception):
    """A provider does not take a case; the message says why."""


def imported(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # transformers' lazy modules raise the second
        if getattr(error, "name", None) == package.partition(".")[0]:
            raise Skipped("not installed") from error
        raise Skipped(f"cannot be imported: {error}") from error


def beta_of(case: Case | FormCase) -> float:
    """The end points of the generalised JSD are, by convention, the two KLs."""
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}
    if case.loss not in betas:
        raise Skipped(f"has no {case.loss}")
    return betas[case.loss]


def liger(case: Case, device: torch.device) -> Callable:
    """LigerKLDIVLoss and LigerJSD take log-probabilities: making them is part of the price."""
    transformers = imported("liger_kernel.transformers", "liger_kernel")
    beta = beta_of(case)
    if device.type != "cuda":
        raise Skipped("its kernels need a GPU")
    if case.loss == "forward_kl":
        function = transformers.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        function = transformers.LigerJSD(beta=beta)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(student, dim=-1, dtype=torch.float32)
        return function(log_q, F.log_softmax(teacher, dim=-1, dtype=torch.float32))

    return loss


def trl(case: Case, device: torch.device) -> Callable:
    """GKD's loss; "batchmean" of ``[tokens, vocab]`` logits is the mean over tokens."""
    function = imported("trl.experimental.gkd", "trl").GKDTrainer.generalized_jsd_loss
    beta = beta_of(case)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return function(student, teacher, beta=beta)

    return loss


def fla(case: Case, device: torch.device) -> Callable:
    """Its KL, like TRL's chunked divergence, starts from hidden states and head weights."""
    raise Skipped("its fused KL takes hidden states, not logits")
