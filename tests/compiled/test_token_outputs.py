"""What token outputs cost the compiled kernels: at most 6 instructions an element each."""

import pytest
import torch

pytest.importorskip("triton")

from distill_ops.kernels import sweeps, topk_outside

from distill_ops import JensenShannon, ReverseKL, SoftCrossEntropy
from distill_ops.analysis import aot, sass
from distill_ops.analysis.forms import Form, topk_launches
from distill_ops.results import OF_WHOLE_TEACHER, TOKEN_OUTPUTS
from tests.support import full

N_COLS = 128256
SM_90 = aot.TARGETS["sm_90"]
DENSE = sweeps.normalise_tile, sweeps.reduce_tile, sweeps.differentiate_tile
TOPK = topk_outside.sum_tile, topk_outside.spread_tile
OF_TOPK = tuple(name for name in TOKEN_OUTPUTS if name not in OF_WHOLE_TEACHER)


def cost(launch, tiles, column_bytes, most_stack=0):
    """Instructions an element, over the fast loop of each of these steps: that of most tiles a turn, or
    the one that carries the outputs."""
    code, usage = sass.disassemble(aot.compile_launch(launch, SM_90))
    assert usage.stack <= most_stack
    loops = [loop for loop in sass.innermost_loops(code) if loop.bytes_loaded and loop.special]
    size = lambda loop: (loop.bytes_loaded, loop.instructions)
    fast = [
        max((x for x in loops if x.has_lines_of(tile)), key=size, default=None) for tile in tiles
    ]
    return sum(x.instructions / x.bytes_loaded * column_bytes for x in fast if x is not None)


def dense_cost(divergence, names=(), **limit):
    (launch,) = Form(N_COLS, token_outputs=names).launches(divergence, SM_90)
    return cost(launch, DENSE, 4, **limit)


def topk_cost(divergence, names=(), **limit):
    options = {"tail": "bucket", "token_outputs": names}
    (launch,) = topk_launches(divergence, N_COLS, 64, torch.bfloat16, SM_90, **options)
    return cost(launch, TOPK, 2, **limit)


@pytest.mark.parametrize(
    ("cost_of", "names", "divergence"),
    [
        (dense_cost, TOKEN_OUTPUTS, SoftCrossEntropy()),
        (dense_cost, TOKEN_OUTPUTS, JensenShannon()),
        pytest.param(topk_cost, OF_TOPK, ReverseKL(), marks=pytest.mark.full),
    ],
    ids=["dense one sweep", "dense two sweeps", "topk"],
)
def test_each_takes_few_instructions(cost_of, names, divergence):
    alone = cost_of(divergence)
    chosen = names if full() else ("student_argmax",)
    more = {name: cost_of(divergence, (name,)) - alone for name in chosen}
    print({name: round(x, 1) for name, x in more.items()})
    assert all(x <= 6 for x in more.values()), more
    assert more["student_argmax"] > 1  # the loops are those that carry it
    # a number or two of the row, where all are asked for of a divergence that fills the registers
    everything = cost_of(divergence, names, most_stack=16) - alone
    assert everything <= 6 * len(names)
