"""Wrong calls of the functions of statistics: their coefficients, and what two heads must share."""

import math

import torch

import distill_ops
from tests.interface.hostile_kinds import of_form
from tests.support.forms import FORMS, V

FUNCTIONS = [form for form in FORMS if "statistics" in form]
COEFFICIENTS = [  # of the statistics, error, words
    (1.0, TypeError, r"must be StatisticsCoefficients\(divergence, log_prob, entropy\).*got 1.0"),
    ((1.0, 1.0), TypeError, "tuple of these three, got"),
    ([1.0, 1.0, 1.0], TypeError, "tuple of these three, got"),
    (torch.ones(3), TypeError, "tuple of these three, got a tensor"),
    ((None, None, None), ValueError, "are None, all three"),
    ((1.0, "1", None), TypeError, r"coefficients\.log_prob must be a number .*got str"),
    ((True, 1.0, None), TypeError, r"coefficients\.divergence must be a number .*got bool"),
    ((1.0, math.nan, None), ValueError, r"coefficients\.log_prob must be finite, got nan"),
    ((None, None, -math.inf), ValueError, r"coefficients\.entropy must be finite, got -inf"),
    ((10**400, None, None), ValueError, r"coefficients\.divergence must be a number.*bits"),
    ((torch.ones(4, 1), None, None), ValueError, r"coefficients\.divergence must have the leading"),
    ((None, torch.ones(4, requires_grad=True), None), ValueError, "log_prob requires grad.*detach"),
    ((None, None, torch.tensor(1.0, requires_grad=True)), ValueError, "entropy requires grad"),
    ((None, torch.ones(4, device="meta"), None), ValueError, r"coefficients\.log_prob is on meta"),
    ((None, torch.ones(4).to_sparse(), None), TypeError, r"coefficients\.log_prob must be dense"),
    ((None, torch.ones(4).cfloat(), None), TypeError, r"coefficients\.log_prob must be .*complex64"),
    ((None, torch.tensor([1, math.nan, 0, 1]), None), ValueError, "log_prob must hold finite.*got nan"),
    ((None, None, torch.tensor(math.inf)), ValueError, "entropy must hold finite numbers, got inf"),
]  # fmt: skip
STATISTICS = [
    of_form(form, f"coefficients, {i}: {words[:30]}", error, words, coefficients=given)
    for form in FUNCTIONS
    for i, (given, error, words) in enumerate(COEFFICIENTS)
]
HEAD_PAIR = "linear_distillation_statistics"
STATISTICS += [
    of_form(HEAD_PAIR, "no teacher", TypeError, "teacher_hidden must be a tensor", teacher_hidden=None),
    of_form(
        HEAD_PAIR, "teacher of grad", ValueError, "teacher_hidden requires grad.*detach",
        teacher_hidden=torch.zeros(4, 5, requires_grad=True),
    ),
    of_form(
        HEAD_PAIR, "other widths", ValueError, f"{V} rows and teacher_weight {V + 1}: pass vocab_size=",
        teacher_weight=torch.zeros(V + 1, 5), teacher_bias=None,
    ),
    of_form(HEAD_PAIR, "vocab_size=0", ValueError, r"vocab_size must be at least 1", vocab_size=0),
    of_form(HEAD_PAIR, "vocab_size='all'", TypeError, "vocab_size must be an int", vocab_size="all"),
    of_form(
        HEAD_PAIR, "ids beyond vocab_size", ValueError, r"token_ids must lie in \[0, 3\)", vocab_size=3
    ),
    of_form(HEAD_PAIR, "divergence", ValueError, "'kl': pass 'forward_kl'", divergence="kl"),
    of_form(
        HEAD_PAIR, "a parameter", ValueError, "beta of jensen.* 1.5",
        divergence=distill_ops.JensenShannon(torch.tensor(1.5)),
    ),
]  # fmt: skip
