"""``python -m benchmarks.static``: what it writes, and how other packages' kernels are counted."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks.static import page, peers, run, tables
from benchmarks.static.digest import kernels_digest
from benchmarks.static.launches import ODD, TRAIN, built_in
from benchmarks.static.limits import LIMITS, OTHER_COMPILERS
from benchmarks.static.peers import Peer, PeerRow, peer_rows
from benchmarks.static.results import Report, load

DIVERGENCES = list(built_in())
COUNTED = load(run.OUTPUTS["json"])


def trained(divergence):
    """Its row of the last full run on sm_90."""
    return next(row for row in COUNTED.trained("sm_90") if row.divergence == divergence)


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
    before = trained("reverse_kl")
    assert found.instructions == pytest.approx(before.instructions, rel=slack)
    assert {p.chip for p in report.predictions} == {"H100", "H200"}
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    assert paths["page"].read_text(encoding="utf-8") == page.page(report)
    text = paths["tables"].read_text(encoding="utf-8")
    assert text == tables.page(report)
    assert f"| reverse_kl | {found.instructions:.1f} of {LIMITS['reverse_kl'].instructions}" in text


def test_a_miss_is_in_bold_on_the_page():
    row = trained("forward_kl")
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
