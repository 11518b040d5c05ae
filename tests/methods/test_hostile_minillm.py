"""Wrong calls of MiniLLM's functions: refused, naming the argument, before anything is computed."""

import math

import pytest
import torch

from distill_ops.methods import minillm
from tests.support.forms import computing

V = 7
ONES, MASK = torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]])
LEAF = torch.ones(2, 3, requires_grad=True)
LOGITS, IDS = torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.long)
HOLES = torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(V, 4)
GOOD = {
    "token_rewards": {"teacher_log_probs": -ONES, "student_log_probs": -ONES, "mask": MASK},
    "rewards_to_go": {"rewards": ONES, "mask": MASK},
    "whiten": {"values": ONES, "mask": MASK},
    "advantages": {"teacher_log_probs": -ONES, "student_log_probs": -ONES, "mask": MASK},
    "importance_weights": {
        "student_log_probs": -ONES, "behaviour_log_probs": -ONES, "mask": MASK,
    },
    "policy_loss": {
        "log_probs": -ONES, "old_log_probs": -ONES, "advantages": ONES, "mask": MASK, "weights": ONES,
    },
    "loss": {
        "student_logits": LOGITS, "teacher_logits": LOGITS, "token_ids": IDS, "mask": MASK,
        "advantages": ONES,
    },
    "linear_loss": {
        "student_hidden": HIDDEN, "student_weight": WEIGHT, "teacher_hidden": HIDDEN,
        "teacher_weight": WEIGHT, "token_ids": IDS, "mask": MASK, "advantages": ONES,
    },
    "pretraining_loss": {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": IDS},
    "mix": {"student_logits": LOGITS, "teacher_logits": LOGITS},
}  # fmt: skip
OF_MASK = [
    ({"mask": MASK.tolist()}, TypeError, "mask must be a tensor"),
    ({"mask": torch.tensor(1)}, ValueError, r"mask must be \[batch, sequence\], got shape \(\)"),
    ({"mask": MASK.cfloat()}, TypeError, "mask must be bool, or 0 and 1, got torch.complex64"),
    ({"mask": MASK * 3}, ValueError, "mask must hold 0 and 1.*got 3"),
    ({"mask": MASK * 0.5}, ValueError, "mask must hold 0 and 1.*got 0.5"),
    ({"mask": MASK * math.nan}, ValueError, "mask must hold 0 and 1.*got nan"),
    ({"mask": LEAF}, ValueError, "mask requires grad"),
    ({"mask": MASK.to_sparse()}, TypeError, "mask must be dense"),
    ({"mask": MASK[:, :2]}, ValueError, r"must have the shape of mask, \(2, 2\), got \(2, 3\)"),
    ({"mask": torch.ones(2, 3, device="meta")}, ValueError, "is on cpu, but mask on meta"),
]
OF_POLICY = [
    ({"clip": 0}, ValueError, "clip must be a positive number, or None for no clipping, got 0"),
    ({"clip": "0.2"}, TypeError, "clip must be a positive number"),
    ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
    ({"advantages": LEAF}, ValueError, "advantages requires grad.*detach it"),
    ({"advantages": HOLES}, ValueError, "advantages must hold finite numbers .*got nan"),
    ({"old_log_probs": LEAF}, ValueError, "old_log_probs requires grad.*detach it"),
    ({"old_log_probs": -ONES / 0}, ValueError, "old_log_probs must hold finite numbers.*got -inf"),
    ({"weights": ONES[:, :2]}, ValueError, "weights must have the shape of mask"),
    ({"weights": IDS}, TypeError, "weights must be float32, bfloat16, .*got torch.int64"),
    ({"weights": LEAF}, ValueError, "weights requires grad"),
]
OF_LOSS = [
    *OF_POLICY,
    ({"token_ids": IDS.float()}, TypeError, "token_ids must be int64 or int32"),
    ({"token_ids": IDS - 100}, ValueError, "token_ids must be ids of the vocabulary where mask is"),
    ({"token_ids": IDS + V}, ValueError, rf"token_ids must lie in \[0, {V}\)"),
    ({"token_ids": IDS[:1]}, ValueError, "token_ids must have the shape of mask"),
    ({"single_step": 1}, TypeError, "single_step must be True or False, got 1"),
    ({"single_step_weights": LEAF}, ValueError, "single_step_weights requires grad"),
    (
        {"single_step_weights": ONES, "single_step": False},
        ValueError,
        "single_step_weights are unused with single_step=False",
    ),
    ({"entropy_coef": math.inf}, ValueError, "entropy_coef must be finite, got inf"),
    ({"entropy_coef": None}, TypeError, "entropy_coef must be a finite number"),
    ({"temperature": 0}, ValueError, "temperature must be positive"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]
CASES = {
    "token_rewards": [
        *OF_MASK,
        ({"scaling": 0}, ValueError, "scaling must be a positive number, got 0"),
        ({"scaling": None}, TypeError, "scaling must be a positive number"),
        ({"clip": -1}, ValueError, "clip must be a positive number, or None for no clipping, got -1"),
        ({"teacher_log_probs": HOLES}, ValueError, "teacher_log_probs must hold numbers.*got nan"),
        ({"student_log_probs": IDS}, TypeError, "student_log_probs must be float32"),
    ],
    "rewards_to_go": [
        *OF_MASK,
        ({"gamma": 1.1}, ValueError, r"gamma must lie in \[0, 1\], got 1.1"),
        ({"include": "all"}, ValueError, "include must be one of 'current', 'next', got 'all'"),
        ({"length_normalization": 1}, TypeError, "length_normalization must be True or False"),
        ({"rewards": [1.0]}, TypeError, "rewards must be a tensor"),
    ],
    "whiten": [
        *OF_MASK,
        ({"count_padding": "no"}, TypeError, "count_padding must be True or False"),
        ({"values": ONES / 0}, ValueError, "values must hold finite numbers where mask is set, got inf"),
    ],
    "advantages": [
        *OF_MASK,
        ({"whitening": 1}, TypeError, "whitening must be True or False"),
        ({"count_padding": 1, "whitening": False}, TypeError, "count_padding must be True or False"),
        ({"scaling": -1}, ValueError, "scaling must be a positive number"),
        ({"gamma": None}, TypeError, "gamma must be a number"),
    ],
    "importance_weights": [
        *OF_MASK,
        ({"product": "all"}, ValueError, "product must be one of 'token', 'before', .*got 'all'"),
        ({"behaviour_log_probs": -ONES / 0}, ValueError, "behaviour_log_probs must hold finite"),
    ],
    "policy_loss": [
        *OF_MASK,
        *OF_POLICY,
        ({"old_log_probs": None}, TypeError, "old_log_probs must be a tensor"),
        ({"log_probs": HOLES}, ValueError, "log_probs must hold numbers where mask is set, got nan"),
    ],
    "loss": [
        *OF_MASK,
        *OF_LOSS,
        ({"teacher_logits": LOGITS[:1]}, ValueError, "teacher_logits must have the leading shape"),
        ({"student_logits": None}, TypeError, "student_logits must be a tensor"),
    ],
    "linear_loss": [
        *OF_MASK,
        *OF_LOSS,
        ({"coefficients": (1, 1, 1)}, TypeError, "unexpected keyword argument 'coefficients'"),
        ({"student_bais": None}, TypeError, "unexpected keyword argument 'student_bais'"),
        ({"vocab_size": 9}, ValueError, "vocab_size must be in"),
    ],
    "pretraining_loss": [
        ({"lm_coef": 0}, ValueError, "lm_coef must be a positive number, got 0"),
        ({"kd_ratio": 1.5}, ValueError, r"kd_ratio must lie in \[0, 1\]"),
        ({"teacher_logits": None}, ValueError, "teacher_logits is None"),
        ({"labels": IDS + V}, ValueError, "labels must lie in"),
    ],
    "mix": [
        ({"teacher_share": -0.1}, ValueError, r"teacher_share must lie in \[0, 1\]"),
        ({"temperature": None}, TypeError, "temperature must be a positive number"),
        ({"teacher_logits": LOGITS[..., :3]}, ValueError, "have 7 columns and teacher_logits 3"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_calls(name):
    function = getattr(minillm, name)
    with computing(AssertionError("something is computed")):
        for given, error, words in CASES[name]:
            with pytest.raises(error, match=f"(?s){words}"):
                function(**GOOD[name] | given)


def test_the_table():
    assert set(CASES) == set(minillm.__all__) - {"MixedSampling"}
    for name, good in GOOD.items():
        getattr(minillm, name)(**good)  # what is wrong is what a case gives
