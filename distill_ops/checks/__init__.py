"""Every check of a user's arguments, before any kernel runs; one file a kind of argument."""

from .heads import check_block_options, check_head, check_heads
from .logits import (
    check_inplace,
    check_pair,
    check_teacher_given,
    check_teacher_logits,
    check_vocabulary,
)
from .slots import MOST_SLOTS, check_topk, check_topk_logits
from .tokens import (
    check_dense,
    check_mixture,
    check_options,
    check_sampled_log_probs,
    check_statistics,
    check_token_ids,
    check_token_log_probs,
)
from .values import (
    BACKENDS,
    GRADIENTS,
    Rows,
    check_integer,
    check_temperature,
    one_of,
    set_debug,
)

__all__ = [
    "BACKENDS",
    "GRADIENTS",
    "MOST_SLOTS",
    "Rows",
    "check_block_options",
    "check_dense",
    "check_head",
    "check_heads",
    "check_inplace",
    "check_integer",
    "check_mixture",
    "check_options",
    "check_pair",
    "check_sampled_log_probs",
    "check_statistics",
    "check_teacher_given",
    "check_teacher_logits",
    "check_temperature",
    "check_token_ids",
    "check_token_log_probs",
    "check_topk",
    "check_topk_logits",
    "check_vocabulary",
    "one_of",
    "set_debug",
]
