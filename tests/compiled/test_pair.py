"""Both models' softmax over a part of each row, compiled for GPUs that are not here: no stack, 16-byte
accesses and no barrier in the loops over tiles."""

import pytest
import torch

from tests.support.machine_code import CHIPS, some, stack_and_loops

pytest.importorskip("triton")

from distill_ops.kernels import pair

from distill_ops.analysis import aot

CASES = [
    (kernel, dtype, n_cols, chip)
    for kernel in ("numbers", "sums")
    for dtype in (torch.bfloat16, torch.float32)
    for n_cols in (64128, 50257)
    for chip in aot.TARGETS
]
KEPT = [(kernel, torch.bfloat16, 64128, CHIPS[0]) for kernel in ("numbers", "sums")]


@pytest.mark.parametrize(("kernel", "dtype", "n_cols", "chip"), some(CASES, KEPT), ids=str)
def test_pair(kernel, dtype, n_cols, chip):
    target = aot.TARGETS[chip]
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    models = new(64, n_cols, dtype=dtype), new(64, n_cols, dtype=dtype)

    def call():
        if kernel == "numbers":
            ids = new(64, dtype=torch.int64)
            pair.run(*models, ids, -1, n_cols, 2.0, new(pair.N_NUMBERS, 64))
        else:
            pair.run_sums(*models, n_cols, 2.0, new(pair.N_KEPT, 64), new(pair.N_SUMS, 64))

    (launched,) = aot.record(call, target.facts)
    stack, loops = stack_and_loops(launched, target)
    assert stack == 0
    if target.backend == "hip":
        return
    whole = [loop for loop in loops if loop.special and loop.bytes_loaded]
    assert whole
    assert all(loop.barriers == 0 for loop in whole)
    assert min(loop.narrow_accesses for loop in whole) == 0
