"""The example of a head split across ranks: a short run of it, and what is published of one."""

import importlib
import json
import subprocess
import sys

import pytest

from tests.support import ROOT, optional

for name in ("transformers", "tokenizers", "matplotlib", "rich"):
    optional(name)

RESULTS = ROOT / "examples/results/tensor_parallel.json"


def test_what_is_published(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    report = importlib.import_module("tensor_parallel_report")
    record = json.loads(RESULTS.read_text())
    assert report.markdown(record) in (ROOT / "docs/examples.md").read_text()
    assert record["largest_relative_difference"] <= record["tolerance"] == 1e-5
    assert (
        len(record["losses"]["split"])
        == len(record["losses"]["whole"])
        == record["config"]["steps"]
    )
    for module in ("tensor_parallel_report", "mode_report", "report"):
        sys.modules.pop(module, None)


@pytest.mark.full
def test_a_short_run(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        str(ROOT / "examples/tensor_parallel.py"), "--steps", "3", "--teacher-steps", "2", "--out", tmp_path,
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=500)
    record = json.loads((tmp_path / "tensor_parallel.json").read_text())
    assert record["largest_relative_difference"] <= 1e-5
    assert record["collectives_a_step"] == 1
    assert len(record["losses"]["split"]) == 3
