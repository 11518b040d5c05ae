"""Fused knowledge-distillation losses for language models: one read of the logits, no probability
tensor. See :func:`distillation_loss`."""

from . import reference
from .checks import set_debug
from .divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, SoftCrossEntropy
from .losses import DistillationLoss, distillation_loss
from .reference import LossComponents

__version__ = "0.1.0"

__all__ = [
    "DistillationLoss",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LossComponents",
    "ReverseKL",
    "SoftCrossEntropy",
    "distillation_loss",
    "reference",
    "set_debug",
]
