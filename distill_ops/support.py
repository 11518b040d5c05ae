"""What calls that choose K tokens a row are, in types: the selection of the largest logits, the
log-probabilities at given ids, and a loss on a support.
"""

from typing import NamedTuple

import torch

from .problem import BlockOptions, DenseInputs, HeadOptions, Options, working_dtype


class SupportOptions(NamedTuple):
    """The options of a loss on a support, whose teacher's slots are made first."""

    loss: Options
    support: str  # whose largest logits are a row's outcomes: "student" or "teacher"
    support_k: int  # how many of them


class TopOptions(NamedTuple):
    """The options of a selection of the largest logits."""

    backend: str
    k: int
    n_cols: int


class LinearTopOptions(NamedTuple):
    """The options of a selection of the largest logits, from hidden states."""

    top: TopOptions
    head: HeadOptions
    blocks: BlockOptions


class GatherOptions(NamedTuple):
    """The options of the log-probabilities of K tokens a row."""

    backend: str
    temperature: float
    n_cols: int


class LinearGatherOptions(NamedTuple):
    """The options of the log-probabilities of K tokens a row, from hidden states."""

    gather: GatherOptions
    head: HeadOptions
    blocks: BlockOptions


class TopInputs(NamedTuple):
    """The tensors of a selection of the largest logits."""

    logits: torch.Tensor  # [..., V]

    leading = property(lambda self: self.logits.shape[:-1])
    n_rows = DenseInputs.n_rows


class LinearTopInputs(NamedTuple):
    """The tensors of a selection of the largest logits, from hidden states."""

    hidden: torch.Tensor  # [..., d]
    weight: torch.Tensor  # [V, d]
    bias: torch.Tensor | None  # [V]

    leading = property(lambda self: self.hidden.shape[:-1])
    n_rows = DenseInputs.n_rows

    def dtype(self) -> torch.dtype:
        return working_dtype(self.hidden, self.weight, self.bias)


class GatherInputs(NamedTuple):
    """The tensors of the log-probabilities of K tokens a row."""

    logits: torch.Tensor  # [..., V]
    ids: torch.Tensor  # [..., K]
    loss_mask: torch.Tensor | None  # [...]

    leading = TopInputs.leading
    n_rows = DenseInputs.n_rows

    def dtype(self) -> torch.dtype:
        return working_dtype(self.logits)


class LinearGatherInputs(NamedTuple):
    """The tensors of the log-probabilities of K tokens a row, from hidden states."""

    hidden: torch.Tensor  # [..., d]
    weight: torch.Tensor  # [V, d]
    bias: torch.Tensor | None  # [V]
    ids: torch.Tensor  # [..., K]
    loss_mask: torch.Tensor | None  # [...]

    leading = LinearTopInputs.leading
    n_rows = DenseInputs.n_rows
    dtype = LinearTopInputs.dtype
