"""What the GPU's measurements are made of, as far as it runs without one: graphs, the predictions beside
them, and the benchmarks' own parts."""

import os
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import parse as parse_dense
from benchmarks.accuracy import sweep
from benchmarks.core.records import EAGER, FAILED, OURS, load, save
from benchmarks.core.timing import Budget
from benchmarks.gpu import beside, graphs, measure, stages
from benchmarks.losses import form_providers, forms
from benchmarks.losses.cases import Case, select_cases
from benchmarks.losses.form_cases import CASES_GPU, FormCase, make_tensors
from benchmarks.losses.providers import PROVIDERS
from benchmarks.losses.records import COPY, OURS_BACKWARD, WAYS, Record
from benchmarks.static import results as static
from benchmarks.static.cache_model import Traffic
from benchmarks.static.chips import CHIPS
from benchmarks.static.launches import (
    BACKWARD,
    BF16,
    BUCKET,
    ENTROPY,
    EVAL,
    ODD,
    TRAIN,
    entries,
)
from benchmarks.static.roofline import predict
from tests.support.static_rows import made_up_row

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
    facts = FACTS | {
        "threads": 1,
        "commit": None,
        "date": "",
        "python": "",
        "torch": "",
        "triton": "",
    }
    monkeypatch.setattr(graphs, "describe", lambda *_: facts)
    monkeypatch.setattr(graphs, "run_case", run_case)
    path = tmp_path / "graphs.json"
    with pytest.raises(KeyboardInterrupt):
        graphs.main(["--losses", "forward_kl", "--json", str(path)])
    records, _ = load(path, graphs.GraphRecord)
    shapes = [shape for shape in graphs.SHAPES if shape[1] != 128256]
    assert [(r.tokens, r.vocab) for r in records[:: len(graphs.CONTENDERS)]] == shapes


def counts(*entries):
    """Made-up counts, bf16, for every chip: the n-th entry's launch takes n times a copy of it."""
    found = []
    for n, (kernel, form, divergence) in enumerate(entries, 1):
        for chip in CHIPS.values():
            fits = chip.limits(4)["instructions"]
            fields = {"kernel": kernel, "form": form, "divergence": divergence}
            row = made_up_row(**fields, special=0.0, row_instructions=n * fits)
            found.append(predict([row], [Traffic(*[4.0] * 5)], chip))
    return static.Report({}, [], found, [], [])


def test_predictions_stand_beside_measurements(tmp_path, monkeypatch, capsys):
    dense = [("dense", form, "forward_kl") for form in (TRAIN, EVAL, BACKWARD, ODD)]
    report = counts(*dense, ("token", ENTROPY, None), ("topk", BUCKET, "forward_kl"))
    static.save(tmp_path / "counts.json", report)
    monkeypatch.setattr(beside, "COUNTS", tmp_path / "counts.json")
    names = {
        "case": "a case",
        "loss": "forward_kl",
        "dtype": BF16,
        "provider": OURS,
        "label": "ours",
    }
    sizes = {"tokens": 1024, "vocab": 32000}
    timed = Record(**names, **sizes, model=None, mode="train", median_ms=0.5, copy_fraction=0.8)
    even = [timed, replace(timed, mode="eval"), replace(timed, provider=OURS_BACKWARD)]
    odd = [replace(timed, vocab=50257), replace(timed, vocab=50257, mode="eval")]
    others = [replace(timed, provider=EAGER), replace(timed, status=FAILED)]
    uncounted = replace(timed, dtype="float32")
    graph = graphs.GraphRecord(**names, **sizes, median_ms=1.0, graph_ms=0.25, times_copy=1.5)
    tokens = forms.FormRecord(**names, **sizes, form="tokens", hidden=None, k=None, median_ms=2.0)
    facts = {"gpu": CHIPS["H100"].device, "cpu": ""}
    save(tmp_path / "dense.json", [*even, *odd, *others, uncounted], facts)
    save(tmp_path / "graphs.json", [graph], facts)
    of_forms = [
        tokens,
        replace(tokens, form="topk", k=64),
        replace(tokens, form="linear", hidden=8),
    ]
    save(tmp_path / "forms.json", of_forms, facts)
    assert beside.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "H100, predicted" in printed
    assert "A100" not in printed
    found, _ = load(tmp_path / "predictions.json", beside.Compared)
    expected = [
        *((0.5, 1.25, n, f"dense, {form}") for n, form in ((1, TRAIN), (2, EVAL), (3, BACKWARD))),
        (0.5, 1.25, 4, f"dense, {ODD}"),
        (0.5, 1.25, None, None),  # the forward alone of an odd vocabulary
        (0.5, 1.25, None, None),  # float32
        (0.25, 1.5, 1, f"dense, {TRAIN}"),
        (2.0, None, 5, f"token, {ENTROPY}"),
        (2.0, None, 6, f"topk, {BUCKET}"),
        (2.0, None, None, None),
    ]
    for c, (milliseconds, copies, n, form) in zip(found, expected, strict=True):
        assert (c.measured_ms, c.measured_times_copy) == (milliseconds, copies)
        assert c.predicted_form == form
        wanted = {} if n is None else dict.fromkeys(CHIPS, n)
        assert c.predicted_times_copy == pytest.approx(wanted, abs=0.01)
    at_bandwidth = 4 * 1024 * 32000 / CHIPS["H100"].gb_per_s / 1e6
    assert found[2].predicted_ms["H100"] == pytest.approx(3 * at_bandwidth, rel=1e-3)
    assert found[6].mode == beside.GRAPH


def test_what_is_measured_is_counted():
    """What the measurements ask of the counts has a line in their matrix."""
    options = parse_dense([*measure.DENSE, "--device", "cpu"])
    cases = select_cases("cuda", True, options.losses, options.shapes, options.dtype)
    small = [Case(loss, *s, BF16) for s in graphs.SHAPES for loss in graphs.SMALL_LOSSES]
    wanted = []
    for provider in WAYS:
        who = {"provider": provider, "label": ""}
        for mode in ("train", "eval"):
            wanted += [Record(case="", **who, model=None, mode=mode, **vars(c)) for c in cases]
        wanted += [graphs.GraphRecord(case="", **who, **vars(c)) for c in small]
        wanted += [forms.FormRecord(case="", **who, **vars(c)) for c in CASES_GPU]
    found = [entry for record in wanted if (entry := beside.counted_as(record))]
    counted = set(entries("sm_90"))
    assert not set(found) - counted
    assert {(e.kernel, e.form) for e in set(found) & counted} == {
        *product(["dense"], (TRAIN, ODD, EVAL, BACKWARD)), ("token", ENTROPY), ("topk", BUCKET),
    }  # fmt: skip


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


def test_forms_are_saved_case_by_case_within_their_seconds(tmp_path, monkeypatch):
    budgets = []

    def run_case(case, device, budget):
        budgets.append(budget)
        if len(budgets) == 2:
            raise KeyboardInterrupt
        names = {"case": case.name, "provider": OURS, "label": "ours", "reason": "none"}
        return [forms.FormRecord(**names, status=FAILED, **vars(case))]

    monkeypatch.setattr(forms, "run_case", run_case)
    path = tmp_path / "forms.json"
    options = ["--forms", "tokens", "topk", "--seconds", "0.5", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        forms.main([*options, "--json", str(path)])
    assert budgets == 2 * [replace(forms.BUDGET, seconds=0.5)]
    records, _ = load(path, forms.FormRecord)
    assert [r.form for r in records] == ["topk"]


def test_workers_of_the_accuracy(monkeypatch):
    assert sweep.default_workers("torch") == os.cpu_count()
    monkeypatch.setattr(sweep, "device_of", lambda path: SimpleNamespace(type="cuda"))
    assert sweep.default_workers("triton") == 4
    assert sweep.parse([]).workers is None
    assert sweep.parse(["--workers", "3"]).workers == 3
