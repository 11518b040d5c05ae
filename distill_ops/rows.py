"""What rows of logits come with: their tokens, and the slots of a top-k teacher."""

import math
from typing import NamedTuple

import torch

# Of token ids counted from the first of some columns: those that are not read, and those of other columns
IGNORED, ELSEWHERE = -1, -2


class Tokens(NamedTuple):
    """What rows of logits come with: for all of them, or one entry a row."""

    labels: torch.Tensor | None  # [n]
    weights: torch.Tensor | None  # [n]; None: all 1
    denominator: float | torch.Tensor  # of the reduction, a number or []
    parameters: tuple[float | torch.Tensor, ...]  # of the divergence: numbers, [] or [n]
    ids: torch.Tensor | None = None  # [n]: of the log-probabilities among the token outputs
    teacher_rows: torch.Tensor | None = None  # [n]; None: the teacher's rows are theirs, in order

    def rows(self, rows: slice | torch.Tensor) -> "Tokens":
        """Those of some rows: a slice, or their indices."""

        def part(value):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                return value
            return value[rows] if isinstance(rows, slice) else value.index_select(0, rows)

        parameters = tuple(part(value) for value in self.parameters)
        labels, weights, ids = map(part, (self.labels, self.weights, self.ids))
        teacher_rows = part(self.teacher_rows)
        return Tokens(labels, weights, self.denominator, parameters, ids, teacher_rows)


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


def mixed(
    divergence: torch.Tensor | None,
    hard: torch.Tensor | None,
    weights: torch.Tensor | None,
    divergence_scale: float,
    soft_weight: float,
    hard_weight: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted losses ``[n]`` from those of divergence and hard label (None: not part of the loss), and
    with a hard label the two weighted parts ``[2, n]``."""

    def weighted(losses):
        return losses if weights is None else torch.where(weights == 0, 0.0, losses * weights)

    if divergence is not None and divergence_scale != 1:
        divergence = divergence * divergence_scale
    if hard is None:
        return weighted(divergence if soft_weight == 1 else soft_weight * divergence), None
    if divergence is None:
        both, divergence = hard_weight * hard, torch.zeros_like(hard)
    else:
        both = soft_weight * divergence + hard_weight * hard
    return weighted(both), torch.stack([weighted(divergence), weighted(hard)])


def parameters_of(inputs, options) -> tuple[float | torch.Tensor, ...]:
    """The divergence's parameters in order: numbers, and tensors ``[]`` or ``[n]``."""
    tensors = (t.reshape(-1) if t.dim() else t for t in inputs.parameters)
    return tuple(next(tensors) if x is None else x for x in options.parameters)


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
