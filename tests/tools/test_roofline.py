"""From machine code to predicted times: AMD's loops, the roofline's arithmetic."""

import pytest

pytest.importorskip("triton")

from benchmarks.losses.records import Record
from benchmarks.static.cache_model import Traffic
from benchmarks.static.chips import CHIPS
from benchmarks.static.launches import BF16
from benchmarks.static.roofline import ISSUE, MEMORY, SPECIAL, limits, predict, predicted_ms
from distill_ops.analysis import amd
from tests.support.static_rows import made_up_row

# --- AMD's assembly ----------------------------------------------------------------------------------

ASSEMBLY = """
.LBB0_1:                                ; outer
\t.loc\t1 10 4 is_stmt 1               ; dense.py:10:4
\ts_mov_b32 s0, 0
.LBB0_2:
\t.loc\t3 381 7                         ; sweeps.py:381:7 @[ dense.py:214:95 ]
\tglobal_load_dwordx4 v[0:3], v4, s[2:3]
\ts_waitcnt vmcnt(0)
\tv_pk_fma_f32 v[0:1], v[0:1], v[2:3], v[4:5]
\tv_exp_f32_e32 v0, v0
\tv_log_f32_e32 v1, v1
\tglobal_store_short v4, v0, s[2:3]
\tds_write_b32 v4, v0
\ts_cbranch_scc0 .LBB0_2
\tv_add_f32_e32 v0, v0, v1
\ts_branch .LBB0_1
"""


def test_amd_counts_of_a_worked_loop():
    (loop,) = amd.innermost_loops(ASSEMBLY)
    assert (loop.instructions, loop.special, loop.stores, loop.barriers) == (3, 2, 1, 1)
    assert loop.narrow_accesses == 1
    assert loop.lines == {("sweeps.py", 381)}


# --- from counts to times ----------------------------------------------------------------------------


SIX_BYTES = Traffic(6.0, 6.0, 6.0, 6.0, 10.0)


@pytest.mark.parametrize("chip", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize(
    ("field", "name", "binds"),
    [("row_instructions", "instructions", ISSUE), ("special", "special", SPECIAL)],
)
def test_a_kernel_within_the_limits_takes_as_long_as_a_copy(chip, field, name, binds):
    chip = CHIPS[chip]
    most = chip.limits(6)[name]
    within = predict([made_up_row(**{field: 0.99 * most})], [SIX_BYTES], chip)
    beyond = predict([made_up_row(**{field: 2 * most})], [SIX_BYTES], chip)
    assert (within.binds, within.times_copy) == (MEMORY, 1)
    assert beyond.binds == binds
    assert beyond.times_copy == pytest.approx(2)


def test_exp_and_log_stall_amds_vector_unit():
    """MI300X: 304 units at 2.1 GHz; 64 lanes a clock, a fourth of it for exp and log."""
    row = made_up_row(row_instructions=80.0, special=8.0)
    times = limits(row, CHIPS["MI300X"], 6)
    assert times[ISSUE] == pytest.approx((72 / 64 + 8 / 16) / (304 * 2.1e-3))
    assert times[MEMORY] == pytest.approx(6 / 5.3)


def test_times_of_a_worked_case():
    """H100: 132 multiprocessors at 1.98 GHz, 3350 GB/s; 10 bytes, 80 instructions, 8 exp + log."""
    row = made_up_row(row_instructions=80.0, special=8.0, floats=64.0, padding=1.05)
    times = limits(row, CHIPS["H100"], 10)
    assert times[MEMORY] == pytest.approx(10 / 3.350)
    assert times[ISSUE] == pytest.approx(80 / 128 / (132 * 1.98e-3))
    assert times[SPECIAL] == pytest.approx(8 * 1.05 / 16 / (132 * 1.98e-3))
    # A100's 64 float32 lanes of 128
    assert limits(row, CHIPS["A100"], 10)["float32"] == pytest.approx(
        64 * 1.05 / 64 / (108 * 1.41e-3)
    )


def test_prediction_of_two_launches_and_its_ends():
    chip = CHIPS["H100"]
    forward = Traffic(4.0, 4.0, 4.0, 8.0, 8.0)
    found = predict([made_up_row(), made_up_row()], [forward, SIX_BYTES], chip)
    assert (found.times_copy, found.low, found.high) == pytest.approx((1, 1, 1.4))
    assert found.picoseconds == pytest.approx(10 / 3.350)


def test_prediction_for_a_benchmark_record():
    names = {"case": "case", "provider": "ours", "label": "ours", "model": None, "mode": "train"}
    record = Record(loss="forward_kl", tokens=4096, vocab=32000, dtype=BF16, median_ms=1.0, **names)
    at_least = record.tokens * record.vocab * 6 / 3350e9 * 1e3
    assert at_least <= predicted_ms(record, CHIPS["H100"]) <= 2 * at_least
