"""Cases that several files share: the divergences, the options, and views of logits."""

import torch

from distill_ops.divergences.built_in import BUILT_IN

# what the defaults leave out; every other divergence comes with its own
PARAMETERS = {
    "jensen_shannon": [(0.5,), (0.1,)],
    "symmetric_kl": [(0.3,)],
    "skew_reverse_kl": [(0.2,)],
}
DIVERGENCES = [
    kind(*parameters)
    for name, kind in BUILT_IN.items()
    for parameters in PARAMETERS.get(name, [()])
]
KINDS = list({d.operands: d for d in reversed(DIVERGENCES)}.values())  # one for each operands

TOKENS = (2, 3)
LABELS = torch.tensor([[3, -100, 0], [6, 1, -100]])
FLOAT_MASK = torch.tensor([[0.5, 1.0, 0.0], [-0.25, 2.0, 1.5]])
BOOL_MASK = torch.tensor([[True, False, True], [True, True, False]])

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "low_temperature": {"temperature": 0.3},
    "temperature_squared": {"temperature": 2.0, "scale_by_temperature_squared": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "bool_mask": {"loss_mask": BOOL_MASK},
    "int_mask": {"loss_mask": BOOL_MASK.int(), "reduction": "sum"},
    "float_mask": {"loss_mask": FLOAT_MASK},
    "float_mask_none": {"loss_mask": FLOAT_MASK, "reduction": "none"},
    "labels_drop": {"labels": LABELS},
    "ignore_index": {"labels": LABELS, "ignore_index": 6},
    "hard": {"labels": LABELS, "hard_label_weight": 0.4},
    "hard_masked": {"labels": LABELS, "hard_label_weight": 0.4, "loss_mask": FLOAT_MASK},
    "hard_temperature": {
        "labels": LABELS, "hard_label_weight": 0.7, "temperature": 2.0,
        "scale_by_temperature_squared": True,
    },
    "two_weights": {
        "labels": LABELS, "hard_label_weight": 1.5, "soft_weight": 2.5, "loss_mask": FLOAT_MASK,
    },
    "soft_weight": {"soft_weight": -0.5, "gradient": "backward", "temperature": 2.0},
    "hard_none": {"labels": LABELS, "hard_label_weight": 0.4, "reduction": "none"},
    "hard_only": {"labels": LABELS, "hard_label_weight": 1.0},
    "normalizer": {"normalizer": 17, "loss_mask": BOOL_MASK},
    "normalizer_tensor": {"normalizer": torch.tensor(11), "labels": LABELS},
    "vocab_size": {"vocab_size": 29},
    "vocab_size_hard": {"vocab_size": 29, "labels": LABELS, "hard_label_weight": 0.5},
    "gradient_backward": {"gradient": "backward", "loss_mask": FLOAT_MASK},
    "hard_backward": {
        "gradient": "backward", "labels": LABELS, "hard_label_weight": 0.3, "temperature": 1.5,
    },
    "propagate": {"infinities": "propagate"},
}  # fmt: skip


def padded_rows(x):
    """The same rows in a buffer whose rows are wider."""
    return torch.cat([x, torch.full_like(x, 99.0)], -1)[..., : x.shape[-1]]


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "later": lambda x: x[:, 1:],
    "padded": padded_rows,
    "transposed_tokens": lambda x: x.transpose(0, 1),
    "every_second": lambda x: x[:, ::2],
    "three_strides": lambda x: padded_rows(x.view(2, 2, 3, -1))[:, :, :2].transpose(0, 1),
    "strided_columns": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
