"""The examples on real text: a few steps of each, and that their own checks can fail."""

import importlib
import json
import math
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from distill_ops import TeacherTopKDataset
from tests.support import ROOT, optional

for name in ("transformers", "tokenizers", "matplotlib", "rich"):
    optional(name)

EXAMPLES = ROOT / "examples"
MODULES = [path.stem for path in EXAMPLES.glob("*.py")]
STEPS, TEACHER_STEPS = 2, 1


@pytest.fixture(scope="module")
def examples():
    """The scripts' modules, importable by the names that they use among themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        scripts = {
            name: importlib.import_module(name) for name in ("distill_text", "offline_teacher")
        }
        load_corpus = cache(
            scripts["distill_text"].load_corpus
        )  # reading it takes longer than a run
        for script in scripts.values():
            patch.setattr(script, "load_corpus", load_corpus)
        yield SimpleNamespace(**scripts)
    for name in MODULES:
        sys.modules.pop(name, None)


def run(script, folder, monkeypatch) -> dict:
    """Through its command line; what it wrote."""
    steps = ["--steps", str(STEPS), "--teacher-steps", str(TEACHER_STEPS)]
    arguments = [f"{script.__name__}.py", "--quick", *steps, "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    return json.loads((folder / f"{script.__name__}.json").read_text())


@pytest.mark.full
def test_distil_text(examples, tmp_path, monkeypatch):
    record = run(examples.distill_text, tmp_path, monkeypatch)
    assert record["agreement"]["agree"]
    for student in record["students"].values():
        assert len(student["losses"]) == STEPS
        assert student["held_out_nats"]["after"] < student["held_out_nats"]["before"]
    assert (tmp_path / "distill_text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_offline_teacher(examples, tmp_path, monkeypatch):
    record = run(examples.offline_teacher, tmp_path, monkeypatch)
    config, store = record["config"], record["store"]
    assert all(check["holds"] for check in record["checks"].values())
    n_windows = -(-STEPS * config["batch_size"] // config["epochs"])  # each is seen once an epoch
    assert store["tokens"] == n_windows * config["length"]
    assert store["bytes"] >= store["tokens"] * (6 * config["k"] + 4)
    assert store["bfloat16_logits_bytes"] == store["tokens"] * config["vocab_size"] * 2
    assert 0 < store["covered_probability"] < 1
    live, stored = record["students"].values()
    assert live["held_out"]["nats"][0] == stored["held_out"]["nats"][0]  # the same weights
    for student in (live, stored):
        assert len(student["forward_kl"]) == STEPS
        assert student["held_out"]["steps"] == [0, STEPS]
        assert student["held_out"]["nats"][-1] < student["held_out"]["nats"][0]
    (tmp_path / "offline_teacher.png").unlink()
    monkeypatch.setattr(sys, "argv", ["offline_report.py", str(tmp_path / "offline_teacher.json")])
    sys.modules["offline_report"].main()
    assert (tmp_path / "offline_teacher.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_offline_teacher_fails_where_rows_are_not_those_of_their_tokens(
    examples, tmp_path, monkeypatch
):
    """In `make test` the check alone fails, in the test after this."""

    def next_rows(self, index):
        return take(self, (torch.as_tensor(index) + 1) % len(self))

    take = TeacherTopKDataset.__getitem__
    monkeypatch.setattr(TeacherTopKDataset, "__getitem__", next_rows)
    with pytest.raises(SystemExit, match="FAILED: read_back_error_over_format"):
        run(examples.offline_teacher, tmp_path, monkeypatch)


def test_each_check_of_the_offline_teacher_can_fail(examples):
    checks_of, tokens, k = examples.offline_teacher.checks_of, 1000, 64

    def student(forward_kl, held_out):
        return {"forward_kl": [forward_kl, 1.0], "held_out": {"nats": [9.0, held_out]}}

    def record(n_bytes=400 * tokens + 1024, read_back=1.0, forward_kl=2.0, held_out=6.1):
        return {
            "config": {"k": k},
            "store": {"tokens": tokens, "files": 1, "bytes": n_bytes, "worst_read_back": read_back},
            "students": {
                "live teacher": student(2.0, 6.0),
                "stored teacher": student(forward_kl, held_out),
            },
        }

    assert all(check["holds"] for check in checks_of(record()).values())
    beyond = {
        "held_out_relative_difference": {"held_out": 6.0 * 1.021},
        "store_bytes": {"n_bytes": 400 * tokens + 1025},
        "read_back_error_over_format": {"read_back": math.nan},
        "first_forward_kl": {"forward_kl": 2.001},
    }
    assert set(beyond) == set(checks_of(record()))
    for name, change in beyond.items():
        found = checks_of(record(**change))
        assert [failed for failed, check in found.items() if not check["holds"]] == [name]
