"""Wrong calls of what takes K tokens a row: selections, log-probabilities, and losses on a support."""

import math

import torch

from tests.interface.hostile_kinds import of_form
from tests.support.forms import CALLED, LOSSES, D, V, tensors_of

IDS = tensors_of("gather_log_probs")["ids"]
OF_SUPPORT = []
for form in CALLED:
    if "support" not in form and "student_topk" not in form:
        continue
    OF_SUPPORT += [
        of_form(form, "k=0", ValueError, rf"k must be in \[1, {V}\], got 0", k=0),
        of_form(form, "k beyond", ValueError, rf"k must be in \[1, {V}\], got {V + 1}", k=V + 1),
        of_form(form, "k beyond the vocabulary", ValueError, r"k must be in \[1, 2\]", vocab_size=2),
        of_form(form, "k=True", TypeError, "k must be an int in", k=True),
        of_form(form, "k=2.0", TypeError, "k must be an int in", k=2.0),
    ]  # fmt: skip
    if form not in LOSSES:
        continue
    OF_SUPPORT += [
        of_form(form, "support", ValueError, "support must be.*did you mean 'student'", support="students"),
        of_form(form, "support None", ValueError, "support must be one of", support=None),
        of_form(form, "tail", ValueError, "tail must be one of .*did you mean 'bucket'", tail="buckets"),
        of_form(form, "infinities", TypeError, "unexpected keyword argument 'infinities'", infinities="drop"),
        of_form(form, "mass_terms=1", TypeError, "mass_terms must be True or False", mass_terms=1),
        of_form(form, "masses of the bucket", ValueError, "mass_terms=True makes up", mass_terms=True),
        of_form(form, "a floor of 0", ValueError, "log_prob_floor must be finite and neg", log_prob_floor=0.0),
        *(
            of_form(form, name, ValueError, "whole row.*support='student'", token_outputs=(name,))
            for name in ("teacher_entropy", "acceptance", "teacher_argmax")
        ),
        of_form(form, "suport", TypeError, "'suport': did you mean 'support'", suport="student"),
    ]  # fmt: skip
OF_SUPPORT += [
    of_form(
        "support_distillation_loss", "teacher of grad", ValueError, "teacher_logits requires grad",
        teacher_logits=torch.zeros(4, V, requires_grad=True),
    ),
    of_form("support_distillation_loss", "no teacher", ValueError, "teacher_logits is None", teacher_logits=None),
    of_form(
        "linear_support_distillation_loss", "teacher of grad", ValueError, "teacher_hidden requires grad",
        teacher_hidden=torch.zeros(4, D, requires_grad=True),
    ),
    of_form(
        "linear_support_distillation_loss", "no teacher", ValueError, "teacher_weight is None",
        teacher_weight=None,
    ),
]  # fmt: skip
for form in ("gather_log_probs", "linear_gather_log_probs"):
    OF_SUPPORT += [
        of_form(form, "ids beyond", ValueError, rf"^ids must lie in \[0, {V}\), or be -1", ids=IDS + V),
        of_form(form, "an id of -2", ValueError, "^ids must lie in .* got -2", ids=IDS * 0 - 2),
        of_form(form, "ids beyond vocab_size", ValueError, r"ids must lie in \[0, 1\)", vocab_size=1),
        of_form(form, "no slots", ValueError, "ids must be .* at least one slot", ids=IDS[:, :0]),
        of_form(form, "1025 slots", ValueError, "slots K must be in .*1025", ids=IDS[:, :1].expand(4, 1025)),
        of_form(form, "a mask of labels", ValueError, "loss_mask .* as token ids", loss_mask=IDS[:, 0] - 100),
        of_form(form, "an infinite weight", ValueError, "finite", loss_mask=torch.full((4,), math.inf)),
        of_form(form, "a mask of grad", ValueError, "loss_mask requires", loss_mask=torch.ones(4).requires_grad_()),
        of_form(form, "temperature", ValueError, "temperature must be positive", temperature=0),
        of_form(form, "vocab_size", ValueError, "vocab_size must be in", vocab_size=V + 1),
        of_form(form, "backend", ValueError, "backend must be one of", backend="gpu"),
    ]  # fmt: skip
for name, tensor in (("logits", torch.zeros(4, V)), ("hidden", torch.zeros(4, D))):
    form = "gather_log_probs" if name == "logits" else "linear_gather_log_probs"
    given = {name: tensor.requires_grad_()}
    OF_SUPPORT.append(
        of_form(form, f"{name} of grad", ValueError, f"{name} requires grad, but", **given)
    )
