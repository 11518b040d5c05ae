"""Fused knowledge-distillation losses for language models, which hold no probability tensor.

See :func:`distillation_loss`."""

from . import reference
from .analysis.verify import DivergenceReport, check_divergence
from .api.dense import DistillationLoss, distillation_loss
from .api.estimators import reverse_kl_estimate
from .api.gather import gather_log_probs, student_topk
from .api.linear import LinearDistillationLoss, linear_distillation_loss
from .api.linear_gather import linear_gather_log_probs, linear_student_topk
from .api.linear_statistics import linear_distillation_statistics
from .api.linear_support import linear_support_distillation_loss
from .api.linear_tokens import linear_token_log_probs
from .api.linear_topk import linear_topk_distillation_loss
from .api.metrics import distillation_metrics
from .api.statistics import distillation_statistics
from .api.support import support_distillation_loss
from .api.tokens import mixture_token_log_probs, token_log_probs
from .api.topk import topk_distillation_loss
from .checks.values import set_debug
from .divergences.base import Divergence
from .divergences.built_in import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    TotalVariation,
)
from .divergences.declared import declare_divergence
from .results import (
    DistillationMetrics,
    DistillationStatistics,
    LossComponents,
    StatisticsCoefficients,
    TokenOutputs,
)
from .teacher.contents import rows_written
from .teacher.dataset import TeacherTopKDataset
from .teacher.sampler import BlockSampler
from .teacher.store import save_teacher_topk
from .teacher.topk import TeacherTopK, teacher_topk

__version__ = "0.1.0"

__all__ = [
    "AlphaBeta",
    "BlockSampler",
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
    "StatisticsCoefficients",
    "SymmetricKL",
    "TeacherTopK",
    "TeacherTopKDataset",
    "TokenOutputs",
    "TotalVariation",
    "check_divergence",
    "declare_divergence",
    "distillation_loss",
    "distillation_metrics",
    "distillation_statistics",
    "gather_log_probs",
    "linear_distillation_loss",
    "linear_distillation_statistics",
    "linear_gather_log_probs",
    "linear_student_topk",
    "linear_support_distillation_loss",
    "linear_token_log_probs",
    "linear_topk_distillation_loss",
    "mixture_token_log_probs",
    "reference",
    "reverse_kl_estimate",
    "rows_written",
    "save_teacher_topk",
    "set_debug",
    "student_topk",
    "support_distillation_loss",
    "teacher_topk",
    "token_log_probs",
    "topk_distillation_loss",
]
