"""Launch choices: pure functions of sizes, layouts and device facts, a reason beside each number.

None of them was measured on a GPU yet; the reasons are counts from compiled code.
"""

from dataclasses import dataclass

# Numbers that the dense kernel keeps of a row for a gradient made in the backward: m_s, l_s, m_t,
# l_t, D, m_h, l_h, whether the fast loops serve, and weight / denominator.
STATISTICS = 9
# ... and that the token kernel keeps: maximum, sum of exponentials, entropy.
TOKEN_STATISTICS = 3

# ... and the top-k kernel: of the columns outside the K the maximum, their sum of exponentials at the
# loss's temperature and at 1, and the sum of their slopes; weight / denominator.
TOPK_STATISTICS = 5


@dataclass(frozen=True)
class DeviceFacts:
    """What a choice depends on; ``n_sm`` counts multiprocessors (compute units on AMD)."""

    n_sm: int
    l2_bytes: int
    warp_size: int = 32
    limits_registers: bool = True  # whether the compiler takes ``maxnreg`` (NVIDIA)


@dataclass(frozen=True)
class DenseLaunch:
    """Tiles of ``[lanes, width]`` columns, one lane a thread, in ``n_programs`` programs."""

    lanes: int
    width: int
    num_warps: int
    maxnreg: int | None
    n_programs: int

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps} | limit


# One load holds 8 half-precision or 4 single-precision logits. With mixed dtypes the wider one
# decides: both tensors must share one register layout, or every tile crosses shared memory.
LOAD_BYTES = 16

LANES = (1024, 512, 256, 128)  # threads a program; 1024 is the most that there can be


@dataclass(frozen=True)
class Budget:
    """Threads a multiprocessor, and the registers each may take (of 65536 in all).

    The limit on registers is always given: left alone the compiler now takes 200, for a longer
    schedule of the same instructions, now 64 with a spill."""

    threads: int
    registers: int


# The fast loops do two tiles a turn: four 16-byte loads a thread, 32 KiB a multiprocessor in flight;
# an H100's bandwidth times its latency is about 18 KiB. They take up to 128 registers without a
# spill (sm_80, sm_90, sm_100). Twice the threads with 64 registers and one tile a turn have as much
# in flight, but 2 more instructions an element, and spilled 8 to 96 bytes in every other form.
MATCHED = Budget(512, 128)
# Rows that begin anywhere load 2 or 4 bytes at a time, with an address each: up to 225 registers.
SCATTERED = Budget(256, 255)

# The rows in flight may take this share of L2 for a second sweep to find them. 0.7 lets two rows
# a multiprocessor of 32000 bf16 columns fit an H100's 50 MB (264 x 128 KB = 34 MB).
L2_SHARE = 0.7


def padded(n_cols: int, tile: int) -> int:
    return -(-n_cols // tile) * tile


def dense_launch(
    n_rows: int, n_cols: int, itemsize: int, row_bytes: int, budget: Budget, device: DeviceFacts
) -> DenseLaunch:
    """Tile and grid of the dense kernel.

    Args:
        n_rows, n_cols: rows of logits and columns read of each.
        itemsize: bytes of the widest element among student and teacher.
        row_bytes: bytes of one row of both together.
        budget: threads and registers that the kernel's form has.
        device: facts of the device.

    The largest program whose tiles pad the row to at most 9/8 of the least padding (a guess: a
    padded column costs its instructions, a smaller program more reductions a row); but half the
    largest where twice as many rows still fit L2, so that one program's reductions hide behind
    the other's loads. The grid is persistent: whole programs a multiprocessor, at most one a row.
    """
    width = LOAD_BYTES // itemsize
    most = budget.threads
    if 2 * device.n_sm * row_bytes <= L2_SHARE * device.l2_bytes:
        most //= 2
    allowed = [lanes for lanes in LANES if lanes <= most]
    least = min(padded(n_cols, lanes * width) for lanes in allowed)
    lanes = next(x for x in allowed if 8 * padded(n_cols, x * width) <= 9 * least)
    return DenseLaunch(
        lanes=lanes,
        width=width,
        num_warps=max(1, lanes // device.warp_size),
        maxnreg=budget.registers if device.limits_registers else None,
        n_programs=max(1, min(n_rows, device.n_sm * budget.threads // lanes)),
    )


def topk_unroll(block_k: int, lanes: int, own_hard: bool, looks: bool) -> int:
    """Tiles a turn of the top-k kernel's loops.

    Four of one tensor are as many loads in flight as the dense kernel's two of two. Beside a hard
    label's own sums, or several slots a thread, they spilled 8 to 32 bytes (sm_100); beside ``looks``,
    what token outputs carry along, 16 (sm_90)."""
    return 2 if looks or own_hard or block_k > 2 * lanes else 4


def reduction_block(n_rows: int) -> int:
    """Tokens a step of the single-program kernels: a power of two; 8 a thread at the largest."""
    return min(8192, max(128, 1 << max(0, n_rows - 1).bit_length()))


@dataclass(frozen=True)
class HeadLaunch:
    """``[lanes, 8]`` columns a program, one lane a thread; ``grid`` is columns by rows."""

    lanes: int
    num_warps: int
    grid: tuple[int, int]


def head_launch(n_rows: int, n_cols: int, device: DeviceFacts) -> HeadLaunch:
    """Launch of the elementwise kernels over a head's logits.

    256 threads of 8 columns, so that 8 programs fill a multiprocessor's 2048 threads; as many
    programs as that (a guess: no wave more, and each reads its bias once for many rows)."""
    lanes = 256
    across = -(-n_cols // (8 * lanes))
    resident = device.n_sm * 8
    return HeadLaunch(
        lanes, lanes // device.warp_size, (across, max(1, min(n_rows, -(-resident // across))))
    )
