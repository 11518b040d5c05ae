"""Recipes of the pages on small language models; the examples on real text: a few steps of each,
and that their own checks can fail."""

import importlib
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_ops import TeacherTopKDataset, distillation_loss

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODULES = [path.stem for path in EXAMPLES.glob("*.py")]
STEPS, TEACHER_STEPS = 3, 2


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


def recipe(page: str, **names) -> dict:
    """What the first Python block of a page leaves, run with ``names``."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)[1]
    exec(block, names)
    return names


@pytest.fixture
def language_models():
    """A student and a teacher, both in training, and a batch: ids, and labels of the same tokens."""
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    student, teacher = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=n, num_attention_heads=2, **sizes)
        )
        for n in (8, 12)
    )
    ids = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    return student, teacher, ids, labels


def test_the_shift_is_that_of_hugging_face(language_models):
    student, _, ids, labels = language_models
    found = student(ids, labels=labels)
    loss = distillation_loss(
        found.logits[:, :-1], None, labels=labels[:, 1:], hard_label_weight=1.0
    )
    torch.testing.assert_close(loss, found.loss)
    aligned = distillation_loss(found.logits, None, labels=labels, hard_label_weight=1.0)
    assert abs(aligned - found.loss) > 1e-3


def test_the_first_recipe_from_hidden_states(language_models):
    """As the page has it, of a teacher in training; the loss of the logits, and its gradients."""
    student, teacher, ids, labels = language_models
    recipe("linear.md", student=student, teacher=teacher, ids=ids, labels=labels)
    ours = student.lm_head.weight.grad.clone()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.zero_grad()
    with torch.no_grad():
        teacher_logits = teacher(ids).logits[:, :-1]
    distillation_loss(
        student(ids).logits[:, :-1], teacher_logits, labels=labels[:, 1:],
        divergence="jensen_shannon", hard_label_weight=0.1,
    ).backward()  # fmt: skip
    torch.testing.assert_close(ours, student.lm_head.weight.grad)


def test_the_recipe_for_sampled_tokens(language_models):
    student, teacher, ids, _ = language_models
    logits, of_teacher = student(ids).logits, teacher(ids).logits.detach()
    rest = {name: torch.ones(2, 6) for name in ("advantages", "old_log_prob")}
    names = {"student_logits": logits, "teacher_logits": of_teacher, "input_ids": ids, **rest}
    found = recipe("tokens.md", mask=torch.ones(2, 6, dtype=torch.bool), **names)["found"]
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found.student_log_prob, expected)


def test_distil_text(examples, tmp_path, monkeypatch):
    record = run(examples.distill_text, tmp_path, monkeypatch)
    assert record["agreement"]["agree"]
    for student in record["students"].values():
        assert len(student["losses"]) == STEPS
        assert student["held_out_nats"]["after"] < student["held_out_nats"]["before"]
    assert (tmp_path / "distill_text.png").read_bytes().startswith(b"\x89PNG")


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


def test_offline_teacher_fails_where_rows_are_not_those_of_their_tokens(
    examples, tmp_path, monkeypatch
):
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
