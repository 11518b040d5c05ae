"""A made-up row of counts, for the tests of what is made of such rows."""

from dataclasses import replace

from benchmarks.static.kernels import Row
from benchmarks.static.launches import BF16, TRAIN


def made_up_row(**fields):
    """A launch whose whole rows cost what its loops say."""
    plain = {"registers": 64, "stack": 0, "shared": 0, "spills": 0, "num_warps": 8, "programs": 132}
    plain |= {"divergence": "made_up", "form": TRAIN, "dtype": BF16, "special": 1.0, "floats": 1.0}
    row = Row("dense", "sm_90", **plain, row_instructions=1.0, padding=1.0)
    return replace(row, **fields)
