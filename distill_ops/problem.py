"""What a call is, in types: its options, and the tensors of each form.

Nothing here computes a loss. ``operators/register.py`` derives from the annotations of the inputs and
options what PyTorch must know of them."""

import math
from typing import NamedTuple

import torch

from .arguments import NO_TAIL, LossArguments, Tail
from .divergences.base import DIVERGENCES, Divergence
from .groups import WHOLE, Split
from .kernels.launch import STATISTICS, TOKEN_STATISTICS, TOPK_STATISTICS
from .rows import TopKTeacher
from .scalars import INT64

NO_GRADIENT, FORWARD, BACKWARD = "none", "forward", "backward"  # when a gradient is made


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Of sums and results: float32, or float64 where a tensor is."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def ids_below(split: Split, n_cols: int) -> int:
    """The bound of labels and ids: ``n_cols`` of a vocabulary that is whole; of another what is known."""
    if split.group is None:
        return n_cols
    return INT64[1] if split.bound is None else split.bound


class Options(NamedTuple):
    """The options of a loss, checked."""

    divergence: str
    reduction: str
    infinities: str
    backend: str  # "triton" or "torch"
    tail: str | None  # of a top-k teacher
    temperature: float
    divergence_scale: float  # 1, or temperature squared
    hard_label_weight: float
    soft_weight: float  # of the divergence
    denominator: float | None  # of "mean", where a number was given
    parameters: tuple[float | None, ...]  # of the divergence; None: among the tensors
    n_cols: int
    ignore_index: int
    components: bool  # whether they are asked for
    token_outputs: tuple[str, ...]  # names of those that are, in the order of TokenOutputs
    mass_terms: bool  # of a top-k teacher, as in Tail
    log_prob_floor: float | None
    split: Split = WHOLE  # n_cols are then this rank's columns

    @classmethod
    def of(
        cls,
        arguments: LossArguments,
        n_cols: int,
        backend: str,
        tail: Tail = NO_TAIL,
        split: Split = WHOLE,
    ) -> "Options":
        """Of checked arguments."""
        a, temperature = arguments, arguments.temperature
        given = None if isinstance(a.normalizer, torch.Tensor) else a.normalizer
        return cls(
            a.divergence.name, a.reduction, a.infinities, backend, tail.name, temperature,
            temperature**2 if a.scale_by_temperature_squared else 1.0, a.hard_label_weight, a.share, given,
            a.divergence.numbers, n_cols, a.ignore_index, a.return_components and a.hard,
            a.token_outputs, tail.mass_terms, tail.log_prob_floor, split,
        )  # fmt: skip

    soft, hard = LossArguments.soft, LossArguments.hard
    share = property(lambda self: self.soft_weight)

    @property
    def bound(self) -> int:
        """Labels and ids lie below it."""
        return ids_below(self.split, self.n_cols)

    @property
    def tail_options(self) -> Tail:
        return Tail(self.tail, self.mass_terms, self.log_prob_floor)

    def kind(self) -> type[Divergence] | None:
        """The divergence's class, which has its facts; None where it has no part in the loss."""
        return DIVERGENCES[self.divergence] if self.soft else None


class Wanted(NamedTuple):
    """Which gradients of a head are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Wanted(False, False, False)


def leading_of_all(leading: torch.Size, ranks: int) -> torch.Size:
    """Of tokens ``leading``, in which each of that many ranks has its part of the first dimension."""
    return leading if ranks == 1 else torch.Size((leading[0] * ranks, *leading[1:]))


def shaped_as_all(inputs, ranks: int):
    """A linear form's inputs with hidden states of all tokens, without their values, where that many ranks
    split the tokens."""
    if ranks == 1:
        return inputs
    return inputs._replace(
        **{
            name: x.new_empty(()).expand(*leading_of_all(x.shape[:-1], ranks), x.shape[-1])
            for name, x in inputs._asdict().items()
            if name.endswith("hidden") and x is not None
        }
    )


class HeadOptions(NamedTuple):
    """How hidden states become logits: ``softcap((hidden weight^T + bias) * logit_scale)``."""

    logit_scale: float
    softcap: float | None


class BlockOptions(NamedTuple):
    """How logits are formed a block of tokens at a time."""

    logits_dtype: torch.dtype
    autocast: torch.dtype | None  # in which it has products made
    memory_budget: int | None
    kept_tokens: int | None
    token_ranks: int = 1  # that split the tokens of the hidden states, and the vocabulary


class LinearOptions(NamedTuple):
    """The options of a loss of hidden states."""

    loss: Options
    student: HeadOptions
    teacher: HeadOptions
    blocks: BlockOptions
    support: str | None = None  # whose largest logits are a row's outcomes: "student" or "teacher"
    support_k: int | None = None  # how many of them


class TokenOptions(NamedTuple):
    """The options of token log-probabilities."""

    backend: str
    temperature: float
    ignore_index: int
    entropy: bool  # whether it is asked for
    split: Split = WHOLE

    def bound(self, n_cols: int) -> int:
        """Ids of logits of so many columns lie below it."""
        return ids_below(self.split, n_cols)


class LinearTokenOptions(NamedTuple):
    """The options of token log-probabilities of hidden states."""

    tokens: TokenOptions
    head: HeadOptions
    blocks: BlockOptions


class StatisticsOptions(NamedTuple):
    """The options of the statistics of tokens."""

    loss: Options
    coefficients: tuple[float | None, ...]  # empty: no loss; None: among the tensors


class LinearStatisticsOptions(NamedTuple):
    """The options of the statistics of tokens of hidden states."""

    loss: Options
    student: HeadOptions
    teacher: HeadOptions
    blocks: BlockOptions
    coefficients: tuple[float | None, ...]  # empty: no loss; None: among the tensors


class MetricsOptions(NamedTuple):
    """The options of the metrics."""

    backend: str
    temperature: float
    n_cols: int
    split: Split = WHOLE


class DenseInputs(NamedTuple):
    """The tensors of the loss of logits."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor | None  # [..., V]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]: those of the divergence that are tensors
    token_ids: torch.Tensor | None  # [...]: of the log-probabilities; None: the labels
    teacher_rows: torch.Tensor | None = None  # [...]: the teacher's row of each token

    @property
    def leading(self) -> torch.Size:
        return self.student.shape[:-1]

    @property
    def teacher_leading(self) -> torch.Size:
        return self.teacher.shape[:-1]

    @property
    def n_rows(self) -> int:
        return math.prod(self.leading)

    @property
    def statistics(self) -> int:
        """Numbers that the kernel keeps of a row for a gradient made in the backward."""
        return STATISTICS

    def dtype(self) -> torch.dtype:
        return working_dtype(self.student, self.teacher)


class TopKInputs(NamedTuple):
    """The tensors of the loss of logits against a top-k teacher."""

    student: torch.Tensor  # [..., V]
    log_probs: torch.Tensor  # [..., K]
    ids: torch.Tensor  # [..., K]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]
    token_ids: torch.Tensor | None  # [...]
    teacher_rows: torch.Tensor | None = None  # [...]

    leading = DenseInputs.leading
    n_rows = DenseInputs.n_rows
    statistics = property(lambda self: TOPK_STATISTICS)
    teacher_leading = property(lambda self: self.ids.shape[:-1])

    @property
    def teacher(self) -> TopKTeacher:
        return TopKTeacher.of_tokens(self.log_probs, self.ids)

    def dtype(self) -> torch.dtype:
        return working_dtype(self.student, self.log_probs)


class LinearInputs(NamedTuple):
    """The tensors of the loss of hidden states."""

    student_hidden: torch.Tensor  # [..., d]
    student_weight: torch.Tensor  # [V, d]
    student_bias: torch.Tensor | None  # [V]
    teacher_hidden: torch.Tensor | None  # [..., d of its own]
    teacher_weight: torch.Tensor | None
    teacher_bias: torch.Tensor | None
    teacher_log_probs: torch.Tensor | None  # [..., K]: of a top-k teacher, who has no head
    teacher_ids: torch.Tensor | None  # [..., K]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]
    token_ids: torch.Tensor | None  # [...]
    teacher_rows: torch.Tensor | None = None  # [...]
    teacher_logits: torch.Tensor | None = None  # [..., V]: of a teacher without a head

    @property
    def leading(self) -> torch.Size:
        return self.student_hidden.shape[:-1]

    @property
    def teacher_leading(self) -> torch.Size:
        of_any = self.teacher_hidden, self.teacher_ids, self.teacher_logits
        return next(x for x in of_any if x is not None).shape[:-1]

    n_rows = DenseInputs.n_rows

    @property
    def student(self) -> tuple[torch.Tensor | None, ...]:
        """Hidden states, weight and bias of the student's head."""
        return self.student_hidden, self.student_weight, self.student_bias

    @property
    def teacher(self) -> tuple[torch.Tensor | None, ...]:
        return self.teacher_hidden, self.teacher_weight, self.teacher_bias

    def dtype(self) -> torch.dtype:
        teacher = *self.teacher, self.teacher_log_probs, self.teacher_logits
        return working_dtype(*self.student, *teacher)


class TokenInputs(NamedTuple):
    """The tensors of token log-probabilities."""

    logits: torch.Tensor  # [..., V]
    ids: torch.Tensor  # [...]

    statistics = property(lambda self: TOKEN_STATISTICS)

    @property
    def leading(self) -> torch.Size:
        return self.ids.shape

    n_rows = DenseInputs.n_rows

    def dtype(self) -> torch.dtype:
        return working_dtype(self.logits)


class LinearTokenInputs(NamedTuple):
    """The tensors of token log-probabilities of hidden states."""

    hidden: torch.Tensor  # [..., d]
    weight: torch.Tensor  # [V, d]
    bias: torch.Tensor | None  # [V]
    ids: torch.Tensor  # [...]

    statistics = TokenInputs.statistics
    leading = TokenInputs.leading
    n_rows = DenseInputs.n_rows

    def dtype(self) -> torch.dtype:
        return working_dtype(self.hidden, self.weight, self.bias)


class StatisticsInputs(NamedTuple):
    """The tensors of the statistics of tokens."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor  # [..., V]
    ids: torch.Tensor  # [...]
    parameters: list[torch.Tensor]  # each [] or [...]
    coefficients: list[torch.Tensor]  # each [] or [...]: of the loss, where there is one

    leading = DenseInputs.leading
    n_rows = DenseInputs.n_rows
    dtype = DenseInputs.dtype


class LinearStatisticsInputs(NamedTuple):
    """The tensors of the statistics of tokens of hidden states."""

    student_hidden: torch.Tensor  # [..., d]
    student_weight: torch.Tensor  # [V, d]
    student_bias: torch.Tensor | None  # [V]
    teacher_hidden: torch.Tensor  # [..., d of its own]
    teacher_weight: torch.Tensor
    teacher_bias: torch.Tensor | None
    ids: torch.Tensor  # [...]
    parameters: list[torch.Tensor]  # each [] or [...]
    coefficients: list[torch.Tensor]  # each [] or [...]

    leading = LinearInputs.leading
    n_rows = DenseInputs.n_rows
    student = LinearInputs.student
    teacher = LinearInputs.teacher

    def dtype(self) -> torch.dtype:
        return working_dtype(*self.student, *self.teacher)


class MetricsInputs(NamedTuple):
    """The tensors of the metrics."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor  # [..., V]

    leading = DenseInputs.leading
    n_rows = DenseInputs.n_rows
    dtype = DenseInputs.dtype


# the users' names of what has a vocabulary's or a head's width, by its field in the inputs
STREAMED = {
    "student": "student_logits", "teacher": "teacher_logits", "logits": "logits",
    "student_hidden": "student_hidden", "student_weight": "student_weight",
    "teacher_hidden": "teacher_hidden", "teacher_weight": "teacher_weight",
    "teacher_logits": "teacher_logits",
    "hidden": "hidden", "weight": "weight",
}  # fmt: skip
