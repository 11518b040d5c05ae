"""Fused knowledge-distillation losses for language models, which hold no probability tensor.

See :func:`distillation_loss`."""

from . import reference
from .checks import set_debug
from .declare import declare_divergence
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
from .estimators import reverse_kl_estimate
from .linear import LinearDistillationLoss, linear_distillation_loss
from .linear_token import linear_token_log_probs
from .linear_topk import linear_topk_distillation_loss
from .losses import DistillationLoss, distillation_loss
from .metrics import DistillationMetrics, distillation_metrics
from .reference import DistillationStatistics, LossComponents
from .teacher_dataset import TeacherTopKDataset
from .teacher_store import TeacherTopK, save_teacher_topk, teacher_topk
from .token import distillation_statistics, mixture_token_log_probs, token_log_probs
from .topk import topk_distillation_loss
from .verify import DivergenceReport, check_divergence

__version__ = "0.1.0"

__all__ = [
    "AlphaBeta",
    "DistillationLoss",
    "DistillationMetrics",
    "DistillationStatistics",
    "Divergence",
    "DivergenceReport",
    "ForwardKL",
    "JensenShannon",
    "LinearDistillationLoss",
    "LossComponents",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SymmetricKL",
    "TeacherTopK",
    "TeacherTopKDataset",
    "TotalVariation",
    "check_divergence",
    "declare_divergence",
    "distillation_loss",
    "distillation_metrics",
    "distillation_statistics",
    "linear_distillation_loss",
    "linear_token_log_probs",
    "linear_topk_distillation_loss",
    "mixture_token_log_probs",
    "reference",
    "reverse_kl_estimate",
    "save_teacher_topk",
    "set_debug",
    "teacher_topk",
    "token_log_probs",
    "topk_distillation_loss",
]
