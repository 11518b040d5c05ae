"""The oracle: the losses restated in plain PyTorch, full tensors and no cleverness.

Needs neither Triton nor a GPU, differentiates by autograd and runs in float64: the tests hold
every other path against it. It restates each formula instead of sharing the kernels' text.
"""

from ..results import DistillationStatistics, LossComponents
from .dense import distillation_loss
from .linear import (
    linear_distillation_loss,
    linear_distillation_statistics,
    linear_token_log_probs,
)
from .support import gather_log_probs, support_distillation_loss
from .tokens import (
    distillation_statistics,
    mixture_token_log_probs,
    token_log_probs,
)
from .topk import topk_distillation_loss

__all__ = [
    "DistillationStatistics",
    "LossComponents",
    "distillation_loss",
    "distillation_statistics",
    "gather_log_probs",
    "linear_distillation_loss",
    "linear_distillation_statistics",
    "linear_token_log_probs",
    "mixture_token_log_probs",
    "support_distillation_loss",
    "token_log_probs",
    "topk_distillation_loss",
]
