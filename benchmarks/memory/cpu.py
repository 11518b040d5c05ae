"""Formulas of the CPU path, which streams chunks of rows through buffers of a few MiB.

They leave out what is a few numbers a row or column.
"""

from distill_ops.cpu.rows import CHUNK_ELEMENTS, N_BUFFERS, rows_in_chunk
from distill_ops.cpu.topk import TOPK_ELEMENTS
from distill_ops.heads.blocks import CPU_BUDGET, split
from distill_ops.heads.projection import UPCAST_ENTRIES

from .sizes import FLOAT, Bytes, Sizes

TOPK_BUFFERS = 2
DOUBLES = 12  # matrices [rows of a chunk, K + 1] of float64 at the peak of a top-k chunk


def _chunk(tokens: int, vocab: int, threads: int) -> int:
    """The float32 buffers of a chunk of rows."""
    rows = rows_in_chunk(tokens, vocab, FLOAT, threads, CHUNK_ELEMENTS)
    return N_BUFFERS * rows * vocab * FLOAT


def _topk_chunk(tokens: int, vocab: int, k: int, threads: int) -> int:
    rows = rows_in_chunk(tokens, vocab, FLOAT, threads, TOPK_ELEMENTS)
    return rows * (TOPK_BUFFERS * vocab * FLOAT + DOUBLES * (k + 1) * 8)


def dense(sizes: Sizes, mode: str, threads: int) -> Bytes:
    """``distillation_loss``; ``mode``: "forward", "backward" or "inplace". The CPU path keeps nothing but
    the gradient; "backward" computes the rows again."""
    inputs = 2 * sizes.logits + sizes.labels
    gradient = 0 if mode == "inplace" else sizes.logits
    chunk = _chunk(sizes.tokens, sizes.vocab, threads)
    return Bytes(inputs, gradient, 0, chunk, sizes.of_student)


def topk(sizes: Sizes, threads: int) -> Bytes:
    """``topk_distillation_loss``."""
    temporary = _topk_chunk(sizes.tokens, sizes.vocab, sizes.k, threads)
    return Bytes(
        sizes.logits + sizes.slots + sizes.labels, sizes.logits, 0, temporary, sizes.of_student
    )


def linear(sizes: Sizes, threads: int, *, topk: bool = False) -> Bytes:
    """``linear_distillation_loss``, or ``linear_topk_distillation_loss``: products are float32, and a
    half-precision weight is upcast a slice of the vocabulary at a time."""
    half = sizes.itemsize != FLOAT
    vocab = sizes.vocab
    teacher_row = 0 if topk else (vocab + sizes.teacher_hidden) * FLOAT
    summed = vocab * sizes.hidden * FLOAT if half and not sizes.frozen_head else 0
    blocks = split(
        sizes.tokens, (vocab + 2 * sizes.hidden) * FLOAT, max(teacher_row, 1),
        sizes.memory_budget or CPU_BUDGET, summed, gpu=False, pieces=not half,
    )  # fmt: skip
    temporary = blocks.tokens * vocab * FLOAT  # the student's logits, then their gradient
    if topk:
        temporary += _topk_chunk(blocks.rows, vocab, sizes.k, threads)
    else:
        temporary += blocks.rows * vocab * FLOAT + _chunk(blocks.rows, vocab, threads)
    if half:
        dims = (sizes.hidden,) if topk else (sizes.hidden, sizes.teacher_hidden)
        temporary += sum(min(vocab, max(1, UPCAST_ENTRIES // dim)) * dim * FLOAT for dim in dims)
        temporary += blocks.tokens * sizes.hidden * FLOAT  # hidden states
        if blocks.tokens < sizes.tokens:
            temporary += summed
    inputs = sizes.of_hidden + (sizes.slots if topk else sizes.of_teacher_hidden)
    return Bytes(inputs + sizes.labels, sizes.of_student, 0, temporary)
