"""What the GPU's measurements are made of, as far as it runs without one: graphs, the predictions beside
them, and the benchmarks' own parts."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.accuracy import sweep as accuracy
from benchmarks.core.records import EAGER, OURS, load, save
from benchmarks.core.timing import Budget
from benchmarks.gpu import beside, graphs, stages
from benchmarks.losses import form_providers
from benchmarks.losses.cases import Case
from benchmarks.losses.form_cases import FormCase, make_tensors
from benchmarks.losses.forms import FormRecord
from benchmarks.losses.providers import PROVIDERS
from benchmarks.losses.records import COPY, OURS_BACKWARD, Record
from benchmarks.static import results
from benchmarks.static.chips import CHIPS
from benchmarks.static.launches import BACKWARD, ENTROPY, EVAL, ODD, TRAIN

CPU = torch.device("cpu")
FACTS = {"gpu": None, "cpu": "a CPU"}


def test_a_graph_of_the_cpu_is_refused():
    with pytest.raises(RuntimeError, match="needs a GPU, got the device cpu"):
        graphs.captured(lambda: None, CPU)


def test_a_case_is_checked_before_it_is_timed(monkeypatch):
    """On the CPU, where a "replay" is one more run; then with a gradient of ours that is wrong."""
    monkeypatch.setattr(graphs, "captured", lambda run, device: run)
    case, budget = Case("forward_kl", 8, 100, "float32"), Budget(0.1, 2, 3)
    records = graphs.run_case(case, CPU, budget)
    assert [r.provider for r in records] == list(graphs.CONTENDERS)
    assert all(r.measured and r.graph_ms > 0 and r.copy_ms > 0 for r in records)
    wrong = replace(PROVIDERS[OURS], build=lambda *_: lambda s, t: (s * t).mean())
    monkeypatch.setitem(PROVIDERS, OURS, wrong)
    eager, ours, backward = graphs.run_case(case, CPU, budget)
    assert eager.measured
    assert backward.measured
    assert "wrong gradient of ours" in ours.reason


def test_records_of_graphs():
    case = Case("forward_kl", 64, 1000, "bfloat16")
    medians = {
        COPY: 2.0,
        EAGER: 9.0,
        EAGER + graphs.GRAPHED: 8.0,
        OURS: 5.0,
        OURS + graphs.GRAPHED: 4.5,
    }
    eager, ours, backward = graphs.records_of(case, medians, {OURS_BACKWARD: "broken"})
    assert (ours.median_ms, ours.graph_ms, ours.host_ms) == (5.0, 4.5, 0.5)
    assert ours.times_copy == 4.5 / 3.0  # student and teacher in, gradient out: 1.5 copies
    assert eager.times_copy == 8.0 / 3.0
    assert (backward.measured, backward.reason) == (False, "broken")


def test_graphs_are_saved_case_by_case(tmp_path, monkeypatch):
    def run_case(case, device, budget):
        if case.vocab == 128256:
            raise KeyboardInterrupt
        return graphs.records_of(case, {COPY: 1.0}, dict.fromkeys(graphs.CONTENDERS, "none"))

    monkeypatch.setattr(stages, "missing_gpu", lambda: None)
    monkeypatch.setattr(graphs, "describe", lambda *_: {**FACTS, "commit": None, "date": ""} | dict.fromkeys(("python", "torch", "triton", "threads"), ""))  # fmt: skip
    monkeypatch.setattr(graphs, "run_case", run_case)
    path = tmp_path / "graphs.json"
    with pytest.raises(KeyboardInterrupt):
        graphs.main(["--losses", "forward_kl", "--json", str(path)])
    records, _ = load(path, graphs.GraphRecord)
    shapes = [shape for shape in graphs.SHAPES if shape[1] != 128256]
    assert [(r.tokens, r.vocab) for r in records[:: len(graphs.CONTENDERS)]] == shapes


def test_predictions_stand_beside_measurements(tmp_path, capsys):
    report = results.load(beside.RESULTS / "static.json")
    names = {"case": "a case", "dtype": "bfloat16", "provider": OURS, "label": "ours"}
    dense_names = {**names, "loss": "forward_kl", "vocab": 32000}
    base = Record(**dense_names, tokens=1024, model=None, mode="train")
    timed = replace(base, median_ms=0.5, copy_fraction=0.8)
    dense = [
        timed,
        replace(timed, mode="eval"),
        replace(timed, provider=OURS_BACKWARD),
        replace(timed, vocab=50257),
        replace(timed, vocab=50257, mode="eval"),
        replace(timed, provider=EAGER),
        replace(timed, status="failed"),
    ]
    graph = graphs.GraphRecord(**dense_names, tokens=64, graph_ms=0.25, times_copy=1.5)
    sizes = {"tokens": 8192, "hidden": None, "vocab": 128256, "k": None}
    form = FormRecord(**names, **sizes, form="tokens", loss="log_prob", median_ms=2.0)
    facts = {"gpu": CHIPS["H100"].device, "cpu": ""}
    save(tmp_path / "dense.json", dense, facts)
    save(tmp_path / "graphs.json", [graph], facts)
    save(tmp_path / "forms.json", [form, replace(form, form="linear", hidden=8)], facts)
    assert beside.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "H100, predicted" in printed
    assert "A100" not in printed
    found, _ = load(tmp_path / "predictions.json", beside.Compared)
    forms = [c.predicted_form for c in found]
    assert forms == [TRAIN, EVAL, BACKWARD, ODD, None, TRAIN, ENTROPY, None]
    first, in_graph, tokens = found[0], found[5], found[6]
    assert first.measured_times_copy == 1.25
    expected = report.predicted("forward_kl", "H100")
    assert first.predicted_times_copy["H100"] == expected.times_copy
    moved = expected.memory_bytes.minimal * 1024 * 32000
    at_bandwidth = moved / CHIPS["H100"].gb_per_s / 1e6
    assert first.predicted_ms["H100"] == pytest.approx(expected.times_copy * at_bandwidth)
    assert set(first.predicted_ms) == set(CHIPS)
    assert (in_graph.mode, in_graph.measured_ms, in_graph.measured_times_copy) == (
        "graph",
        0.25,
        1.5,
    )
    expected = report.predicted(None, "H100", "token", ENTROPY)
    assert tokens.predicted_times_copy["H100"] == expected.times_copy
    moved = expected.memory_bytes.minimal * 8192 * 128256
    assert tokens.predicted_ms["H100"] == pytest.approx(
        expected.times_copy * moved / CHIPS["H100"].gb_per_s / 1e6
    )


def test_a_folder_without_measurements(tmp_path, capsys):
    assert beside.main([str(tmp_path)]) == 1
    assert "no measurement" in capsys.readouterr().err


def test_the_forms_products_are_of_random_matrices(monkeypatch):
    case = FormCase("linear", "forward_kl", 8, 16, 32, None, "float32")
    factors = []
    run = form_providers.products(case, make_tensors(case, CPU, case.tokens))
    monkeypatch.setattr(form_providers.torch, "mm", lambda *x, **_: factors.extend(x))
    run()
    assert len(factors) == 8
    assert all((x != 0).float().mean() > 0.9 for x in factors)


def test_workers_of_the_accuracy(monkeypatch):
    assert accuracy.default_workers("torch") == os.cpu_count()
    monkeypatch.setattr(accuracy, "device_of", lambda path: SimpleNamespace(type="cuda"))
    assert accuracy.default_workers("triton") == 4
    assert accuracy.parse([]).workers is None
    assert accuracy.parse(["--workers", "3"]).workers == 3
