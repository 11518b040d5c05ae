"""The cache model: its limits, worked cases, and that the launcher's own choice goes into it."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from distill_ops.kernels import dense

from benchmarks.losses.records import Record
from benchmarks.static.cache_model import PIECES, Cache, missed, n_walks, traffic, traffic_of_record
from benchmarks.static.chips import CHIPS, chip_of
from distill_ops.analysis import aot
from distill_ops.analysis.forms import Form
from distill_ops.divergences.base import as_divergence

H100 = CHIPS["H100"]
ROW = 1 << 16  # bytes, in the worked cases


def chip_with_cache(monkeypatch, n_bytes):
    """An H100 with another L2, for the launcher and the model alike."""
    target = aot.TARGETS["sm_90"]
    facts = replace(target.facts, l2_bytes=n_bytes)
    monkeypatch.setitem(aot.TARGETS, "sm_90", replace(target, facts=facts))
    return H100


def predict(name, chip, n_cols=128256, dtype=torch.bfloat16, **options):
    form = Form(n_cols, dtype, dtype, **options)
    return traffic(form.launches(as_divergence(name), aot.TARGETS[chip.target]), chip)


def test_cache_drops_the_unused_and_passing_pieces_first():
    cache = Cache(3)
    assert not any(cache.touch(key, 1, keep) for key, keep in [("a", 1), ("b", 0), ("c", 1)])
    assert cache.touch("a", 1, True)
    cache.touch("d", 1, True)  # b goes, which only passes by
    assert cache.touch("c", 1, True)
    cache.touch("e", 1, True)  # a goes, unused for the longest time
    assert [cache.touch(key, 1, True) for key in "cde"] == [True] * 3
    assert not cache.touch("a", 1, True)


@pytest.mark.parametrize(
    ("name", "options", "all_fits", "nothing_fits"),
    [
        ("forward_kl", {}, 6, 10),
        ("jensen_shannon", {}, 6, 14),
        ("forward_kl", {"gradient": "none"}, 4, 4),
        ("jensen_shannon", {"gradient": "none"}, 4, 8),
        ("forward_kl", {"gradient": "backward"}, 10, 10),
        ("jensen_shannon", {"gradient": "backward"}, 10, 14),
        ("jensen_shannon", {"dtype": torch.float32}, 12, 28),
    ],
)
def test_limits(monkeypatch, name, options, all_fits, nothing_fits):
    """With all rows in cache the least possible; without a cache, what the kernel asks for."""
    large = predict(name, chip_with_cache(monkeypatch, 1 << 34), **options)
    assert large.numbers() == (all_fits, all_fits, all_fits, all_fits, nothing_fits)
    none = predict(name, chip_with_cache(monkeypatch, 1), **options)
    assert none.numbers() == (all_fits, *[nothing_fits] * 4)


@pytest.mark.parametrize("walks", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_programs_in_step(walks, share):
    """Each turn finds what the row's share of the cache holds of the walk before."""
    found = missed(10, ROW, 0, walks, share * 10 * ROW, spread=False, priorities=True)
    assert found == pytest.approx(walks - (walks - 1) * share, abs=2 * walks / PIECES)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_spread_programs_without_priorities(share):
    """Between the visits of a piece x of a row from the turn every program walks 2x of its row, at
    whatever place it is: x**2 / 2 of that on average twice, about its own turn. A cache of c rows a
    program keeps the piece while 2x - x**2 / 2 <= c."""
    kept = 2 - (4 - 2 * share) ** 0.5
    found = missed(64, ROW, 0, 2, share * 64 * ROW, spread=True, priorities=False)
    assert found == pytest.approx(2 - kept, abs=2 / PIECES)


def test_priorities_spare_what_will_be_read_again():
    """Spread over two walks, rows hold half of themselves at a time: half the rows' bytes suffice
    where what was read for the last time makes room, and do not where it stays."""
    cache = 0.55 * 64 * ROW
    with_priorities = missed(64, ROW, ROW / 2, 2, cache, spread=True, priorities=True)
    without = missed(64, ROW, ROW / 2, 2, cache, spread=True, priorities=False)
    assert with_priorities == pytest.approx(1, abs=0.05)
    assert without > 1.4


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("priorities", [False, True])
def test_a_larger_cache_never_misses_more(spread, priorities):
    sizes = [share * 20 * ROW for share in (0, 0.1, 0.3, 0.5, 0.8, 1.2, 3)]
    found = [missed(20, ROW, ROW / 2, 3, s, spread=spread, priorities=priorities) for s in sizes]
    assert found == sorted(found, reverse=True)
    assert found[0] == 3
    assert found[-1] == 1


def test_the_launchers_choice_goes_in(monkeypatch):
    assert predict("forward_kl", H100, 32000).predicted == 6
    real = dense.launch.dense_launch

    def crowded(*arguments):
        choice = real(*arguments)
        return replace(choice, n_programs=8 * choice.n_programs)

    monkeypatch.setattr(dense.launch, "dense_launch", crowded)
    assert predict("forward_kl", H100, 32000).predicted > 8
    monkeypatch.setattr(dense.launch, "dense_launch", real)
    assert predict("forward_kl", H100, 128256, n_rows=16).predicted == 6


@pytest.mark.parametrize("name", ["reverse_kl", "total_variation"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_ends_hold_the_prediction(name, chip):
    for n_cols in (32000, 151936, 262144):
        found = predict(name, chip, n_cols)
        assert found.minimal <= found.low <= found.predicted <= found.high <= found.requested


def record(**fields):
    facts = {"case": "", "model": None, "provider": "ours", "label": "ours"}
    shape = {"loss": "jensen_shannon", "tokens": 4096, "vocab": 128256}
    return Record(**{**facts, **shape, "dtype": "bfloat16", "mode": "train", **fields})


def test_prediction_for_a_record():
    assert traffic_of_record(record(), H100) == predict("jensen_shannon", H100)
    assert traffic_of_record(record(mode="eval"), H100).minimal == 4
    assert traffic_of_record(record(dtype="float16"), H100).minimal == 10  # 4, then 4 + 2
    assert traffic_of_record(record(loss="forward_kl", vocab=32000), H100).predicted == 6


def test_walks_of_a_launch():
    (launch,) = Form(32000).launches(as_divergence("jensen_shannon"), aot.TARGETS["sm_90"])
    assert n_walks(launch) == 3
    (launch,) = Form(32000).launches(as_divergence("forward_kl"), aot.TARGETS["sm_90"])
    assert n_walks(launch) == 2


def test_chip_of_a_device():
    assert chip_of("NVIDIA H100 80GB HBM3") is H100
    assert chip_of("NVIDIA H200") is CHIPS["H200"]
    assert chip_of("NVIDIA H100 PCIe") is None  # other clocks and memory
