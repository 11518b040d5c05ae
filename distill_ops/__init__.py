"""Fused knowledge-distillation losses for language models, which hold no probability tensor.

See :func:`distillation_loss`."""

from . import reference
from .checks import set_debug
from .divergences import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    TotalVariation,
)
from .losses import DistillationLoss, distillation_loss
from .reference import LossComponents

__version__ = "0.1.0"

__all__ = [
    "AlphaBeta",
    "DistillationLoss",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LossComponents",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SymmetricKL",
    "TotalVariation",
    "distillation_loss",
    "reference",
    "set_debug",
]
