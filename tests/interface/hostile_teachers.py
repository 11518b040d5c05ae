"""Wrong indices of a teacher's rows, and logits that are no teacher's, or not alone."""

import torch

from tests.interface.hostile_kinds import of_form
from tests.support.forms import SHARED_ROWS, SLOTS, R, V, tensors_of

HIDDEN_OR_GIVEN = {"teacher_hidden", "teacher_logits", *SLOTS}  # tensors of a teacher's rows
CHOSEN = []
for form in SHARED_ROWS:
    rows, of_teacher = (
        torch.tensor([2, 0, 2, 1]),
        {k for k in tensors_of(form) if k in HIDDEN_OR_GIVEN},
    )
    CHOSEN += [
        of_form(
            form, "a row beyond", ValueError, rf"teacher_rows must lie in \[0, {R}\), .*got {R}$",
            teacher_rows=torch.tensor([2, 0, R, 1]),
        ),
        of_form(
            form, "a negative row", ValueError, "teacher_rows must .*got -1; .*needs a loss_mask of 0",
            teacher_rows=torch.tensor([2, 0, -1, 1]),
        ),
        of_form(
            form, "rows of another shape", ValueError, "teacher_rows must have the leading shape of student_",
            teacher_rows=rows[None],
        ),
        of_form(
            form, "a teacher without rows", ValueError, "teacher_.* has no row that teacher_rows could choose",
            **{name: tensors_of(form)[name][:0] for name in of_teacher},
        ),
    ]  # fmt: skip
for form, name in (
    ("distillation_loss/rows", "teacher_logits"), ("topk_distillation_loss/rows", "teacher_log_probs"),
    ("linear_distillation_loss/rows", "teacher_hidden"),
):  # fmt: skip
    CHOSEN.append(
        of_form(
            form, "rows of no teacher", ValueError, f"teacher_rows is unused where {name} is None",
            hard_label_weight=1.0, **{name: None},
        )
    )  # fmt: skip
LOGITS = "linear_distillation_loss/logits"
GIVEN = [
    of_form(
        LOGITS, "a head too", ValueError, "teacher_logits stand for .*teacher_hidden is given too",
        teacher_hidden=torch.zeros(4, 5), teacher_weight=torch.zeros(V, 5),
    ),
    of_form(
        LOGITS, "a weight too", ValueError, "teacher_logits stand for .*teacher_weight is given too",
        teacher_weight=torch.zeros(V, 5),
    ),
    of_form(
        LOGITS, "other columns", ValueError, f"student_weight has {V} rows and teacher_logits 9 columns: pass voc",
        teacher_logits=torch.zeros(R, 9),
    ),
    of_form(
        LOGITS, "more columns than there are", ValueError, rf"vocab_size must be in \[1, 9\], got {V}",
        teacher_logits=torch.zeros(R, 9), vocab_size=V,
    ),
    of_form(
        LOGITS, "logits that require grad", ValueError, "teacher_logits requires grad",
        teacher_logits=torch.zeros(R, V, requires_grad=True),
    ),
    of_form(
        LOGITS, "as many rows as it likes", ValueError, "teacher_logits must have the leading shape of student_h",
        teacher_rows=None,
    ),
    of_form(LOGITS, "a softcap", ValueError, "teacher_softcap is unused where", teacher_softcap=30.0),
    of_form(LOGITS, "a scale", ValueError, "teacher_logit_scale is unused where", teacher_logit_scale=2.0),
    of_form(LOGITS, "a bias", ValueError, "teacher_bias is unused where", teacher_bias=torch.zeros(V)),
]  # fmt: skip
