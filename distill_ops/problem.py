"""What a call is, in types: its options, the tensors of each form, its tokens, teachers and results.

Nothing here computes a loss. ``operators/register.py`` derives from the annotations of the inputs and
options what PyTorch must know of them.
"""

import math
from typing import NamedTuple

import torch

from .arguments import LossArguments
from .divergences.base import DIVERGENCES, Divergence
from .kernels.launch import STATISTICS, TOKEN_STATISTICS, TOPK_STATISTICS

NO_GRADIENT, FORWARD, BACKWARD = "none", "forward", "backward"  # when a gradient is made


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Of sums and results: float32, or float64 where a tensor is."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


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

    @classmethod
    def of(
        cls, arguments: LossArguments, n_cols: int, backend: str, tail: str | None = None
    ) -> "Options":
        """Of checked arguments."""
        a, temperature = arguments, arguments.temperature
        given = None if isinstance(a.normalizer, torch.Tensor) else a.normalizer
        return cls(
            a.divergence.name, a.reduction, a.infinities, backend, tail, temperature,
            temperature**2 if a.scale_by_temperature_squared else 1.0, a.hard_label_weight, a.share, given,
            a.divergence.numbers, n_cols, a.ignore_index,
            a.return_components and a.hard,
        )  # fmt: skip

    soft, hard = LossArguments.soft, LossArguments.hard
    share = property(lambda self: self.soft_weight)

    def kind(self) -> type[Divergence] | None:
        """The divergence's class, which has its facts; None where it has no part in the loss."""
        return DIVERGENCES[self.divergence] if self.soft else None


class Wanted(NamedTuple):
    """Which gradients of a head are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Wanted(False, False, False)


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


class LinearOptions(NamedTuple):
    """The options of a loss of hidden states."""

    loss: Options
    student: HeadOptions
    teacher: HeadOptions
    blocks: BlockOptions


class TokenOptions(NamedTuple):
    """The options of token log-probabilities."""

    backend: str
    temperature: float
    ignore_index: int
    entropy: bool  # whether it is asked for


class LinearTokenOptions(NamedTuple):
    """The options of token log-probabilities of hidden states."""

    tokens: TokenOptions
    head: HeadOptions
    blocks: BlockOptions


class MetricsOptions(NamedTuple):
    """The options of the metrics."""

    backend: str
    temperature: float
    n_cols: int


class TopKTeacher(NamedTuple):
    """In the place of the teacher's logits: its K log-probabilities a row."""

    log_probs: torch.Tensor  # [n, K]
    ids: torch.Tensor  # [n, K]

    @staticmethod
    def of_tokens(log_probs: torch.Tensor, ids: torch.Tensor) -> "TopKTeacher":
        """Of slots ``[..., K]``, which may be a view of more that are stored."""
        shape = math.prod(ids.shape[:-1]), ids.shape[-1]
        return TopKTeacher(*(x.contiguous().view(shape) for x in (log_probs, ids)))

    def rows(self, rows: slice | torch.Tensor) -> "TopKTeacher":
        return TopKTeacher(self.log_probs[rows], self.ids[rows])


class DenseInputs(NamedTuple):
    """The tensors of the loss of logits."""

    student: torch.Tensor  # [..., V]
    teacher: torch.Tensor | None  # [..., V]
    loss_mask: torch.Tensor | None  # [...]
    labels: torch.Tensor | None  # [...]
    normalizer: torch.Tensor | None  # []
    parameters: list[torch.Tensor]  # each [] or [...]: those of the divergence that are tensors
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

    leading = DenseInputs.leading
    n_rows = DenseInputs.n_rows
    dtype = DenseInputs.dtype


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


class Tokens(NamedTuple):
    """What rows of logits come with: for all of them, or one entry a row."""

    labels: torch.Tensor | None  # [n]
    weights: torch.Tensor | None  # [n]; None: all 1
    denominator: float | torch.Tensor  # of the reduction, a number or []
    parameters: tuple[float | torch.Tensor, ...]  # of the divergence: numbers, [] or [n]
    teacher_rows: torch.Tensor | None = None  # [n]; None: the teacher's rows are theirs, in order

    def rows(self, rows: slice | torch.Tensor) -> "Tokens":
        """Those of some rows: a slice, or their indices."""

        def part(value):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                return value
            return value[rows] if isinstance(rows, slice) else value.index_select(0, rows)

        parameters = tuple(part(value) for value in self.parameters)
        return Tokens(
            part(self.labels), part(self.weights), self.denominator, parameters,
            teacher_rows=part(self.teacher_rows),
        )  # fmt: skip


def within_teacher(
    teacher_rows: torch.Tensor, n_rows: int, weights: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ``[n]`` that lie in [0, n_rows), and weights that are NaN where a token that counts had one
    outside: on a GPU, where no index is looked at, its loss tells."""
    outside = (teacher_rows < 0) | (teacher_rows >= n_rows)
    if weights is None:
        weights = torch.ones_like(teacher_rows, dtype=dtype)
    weights = torch.where(outside & (weights != 0), math.nan, weights)
    return teacher_rows.clamp(0, max(n_rows - 1, 0)), weights


def parameters_of(inputs, options: Options) -> tuple[float | torch.Tensor, ...]:
    """The divergence's parameters in order: numbers, and tensors ``[]`` or ``[n]``."""
    tensors = (t.reshape(-1) if t.dim() else t for t in inputs.parameters)
    return tuple(next(tensors) if x is None else x for x in options.parameters)


class LossComponents(NamedTuple):
    """A loss and its two parts, detached and reduced like it, for logging (nats).

    Example:
        >>> import torch, distill_ops
        >>> student, teacher = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 4)
        >>> losses = distill_ops.distillation_loss(
        ...     student, teacher, labels=torch.tensor([3]), divergence="forward_kl",
        ...     hard_label_weight=0.5, return_components=True,
        ... )
        >>> losses.loss.backward()
        >>> round(losses.divergence.item(), 4), round(losses.hard_label.item(), 4)  # log(4)
        (0.0, 1.3863)
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    hard_label: torch.Tensor


class DistillationStatistics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    ``divergence``, ``student_log_prob`` and ``student_entropy`` are differentiable.

    Example:
        >>> import torch, distill_ops
        >>> logits, ids = torch.zeros(2, 4), torch.tensor([3, -100])
        >>> found = distill_ops.distillation_statistics(logits, logits, ids)
        >>> [round(x, 4) for x in found.student_log_prob.tolist()], found.top1_agreement.tolist()
        ([-1.3863, 0.0], [True, False])
    """

    divergence: torch.Tensor
    student_log_prob: torch.Tensor  # of the token's id
    teacher_log_prob: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals


class DistillationMetrics(NamedTuple):
    """Per token, ``[...]``; nats, float32 (float64 for float64 logits), but the top-1 agreement.

    A divergence that is infinite (one model excludes a token that the other does not) is +inf.

    Example:
        >>> import torch, distill_ops
        >>> logits = torch.zeros(3, 4)
        >>> metrics = distill_ops.distillation_metrics(logits, logits)
        >>> metrics.expected_acceptance.tolist(), round(metrics.student_entropy[0].item(), 4)
        ([1.0, 1.0, 1.0], 1.3863)
    """

    forward_kl: torch.Tensor  # KL(teacher || student)
    reverse_kl: torch.Tensor  # KL(student || teacher)
    jensen_shannon: torch.Tensor  # beta 0.5
    total_variation: torch.Tensor
    expected_acceptance: torch.Tensor  # sum(min(p, q)): of speculative decoding (arXiv:2211.17192)
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # bool: the same most likely token; the first of equals
