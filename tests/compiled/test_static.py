"""The counts of ``make static``: they are of today's kernels and keep their limits; how they are made.

What is counted stands in ``benchmarks/results/static.json``; here only a few launches are compiled.
Where a count misses its limit the miss stands in ``benchmarks/static/limits.py`` and may not grow."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks.losses.records import Record
from benchmarks.static import page, peers, run, tables
from benchmarks.static.cache_model import Traffic, n_walks
from benchmarks.static.chips import CHIPS
from benchmarks.static.digest import code_digest, kernels_digest, toolchain
from benchmarks.static.kernels import Row, entry_rows
from benchmarks.static.launches import (
    BF16,
    COMPARED_ON,
    EVEN,
    MIXED,
    ODD,
    TRAIN,
    Entry,
    built_in,
    entries,
)
from benchmarks.static.limits import (
    KNOWN_MISSES,
    LIMITS,
    ODD_OVER_EVEN,
    OTHER_COMPILERS,
    QUANTITIES,
    TARGETS_ON,
    faults,
    verdict,
)
from benchmarks.static.peers import Peer, PeerRow, peer_rows
from benchmarks.static.results import Report, load
from benchmarks.static.roofline import ISSUE, MEMORY, SPECIAL, limits, predict, predicted_ms
from distill_ops.analysis import amd, aot

DIVERGENCES = list(built_in())
COUNTED = load(run.OUTPUTS["json"])
ROWS = {}  # by entry and target: a row for each launch
for counted_row in COUNTED.rows:
    entry = Entry(*(getattr(counted_row, name) for name in Entry.__dataclass_fields__))
    ROWS.setdefault((entry, counted_row.target), []).append(counted_row)


def dense(divergence, form, target):
    (row,) = ROWS[Entry("dense", form, BF16, divergence), target]
    return row


# --- the counts of the last run ------------------------------------------------------------------


def test_the_counts_are_of_todays_kernels():
    assert COUNTED.facts["kernels"] == kernels_digest(), "kernels/ has changed: run make static"
    assert COUNTED.facts["command"] == "python -m benchmarks.static"  # a full run
    assert set(COUNTED.facts["toolchain"]) == set(toolchain())


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_form_and_dtype_is_counted(target):
    assert {entry for entry, of in ROWS if of == target} == set(entries(target))
    kernels = {launch for _, launch in aot.KERNELS}
    assert {f"{row.kernel}_kernel" for row in COUNTED.rows if row.target == target} == kernels


@pytest.mark.parametrize(
    ("divergence", "target"), [("jensen_shannon", "sm_90"), ("total_variation", "gfx942")]
)
def test_the_counts_are_what_compiling_gives(divergence, target):
    entry = Entry("dense", TRAIN, BF16, divergence)
    (launch,), (row,) = entry_rows(entry, aot.TARGETS[target])
    same = COUNTED.facts["toolchain"] == toolchain()
    slack = {"rel": 0 if same else OTHER_COMPILERS - 1, "abs": 1e-3}  # the JSON has three digits
    before = dense(divergence, TRAIN, target)
    for field in ("instructions", "special", "guarded_instructions", "row_instructions"):
        assert getattr(row, field) == pytest.approx(getattr(before, field), **slack), field
    assert (row.stack, row.spills, row.load_bytes, row.narrow) == (0, 0, 16, 0)
    assert len(row.sweeps) == n_walks(launch)  # the cache model's walks are the code's sweeps
    assert row.barriers == before.barriers


def test_every_divergence_has_limits():
    assert set(LIMITS) == set(built_in())
    assert all(divergence in LIMITS and q in QUANTITIES for divergence, q in KNOWN_MISSES)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("target", TARGETS_ON)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_counts_keep_their_limits(divergence, target, quantity):
    row = dense(divergence, TRAIN, target)
    assert verdict(divergence, quantity, getattr(row, QUANTITIES[quantity])) is None


@pytest.mark.parametrize(("divergence", "quantity"), KNOWN_MISSES, ids=str)
def test_known_misses_are_misses(divergence, quantity):
    """A limit that is met on both targets must leave the table of misses."""
    rows = [dense(divergence, TRAIN, target) for target in TARGETS_ON]
    worst = max(getattr(row, QUANTITIES[quantity]) for row in rows)
    limit = getattr(LIMITS[divergence], quantity)
    assert worst > limit, f"{worst:.2f} meets {limit}: take it out of KNOWN_MISSES"


def test_no_launch_breaks_its_limits():
    assert [fault for row in COUNTED.rows for fault in faults(row)] == []


def test_every_loop_over_tiles_is_counted():
    """Where nothing is counted, ``faults`` finds nothing."""
    unknown = Counter(
        r.kernel for r in COUNTED.rows if r.load_bytes is None and r.target == "sm_90"
    )
    restricted = sum(r.form == "restricted" for r in COUNTED.rows if r.target == "sm_90")
    reductions = sum(r.kernel in ("weights", "total") for r in COUNTED.rows if r.target == "sm_90")
    assert unknown["topk"] == restricted  # sees the K alone
    assert unknown.total() == restricted + reductions
    for target in aot.TARGETS:
        wide = {r.kernel for r in COUNTED.rows if r.target == target and r.load_bytes == 16}
        assert {"dense", "topk", "token", "statistics", "metrics", "finish"} <= wide


@pytest.mark.parametrize("form", [TRAIN, ODD])
@pytest.mark.parametrize("target", TARGETS_ON)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whole_rows_cost_what_their_loops_do(divergence, target, form):
    row = dense(divergence, form, target)
    assert 1 <= row.padding <= 9 / 8
    assert row.instructions * row.padding <= row.row_instructions + 1e-2  # three digits each
    assert row.row_instructions <= 1.35 * row.instructions
    assert row.guarded_instructions > row.instructions


@pytest.mark.parametrize("target", COMPARED_ON)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_odd_vocabulary_costs_little(divergence, target):
    odd, even = (dense(divergence, form, target) for form in (ODD, EVEN))
    assert odd.instructions <= ODD_OVER_EVEN * even.instructions
    assert odd.special <= ODD_OVER_EVEN * even.special


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_amd_takes_as_many_exponentials_and_logarithms(divergence):
    counts = [dense(divergence, TRAIN, target).special for target in ("gfx942", "sm_90")]
    assert counts[0] == pytest.approx(counts[1], abs=0.3)


# --- what breaks a limit -------------------------------------------------------------------------


def test_verdict(monkeypatch):
    assert verdict("jensen_shannon", "special", LIMITS["jensen_shannon"].special) is None
    monkeypatch.setitem(KNOWN_MISSES, ("total_variation", "special"), 7.25)
    assert verdict("total_variation", "special", 7.25) is None
    assert "7.25 was the known miss" in verdict("total_variation", "special", 7.5)
    monkeypatch.delitem(KNOWN_MISSES, ("total_variation", "special"))
    assert "at most 6.5" in verdict("total_variation", "special", 7.25)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spills"),
        ({"load_bytes": 8}, "loads of 8 bytes"),
        ({"barriers": 3}, "3 barriers"),
        ({"narrow": 4}, "4 accesses"),
        ({"kernel": "token", "sweeps": {"normalise": [12.5, 1.0]}}, "12.50 instructions"),
        ({"kernel": "topk", "sweeps": {"differentiate": [7.5, 1.0]}}, "7.50 instructions"),
        ({"kernel": "scale", "sweeps": {"loop": [9.0, 0.0]}}, "9.00 instructions"),
        ({"kernel": "finish", "sweeps": {"loop": [9.5, 0.0]}, "special": 0.0}, "9.50 instructions"),
        ({"kernel": "finish", "sweeps": {"loop": [24.5, 2.0]}, "special": 2.0}, "24.50 instr"),
    ],
)
def test_faults(fields, text):
    row = made_up_row(load_bytes=16, narrow=0, barriers=0)
    assert list(faults(row)) == []
    (fault,) = faults(replace(row, **fields))
    assert text in fault
    assert "made_up" in fault
    assert "sm_90" in fault


def test_a_float32_teacher_may_load_half_a_vector():
    assert list(faults(made_up_row(load_bytes=16, narrow=4, form=MIXED))) == []


# --- the digest ----------------------------------------------------------------------------------

SOURCE = '''"""What it is."""

# why
def f(x, y=(1,)):
    """Says so."""
    return f"{x:.2f}" + y  # so
'''


def test_the_digest_is_of_the_code_alone():
    same = 'def f(x,\n      y=(1,)):\n    return f"{x:.2f}" + y\n'
    assert code_digest({"a.py": SOURCE}) == code_digest({"a.py": same})
    for other in (
        same.replace("+", "-"),
        same.replace(".2f", ".3f"),
        same.replace("y=(1,)", "y=()"),
    ):
        assert code_digest({"a.py": SOURCE}) != code_digest({"a.py": other})
    assert code_digest({"a.py": SOURCE}) != code_digest({"b.py": SOURCE})
    text = "def f():\n    return {}\n"  # a string that is no docstring counts
    assert code_digest({"a.py": text.format("'a'")}) != code_digest({"a.py": text.format("'b'")})


def test_check_says_whether_the_counts_are_of_todays_kernels(tmp_path, capsys):
    read = json.loads(run.OUTPUTS["json"].read_text(encoding="utf-8"))
    path = tmp_path / "counts.json"
    for digest, status in ((kernels_digest(), 0), ("another", 1)):
        path.write_text(json.dumps({**read, "facts": {**read["facts"], "kernels": digest}}))
        assert run.main(["--check", "--from-json", str(path)]) == status
    assert "run make static" in capsys.readouterr().out


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


def made_up_row(**fields):
    """A launch whose whole rows cost what its loops say."""
    plain = {"registers": 64, "stack": 0, "shared": 0, "spills": 0, "num_warps": 8, "programs": 132}
    plain |= {"divergence": "made_up", "form": TRAIN, "dtype": BF16, "special": 1.0, "floats": 1.0}
    row = Row("dense", "sm_90", **plain, row_instructions=1.0, padding=1.0)
    return replace(row, **fields)


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


# --- peers -------------------------------------------------------------------------------------------


@triton.jit
def exponential_kernel(x_ptr, n_cols, BLOCK_SIZE: tl.constexpr):
    for start in range(0, n_cols, BLOCK_SIZE):
        position = start + tl.arange(0, BLOCK_SIZE)
        inside = position < n_cols
        x = tl.load(x_ptr + position, mask=inside)
        tl.store(x_ptr + position, tl.exp(x), mask=inside)


def launch_exponential(module):
    x = torch.empty(4096, device="meta")
    module.exponential_kernel[(1,)](x, 4096, BLOCK_SIZE=1024, num_warps=4)


def fail(module):
    raise ValueError("as peers may")


def test_peers_are_counted_or_left_out_with_a_reason(monkeypatch):
    mine = (__name__, "exponential_kernel", "float32", 8)
    made_up = [
        Peer("triton", *mine, launch_exponential),
        Peer("triton", *mine, fail),
        Peer("no-such-package", *mine, launch_exponential),
    ]
    monkeypatch.setattr(peers, "PEERS", made_up)
    counted, broken, missing = peer_rows()
    assert counted.skipped is None
    assert counted.special == 1  # one exp an element
    assert 5 < counted.instructions < 20
    assert broken.skipped == "ValueError: as peers may"
    assert missing.skipped == "not installed"
    assert broken.instructions is missing.instructions is None


def test_a_peer_that_is_not_installed_keeps_its_earlier_count(monkeypatch):
    missing = PeerRow("no-such-package", "kernel", "float32", 8, skipped="not installed")
    counted = replace(missing, skipped=None, version="1.0", instructions=5.0)
    monkeypatch.setattr(run, "peer_rows", lambda: [missing])
    facts = {"date": "2026-01-02T03:04:05"}
    assert run.count_peers(None) == [missing]
    assert run.count_peers(Report(facts, [], [], [], [missing])) == [missing]
    (kept,) = run.count_peers(Report(facts, [], [], [], [counted]))
    assert kept == replace(counted, date="2026-01-02")
    assert run.count_peers(Report({"date": "2027"}, [], [], [], [kept])) == [kept]


# --- the run and its pages -----------------------------------------------------------------------


def test_run_writes_json_picture_and_pages(tmp_path, capsys):
    paths = {name: tmp_path / "new" / name for name in run.OUTPUTS}
    outputs = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    paths["plot"] = outputs[outputs.index("--plot") + 1] = tmp_path / "new" / "plot.png"
    outputs = [str(word) for word in outputs]
    status = run.main(["--quick", "--divergences", "reverse_kl", "--jobs", "1", *outputs])
    assert status == 0
    report = load(paths["json"])
    assert report.facts["command"] == "python -m benchmarks.static --quick --divergences reverse_kl"
    assert report.facts["kernels"] == kernels_digest()
    assert [(row.form, row.target) for row in report.rows] == [(TRAIN, "sm_90"), (ODD, "sm_90")]
    (found,) = report.trained("sm_90")
    slack = OTHER_COMPILERS - 1  # of another version of Triton than that of the JSON
    before = dense("reverse_kl", TRAIN, "sm_90")
    assert found.instructions == pytest.approx(before.instructions, rel=slack)
    assert {p.chip for p in report.predictions} == {"H100", "H200"}
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    assert paths["page"].read_text(encoding="utf-8") == page.page(report)
    text = paths["tables"].read_text(encoding="utf-8")
    assert text == tables.page(report)
    assert f"| reverse_kl | {found.instructions:.1f} of {LIMITS['reverse_kl'].instructions}" in text


def test_a_miss_is_in_bold_on_the_page():
    row = dense("forward_kl", TRAIN, "sm_90")
    limit = LIMITS["forward_kl"].special
    for special, text in [
        (limit, f"| {limit:.2f} of {limit:g} |"),
        (9.25, f"**9.25 of {limit:g}**"),
    ]:
        report = Report(COUNTED.facts, [replace(row, special=special)], [], [], [])
        assert text in tables.page(report)


def test_the_pages_in_docs_are_what_the_json_gives():
    for name, made in (("page", page.page), ("tables", tables.page)):
        assert run.OUTPUTS[name].read_text(encoding="utf-8") == made(COUNTED)
    assert run.OUTPUTS["plot"].read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_binds_each_loss_on_an_h100():
    text = page.page(COUNTED)
    table = [line.split("|") for line in text.splitlines() if line.startswith("| ")][2:]
    named = {cells[1].strip(): cells[-2].strip() for cells in table}
    assert set(DIVERGENCES) <= set(named)
    for name in DIVERGENCES:
        assert named[name] == COUNTED.predicted(name, page.CHIP).binds
        assert f"{page.BINDS[named[name]].capitalize()}**" in text
