"""Calls with a split vocabulary: the whole tensors, what rows hold, and each rank's part of them."""

import math
from itertools import accumulate, product
from typing import NamedTuple
from zlib import crc32

import torch

from tests.support.cases import DIVERGENCES as BUILT_IN
from tests.support.cases import TOKENS
from tests.support.declared import chi_squared, renyi_like
from tests.support.forms import CALLED, COUNTED, Form, K
from tests.support.helpers import make_ids, make_logits, topk_of
from tests.support.linear_cases import make_pair

INF = math.inf
DIVERGENCES = [*BUILT_IN, renyi_like(0.4), chi_squared()]
N_COLS = 33  # the options of tests/support/cases.py go with it
HIDDEN = "student_hidden", "teacher_hidden", "hidden"
BEYOND = 20  # the first of the columns that an edit spoils
WIDTHS = {2: (14, 19), 3: (2, 3, 28), 4: (9, 4, 1, 19)}  # of each rank; labels lie on several
SPLIT = {  # along which dimension ranks share what is called so
    "student_logits": -1, "teacher_logits": -1, "logits": -1, "student_weight": 0,
    "student_bias": 0, "teacher_weight": 0, "teacher_bias": 0, "weight": 0, "bias": 0,
}  # fmt: skip


def widths_of(*of) -> tuple[int, ...]:
    """Of two, three or four ranks: one for each case of a matrix, which thus is no larger by worlds."""
    return WIDTHS[2 + crc32(repr(of).encode()) % len(WIDTHS)]


def make_heads(n_cols: int):
    return make_pair(TOKENS, n_cols, (6, 8), bias=True)


class Case(NamedTuple):
    """A call, of which each rank has ``widths[rank]`` columns."""

    widths: tuple[int, ...] = WIDTHS[2]
    options: dict = {}
    dtype: torch.dtype = torch.float32
    form: str = "distillation_loss"
    edit: str = "nothing"  # what EDITS do with the whole tensors
    told: str = (
        "offset"  # what says where a rank's columns begin: "offset", "nothing" or "placement"
    )
    whole_teacher: bool = False  # whether each rank has all of the teacher
    padded: int = 0  # columns, of NaN, that a whole teacher's logits have more
    replicated: bool = False  # whether a whole teacher's logits are a DTensor too

    @property
    def of_form(self) -> Form:
        return CALLED[self.form]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole ones that the form takes, by name."""
        n_cols = sum(self.widths)
        student, teacher = make_logits((*TOKENS, n_cols))
        log_probs, ids = topk_of(teacher, K)
        pair = make_heads(n_cols)
        made = {
            **pair._asdict(), "student_logits": student, "teacher_logits": teacher, "logits": student,
            "hidden": pair.student_hidden, "weight": pair.student_weight, "bias": pair.student_bias,
            "teacher_log_probs": log_probs, "teacher_ids": ids, "token_ids": make_ids(TOKENS, n_cols),
        }  # fmt: skip
        (EDITS | SLOT_EDITS)[self.edit](made, self.widths)
        names = (*self.of_form.positional, *self.of_form.named)
        wide = lambda x: x if x is None or not x.is_floating_point() else x.to(self.dtype)
        return {name: wide(made[name]) for name in names if name not in COUNTED}

    def sizes(self, name: str) -> tuple[int, list[int]] | None:
        """Along which dimension ranks share a tensor, and what of it each has; None: all of it."""
        if name in HIDDEN and self.options.get("sequence_parallel"):
            n = len(self.widths)
            return 0, [TOKENS[0] // n] * n
        if name not in SPLIT or (self.whole_teacher and name.startswith("teacher")):
            return None
        return SPLIT[name], list(self.widths)

    def part(self, rank: int) -> tuple[dict[str, torch.Tensor], dict]:
        """A rank's tensors, of memory of their own, and its options but for the group."""
        tensors = self.tensors()
        for name, whole in tensors.items():
            if whole is not None and (shared := self.sizes(name)):
                tensors[name] = whole.split(shared[1], shared[0])[rank].clone()
        if self.padded:
            teacher = tensors["teacher_logits"]
            tensors["teacher_logits"] = torch.nn.functional.pad(
                teacher, (0, self.padded), value=torch.nan
            )
        offset = {"vocab_offset": sum(self.widths[:rank])} if self.told == "offset" else {}
        return tensors, {**offset, **self.options}


# --- what rows hold ------------------------------------------------------------------------------


def edges(widths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(widths)]


def dead_part(*names: str, rank: int = 1):
    """The rank's columns are -inf, in those tensors."""

    def edit(tensors, widths):
        begin, end = edges(widths)[rank : rank + 2]
        for name in names:
            tensors[name][..., begin:end] = -INF

    return edit


def some_infinite(tensors, widths):
    """A few columns of the last rank, other ones in the student than in the teacher, and in some rows."""
    begin = edges(widths)[-2]
    tensors["student_logits"][..., begin] = -INF
    tensors["student_logits"][0, :, begin + 2] = -INF
    tensors["teacher_logits"][..., begin + 1 : begin + 3] = -INF
    tensors["teacher_logits"][1, 1, 0] = -INF


def padding(tensors, widths):
    """The last columns of both are."""
    for name in ("student_logits", "teacher_logits"):
        tensors[name][..., -3:] = -INF


def bad_rows(tensors, widths):
    """One rank has NaN in one row and +inf in another."""
    begin = edges(widths)[1]
    tensors["student_logits"][0, 0, begin] = math.nan
    tensors["student_logits"][0, 2, 0] = INF
    tensors["teacher_logits"][1, 0, -1] = math.nan


def each_row_another(tensors, widths):
    """Rows with finite logits, some infinite ones, one rank's part infinite in the student, in the teacher
    and in both, and NaN."""
    student, teacher = (tensors[f"{side}_logits"].flatten(0, 1) for side in ("student", "teacher"))
    begin, end = edges(widths)[1:3]
    student[1, begin], teacher[1, begin + 1 : begin + 3] = -INF, -INF
    student[2, begin:end] = -INF
    teacher[3, begin:end] = -INF
    student[4, :begin], teacher[4, :begin] = -INF, -INF
    student[5, begin] = math.nan


def dead_rows(tensors, widths):
    """Rows without a softmax, on every rank."""
    tensors["student_logits"][0, 0] = -INF
    tensors["teacher_logits"][1, 2] = -INF


def far(tensors, widths):
    """Parts that are far from each other and from zero."""
    for name, step in (("student_logits", 4.0), ("teacher_logits", 3.0)):
        for rank, (begin, end) in enumerate(zip(edges(widths), edges(widths)[1:], strict=False)):
            tensors[name][..., begin:end] += step * rank + 300.0


def huge(tensors, widths):
    """Logits of one rank that a quotient by a temperature below 1 puts beyond float32."""
    for name in ("student_logits", "teacher_logits"):
        tensors[name][0, 0, 0] = 3e38
    tensors["teacher_logits"][1, 1, -1] = 3e38


def equal(tensors, widths):
    """The teacher is nearly the student, so that divergences are small against their terms."""
    tensors["teacher_logits"].copy_(tensors["student_logits"])
    tensors["teacher_logits"][..., ::5] += 0.05


def no_teacher(tensors, widths):
    tensors["teacher_logits"] = None


def beyond(tensors, widths):
    """Nobody reads these columns."""
    for name in ("student_logits", "teacher_logits"):
        tensors[name][..., BEYOND:] = math.nan


def unread(tensors, widths):
    """What the token that is ignored has is NaN."""
    for name in ("student_logits", "teacher_logits", *HIDDEN):
        tensors[name][tensors["token_ids"] == -100] = math.nan


def no_token(tensors, widths):
    """All tokens are ignored, and what they have is NaN."""
    tensors["token_ids"].fill_(-100)
    unread(tensors, widths)


def counted_ids(tensors, widths):
    """Ids of every rank, some that may be an ignored one, and one just before a rank's columns."""
    tensors["token_ids"].copy_(torch.tensor([[0, 5, 31], [6, 4, 32]]))


def low(tensors, widths):
    """All logits are far below 0, but for those of a rank that are -inf."""
    for name in ("student_logits", "teacher_logits"):
        tensors[name] -= 300.0
    dead_part("student_logits", "teacher_logits")(tensors, widths)


def lowest(tensors, widths):
    """A rank's logits are the lowest float32 in some rows, and those of another near the highest."""
    begin, end = edges(widths)[1:3]
    for name in ("student_logits", "teacher_logits"):
        tensors[name][0, :, begin:end] = torch.finfo(torch.float32).min
        tensors[name][0, 2, 0] = 1e38


OF_TOKENS = {
    "lowest": lowest, "unread": unread, "no token": no_token, "counted ids": counted_ids, "low": low,
}  # fmt: skip
EDITS = OF_TOKENS | {
    "nothing": lambda tensors, widths: None,
    "dead student": dead_part("student_logits"),
    "dead teacher": dead_part("teacher_logits"),
    "dead part": dead_part("student_logits", "teacher_logits"),
    "dead first part": dead_part("student_logits", "teacher_logits", rank=0),
    "some infinite": some_infinite,
    "padding": padding,
    "bad rows": bad_rows,
    "each row another": each_row_another,
    "dead rows": dead_rows,
    "far": far,
    "equal": equal,
    "huge": huge,
    "no teacher": no_teacher,
    "beyond": beyond,
}


# --- ... and the slots of a top-k teacher -----------------------------------------------------------


def unused_slots(tensors, widths):
    """One in each row, all but one, and the first."""
    ids = tensors["teacher_ids"]
    ids[..., 1] = -1
    ids[0, 0, 1:] = -1
    ids[1, 1, 0] = -1


def on_one_rank(tensors, widths):
    """All slots of a row are columns of one rank, of another one row by row."""
    parts = [
        (begin, begin + width)
        for begin, width in zip(edges(widths), widths, strict=False)
        if width >= K
    ]
    log_probs, ids = (tensors[name] for name in SLOTS)
    for row, place in enumerate(product(*map(range, TOKENS))):
        begin, end = parts[row % len(parts)]
        log_probs[place], found = topk_of(tensors["teacher_logits"][place][begin:end], K)
        ids[place] = found + begin


def every_column(tensors, widths):
    """The K cover the vocabulary."""
    tensors |= zip(SLOTS, topk_of(tensors["teacher_logits"], sum(widths)), strict=True)


def excluded(tensors, widths):
    """The teacher excludes a token, the student another, and a server repeats an id to fill the slots."""
    log_probs, ids = (tensors[name] for name in SLOTS)
    log_probs[0, :, -1] = -INF
    log_probs[1, 0, 1:] = -INF
    ids[1, 0, 2] = ids[1, 0, 0]
    tensors["student_logits"][0, 1] = tensors["student_logits"][0, 1].scatter(
        0, ids[0, 1, :1], -INF
    )


def confident(tensors, widths):
    """Both models are nearly sure of the same token, and nearly agree."""
    log_probs, ids = (tensors[name] for name in SLOTS)
    log_probs.copy_(torch.tensor([-1e-6, -15.0, -18.0]).expand_as(log_probs))
    student = tensors["student_logits"].fill_(-25.0)
    student.scatter_(-1, ids, log_probs + 0.05 * torch.tensor([0.0, 1.0, -1.0]))


SLOTS = "teacher_log_probs", "teacher_ids"
SLOT_EDITS = {
    "unused slots": unused_slots,
    "on one rank": on_one_rank,
    "every column": every_column,
    "excluded": excluded,
    "confident": confident,
}
