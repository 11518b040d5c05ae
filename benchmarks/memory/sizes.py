"""The sizes of a call, the bytes that it takes by kind, and eager PyTorch's."""

from dataclasses import dataclass
from typing import NamedTuple

FLOAT, LABEL = 4, 8  # bytes of a float32 number, and of a token's label


class Bytes(NamedTuple):
    """Memory of one loss, forward + backward.

    Attributes:
        inputs: what it reads that grows with the tokens.
        gradient: of the student's logits; of a linear form, of its hidden states and head.
        saved: kept from the forward to the backward, beside inputs and gradient.
        temporary: the rest of the peak.
        afterwards: of a loss of logits, the gradients of hidden states and head, which autograd makes from
            the logits' when what is saved and temporary is gone. A linear form has made them already.
    """

    inputs: int
    gradient: int
    saved: int
    temporary: int
    afterwards: int = 0

    @property
    def peak(self) -> int:
        """The most that the loss holds at once above its inputs."""
        return self.gradient + self.saved + self.temporary

    @property
    def total(self) -> int:
        """The most that there is at once from the logits, or hidden states, to the head's gradient."""
        return self.inputs + max(self.peak, self.gradient + self.afterwards)


@dataclass(frozen=True)
class Sizes:
    """Of a call with a label for each token, none of them ignored.

    Attributes:
        tokens, vocab: rows and columns of the logits.
        hidden, teacher_hidden: of the two models' hidden states.
        k: tokens a row of a top-k teacher.
        itemsize: bytes of an element of logits, hidden states and weights, of both models.
        memory_budget: of the linear forms; None: their default.
        frozen_head: whether the student's head gets no gradient, as under LoRA.
    """

    tokens: int
    vocab: int
    hidden: int = 4096
    teacher_hidden: int = 4096
    k: int = 64
    itemsize: int = 2
    memory_budget: int | None = None
    frozen_head: bool = False

    @property
    def n_logits(self) -> int:
        return self.tokens * self.vocab

    @property
    def logits(self) -> int:
        """Bytes of one model's."""
        return self.n_logits * self.itemsize

    @property
    def labels(self) -> int:
        return self.tokens * LABEL

    @property
    def slots(self) -> int:
        """Of a top-k teacher, as a store is read: a float32 log-probability and an int64 id each."""
        return self.tokens * self.k * (FLOAT + 8)

    @property
    def of_hidden(self) -> int:
        return self.tokens * self.hidden * self.itemsize

    @property
    def of_teacher_hidden(self) -> int:
        return self.tokens * self.teacher_hidden * self.itemsize

    @property
    def of_head(self) -> int:
        return self.vocab * self.hidden * self.itemsize

    @property
    def of_student(self) -> int:
        """The gradients of the student's hidden states and head."""
        return self.of_hidden + (0 if self.frozen_head else self.of_head)


class PerLogit(NamedTuple):
    """What eager PyTorch holds at its peak of a logit: numbers in the dtype that it computes with, and masks."""

    numbers: int
    masks: int

    def bytes(self, compute: int) -> int:
        """``compute``: bytes of a number."""
        return self.numbers * compute + self.masks


# of the losses in benchmarks/losses/eager.py, forward + backward
EAGER = {
    "soft_cross_entropy": PerLogit(4, 1),
    "forward_kl": PerLogit(6, 1),
    "reverse_kl": PerLogit(6, 1),
    "jensen_shannon": PerLogit(13, 0),
    "symmetric_kl": PerLogit(8, 2),
    "skew_forward_kl": PerLogit(8, 1),
    "skew_reverse_kl": PerLogit(8, 1),
    "total_variation": PerLogit(5, 1),
    "alpha_beta": PerLogit(7, 0),
}
EAGER_SAVED = PerLogit(2, 1)  # of soft_cross_entropy, between forward and backward


def eager(sizes: Sizes, compute: int) -> Bytes:
    """``benchmarks/losses/eager.py: soft_cross_entropy``, which is MiniLLM's, on any device; ``compute``:
    bytes of a number that it computes with, 4 where it upcasts the logits.

    Saved for the backward are the teacher's probabilities, the student's log-probabilities and the mask of
    infinities. The peak is in the forward: their product and its masked copy beside them."""
    peak = sizes.n_logits * EAGER["soft_cross_entropy"].bytes(compute)
    saved = sizes.n_logits * EAGER_SAVED.bytes(compute)
    temporary = peak - saved - sizes.logits
    return Bytes(2 * sizes.logits, sizes.logits, saved, temporary, sizes.of_student)


def stored_bytes_a_token(k: int) -> int:
    """On disk: a float16 and an int32 for each of the K, and a float32 a row."""
    return (2 + 4) * k + FLOAT
