"""How many tokens a block holds, and how many rows are under work at once, within a budget of memory."""

from typing import NamedTuple

# A block of 64 MiB is 262 tokens of 32000 columns in float32, student and teacher: enough that
# reading the weight, and adding to its gradient, are small beside the products (they are V d entries
# a block, the products V d times the tokens). Larger ones were no faster on two quiet cores.
CPU_BUDGET = 64 << 20
GPU_BUDGET = 1 << 30

# Rows of a product below which reading the weight takes more of an H100's time than multiplying by it:
# 240 of bf16; twice that, so that the products stay bound by the tensor cores.
EFFICIENT_ROWS = 512

# Rows from which a product on a CPU is as fast as one of more; the teacher's logits of as many are
# read back from a nearer cache, and take less memory.
PIECE_ROWS = 128


class Blocks(NamedTuple):
    """Tokens of a block, and rows within it whose logits are formed at once."""

    tokens: int
    rows: int


def _whole(n: int) -> int:
    """``n`` rows rounded down to whole tiles of a product, and to aligned per-row arrays."""
    return next((n // unit * unit for unit in (128, 8) if n >= unit), n)


def split(
    n_rows: int, token_bytes: int, row_bytes: int, budget: int, spare: int = 0, *, gpu: bool,
    pieces: bool = False, whole: bool = False,
) -> Blocks:  # fmt: skip
    """Blocks that ``budget`` bytes hold.

    Args:
        token_bytes: a token of a block: the gradient of its logits and what its products take.
        row_bytes: a row under work: logits of student and teacher; in all ``n_rows``.
        spare: bytes that a single block of all tokens would save, being the weight gradient's
            accumulator. Where that block takes no more than both it is the choice.
        gpu: rows under work are then an eighth of the budget, but EFFICIENT_ROWS where half of it
            holds them; the rest is the block, because every block reads and writes the weight's
            gradient once. On a CPU the two are one, or with ``pieces`` some PIECE_ROWS are under work.
        whole: all rows of a block are under work at once.

    Raises:
        ValueError: not even one token fits.
    """
    smallest = token_bytes + row_bytes
    if budget < smallest:
        raise ValueError(
            f"memory_budget={budget} is too small: the logits of one token and their gradient take "
            f"{smallest} bytes"
        )
    n_rows = max(n_rows, 1)
    if whole or not gpu:
        together = n_rows if n_rows * smallest <= budget + spare else budget // smallest
        tokens = _balanced(n_rows, together, 128 if gpu and together >= 128 else 1)
        pieces = pieces and not whole
        return Blocks(tokens, -(-tokens // max(1, tokens // PIECE_ROWS)) if pieces else tokens)
    rows = max(budget // 8 // row_bytes, min(EFFICIENT_ROWS, budget // 2 // row_bytes), 1)
    rows = _whole(min(rows, n_rows))
    if n_rows * token_bytes + rows * row_bytes <= budget + spare:
        return Blocks(n_rows, rows)
    tokens = _whole((budget - rows * row_bytes) // token_bytes)
    tokens = _balanced(n_rows, tokens, 128 if tokens >= 128 else 1)
    return Blocks(tokens, min(rows, tokens))


def _balanced(n_rows: int, most: int, unit: int) -> int:
    """Tokens a block: as few blocks as ``most`` allows, of about equal size, in whole units."""
    even = -(-n_rows // -(-n_rows // most))
    return min(most, -(-even // unit) * unit)
