"""What the design sets for the compiled kernels, what is known to miss it, and what breaks it.

``LIMITS`` are of the dense kernel: bf16 logits with the gradient made in the forward, V = 128256, on
sm_90 and sm_100. ``instructions`` and ``special`` (exp and log): an element, over the fast loops of
all sweeps; ``guarded``: over the loops that a row with infinities takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from .kernels import Row
from .launches import BACKWARD, BF16, BF16_BIAS, FP16, FP32, HARD, MIXED, RESTRICTED, STRIDED, Entry

TARGETS_ON = ("sm_90", "sm_100")
QUANTITIES = {
    "instructions": "instructions",
    "special": "special",
    "guarded": "guarded_instructions",
}  # and the fields of a row that hold them


@dataclass(frozen=True)
class Limit:
    """``by_design``: the design sets it; else it is the count that was reached, and some slack."""

    instructions: float
    special: float
    guarded: float
    by_design: bool = True


LIMITS = {
    "soft_cross_entropy": Limit(34, 4.5, 42),
    "forward_kl": Limit(34, 4.5, 42),
    "reverse_kl": Limit(38, 4.5, 44),
    "jensen_shannon": Limit(60, 8.5, 66),
    "skew_forward_kl": Limit(70, 9.5, 80),
    "skew_reverse_kl": Limit(70, 9.5, 80),
    "total_variation": Limit(50, 6.5, 58),
    "symmetric_kl": Limit(46, 4.5, 90, by_design=False),
    "alpha_beta": Limit(75, 9.5, 108, by_design=False),
}

# (divergence, quantity): the most that is counted today, on either target. A count above it is a
# step back; one that meets its limit is to be taken out of here.
KNOWN_MISSES: dict[tuple[str, str], float] = {
    ("soft_cross_entropy", "guarded"): 50.9,
    ("forward_kl", "guarded"): 54.9,
    ("reverse_kl", "guarded"): 59.9,
    ("jensen_shannon", "instructions"): 68.4,
    ("jensen_shannon", "guarded"): 88.2,
    ("skew_forward_kl", "guarded"): 87.3,
    ("skew_reverse_kl", "special"): 10.3,
    ("skew_reverse_kl", "guarded"): 88.0,
    ("total_variation", "guarded"): 65.5,
}

# an odd vocabulary's instructions over those of its even neighbour
ODD_OVER_EVEN = 1.10

COUNTED_WITH = "3.7."  # Triton's version; 3.6 takes up to 1% more of the same source
OTHER_COMPILERS = 1.02

# instructions an element of one sweep of the other kernels, on NVIDIA
A_SWEEP = {
    "token": {"normalise": 12.0, "differentiate": 12.0}, "gather": {"normalise": 12.0},
    "scale": {"loop": 8.0},
}  # fmt: skip
TOPK_SWEEPS = {"normalise": 11.0, "differentiate": 7.25}  # bf16, the bucket and one hard label
# bytes of stack that are known, and with them some spills: entry and launch, target
KNOWN_STACK = {
    (Entry("dense", BACKWARD, BF16, "jensen_shannon"), "forward", "sm_100"): 8,
    (Entry("dense", HARD, BF16, "jensen_shannon"), None, "sm_100"): 8,
    (Entry("dense", BACKWARD, FP16, "symmetric_kl"), "forward", "sm_100"): 8,
}
# barriers in a loop over tiles that are known: the bias changes its layout in every turn
KNOWN_BARRIERS = {("finish", BF16_BIAS): 6}
HEAD_SWEEPS = {"exp": 24.0, "plain": 9.0}  # with the softcap's exponential and without


def verdict(divergence: str, quantity: str, count: float) -> str | None:
    """What is wrong with a count of the dense kernel, or None."""
    limit = getattr(LIMITS[divergence], quantity)
    known = KNOWN_MISSES.get((divergence, quantity))
    same = version("triton").startswith(COUNTED_WITH)
    seen = count if same else count / OTHER_COMPILERS
    if known is None:
        return None if seen <= limit else f"{count:.2f} {quantity}, at most {limit} wanted"
    return None if seen <= known else f"{count:.2f} {quantity}, {known} was the known miss"


def _most(row: Row) -> dict[str, float]:
    """The most instructions an element that each sweep of a kernel may take."""
    if row.kernel == "topk":
        slow = row.form in ("every column", "bucket, hard label at T=2")
        return {} if slow or row.dtype == FP32 else TOPK_SWEEPS
    if row.kernel in ("finish", "softcap_gradient"):
        return {"loop": HEAD_SWEEPS["exp" if row.special else "plain"]}
    return A_SWEEP.get(row.kernel, {})


def faults(row: Row) -> Iterator[str]:
    """What a launch breaks of the limits that hold for every kernel."""
    name = " ".join(filter(None, (row.kernel, row.form, row.dtype, row.divergence, row.made_in)))
    name = f"{name}, {row.target}"
    known = KNOWN_STACK.get((row.entry, row.made_in, row.target), 0)
    if row.stack > known or (row.spills and not known):
        yield f"{name}: {row.stack} bytes of stack, {row.spills} spills"
    if row.load_bytes not in (None, 16) and row.form != RESTRICTED:
        yield f"{name}: loads of {row.load_bytes} bytes"
    if row.target.startswith("gfx"):
        return  # what its assembly shows of a loop is too little for more
    if (row.barriers or 0) > KNOWN_BARRIERS.get((row.kernel, row.form), 0):
        yield f"{name}: {row.barriers} barriers in loops over tiles"
    if row.narrow and row.form not in (MIXED, STRIDED):
        yield f"{name}: {row.narrow} accesses of less than 16 bytes"
    for sweep, most in _most(row).items():
        count = (row.sweeps or {}).get(sweep, (0, 0))[0]
        if count > most:
            yield f"{name}: {count:.2f} instructions an element in {sweep}, at most {most} wanted"
