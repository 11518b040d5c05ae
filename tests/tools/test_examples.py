"""The examples on real text: a few steps of each, and that their own checks can fail."""

import importlib
import json
import math
import sys
import time
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
            name: importlib.import_module(name)
            for name in ("distill_text", "offline_teacher", "minillm", "minillm_parts")
        }
        load_corpus = cache(
            scripts["distill_text"].load_corpus
        )  # reading it takes longer than a run
        for script in scripts.values():
            patch.setattr(script, "load_corpus", load_corpus)
        corpus = sys.modules["corpus"]
        read = cache(corpus.read_documents)
        patch.setattr(corpus, "read_documents", lambda: list(read()))  # which its caller shuffles
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


def test_what_the_tokenizers_ask_for_is_printed(examples, capsys):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    corpus, config = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(vocab_size=8)
    sys.modules["training"].check_tokenizers(corpus, config)
    assert "- pass vocab_size=2 to the loss: the student's" in capsys.readouterr().out


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


ARMS = {
    "MiniLLM", "on-policy (token)", "on-policy (vocabulary)", "soft cross-entropy",
    "sequence-level KD", "further SFT",
}  # fmt: skip


def test_minillm(examples, tmp_path, monkeypatch):
    """Its quick form, of two seeds: every way takes steps, is measured, drawn and spoken of."""
    arguments = ["minillm.py", "--quick", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    examples.minillm.main()
    record = json.loads((tmp_path / "minillm.json").read_text())
    assert set(record["config"]["learning_rates"]) == set(record["summary"]["arms"]) == ARMS
    seconds = record["config"]["seconds"]
    for seed in record["seeds"]:
        before = {
            name: x
            for name, x in seed["student before"].items()
            if name not in ("seconds", "steps")
        }
        assert seed["teacher"]["reverse_kl"] == pytest.approx(0, abs=1e-6)
        for curve in seed["arms"].values():
            assert curve[0] == {"seconds": 0, "steps": 0} | before  # all from the same student
            assert curve[-1]["seconds"] >= seconds
            assert curve[-1]["steps"] >= 1
            assert curve[-1]["forward_kl"] != before["forward_kl"]
            assert all(math.isfinite(x) for x in curve[-1].values())
        texts = seed["samples"]
        assert set(texts) == ARMS | {"prompt", "teacher", "student before"}
    assert (tmp_path / "minillm.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- minillm:begin -->\nold\n<!-- minillm:end -->\nb\n")
    arguments = ["minillm_report.py", str(tmp_path / "minillm.json"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)
    report, drawn = sys.modules["minillm_report"], []
    monkeypatch.setattr(report, "draw", lambda *given: drawn.append(given))
    report.main()
    assert drawn == [(record, tmp_path / "minillm.png")]
    assert page.read_text().startswith("a\n<!-- minillm:begin -->\n![")
    assert page.read_text().endswith("\n<!-- minillm:end -->\nb\n")
    assert "old" not in page.read_text()


def test_minillm_counts_training_and_nothing_else(examples, monkeypatch):
    """Three ticks a step, of ten allowed: measurements take a thousand each and are not counted."""
    now = 0.0

    def wait(ticks):
        nonlocal now
        now += ticks

    def way(arm):
        while True:
            wait(3)
            yield 0.0

    def measure(student):
        wait(1000)
        return {"measured at": now}

    script = examples.minillm
    monkeypatch.setattr(script.time, "perf_counter", lambda: now)
    arm = SimpleNamespace(student=None, optimizer=SimpleNamespace(progress=None))
    curve = script.train("name", arm, way, 10.0, measure, n_measures=2)
    assert [(point["seconds"], point["steps"]) for point in curve] == [(6, 2), (12, 4)]
    assert arm.optimizer.progress == 0.9  # of the last step, which began in time
    assert now == 2 * 1000 + 4 * 3


def test_minillm_parts(examples, monkeypatch, tmp_path):
    """Every part of a step is counted, and the page says what the JSON says."""
    script = examples.minillm_parts
    page = tmp_path / "page.md"
    page.write_text(f"a\n{script.BEGIN}\n{script.END}\nb\n")
    arguments = "minillm_parts.py --quick --rollouts 2".split()
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path), "--page", str(page)])
    start = time.perf_counter()
    script.main()
    wall = time.perf_counter() - start
    record = json.loads((tmp_path / "minillm_parts.json").read_text())
    assert record["steps"] == 2
    assert len(record["ms"]) == 9
    assert all(ms > 0 for ms in record["ms"].values())
    assert sum(record["ms"].values()) * record["steps"] / 1e3 < wall
    assert page.read_text() == f"a\n{script.BEGIN}\n{script.block_of(record)}\n{script.END}\nb\n"
    committed = EXAMPLES / "results/minillm_parts.json"
    text = (ROOT / "docs/examples.md").read_text()
    block = script.block_of(json.loads(committed.read_text()))
    assert text == sys.modules["minillm_report"].in_page(text, block, script.BEGIN, script.END)


def test_minillm_judges_by_the_definitions(examples, tmp_path):
    """Both KLs of two models over the whole vocabulary in float64, from their logits."""
    script = examples.minillm
    config = script.config_of(script.options_of(["--quick", "--out", str(tmp_path)]), seed=3)
    corpus = script.load_corpus(config.vocab_size, config.length, 0, config.max_documents)
    make, sizes = script.make_model, (config.vocab_size, 32, 1)
    teacher, student = make(*sizes, seed=1), make(*sizes, seed=2)
    with torch.no_grad():
        for model in (teacher, student):
            model.lm_head.weight *= 20  # far from uniform
    judge = script.Judge(teacher, corpus, config)
    found = judge(student)

    def log_probs(model, ids):
        with torch.no_grad():
            return model(ids).logits.double().log_softmax(-1)

    n_tokens = config.n_sampled
    ids = script.sample(student, judge.prompts, n_tokens, config.seed)
    log_q, log_p = (log_probs(model, ids)[:, -n_tokens - 1 : -1] for model in (student, teacher))
    reverse_kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean(-1)
    assert found["reverse_kl"] == pytest.approx(reverse_kl.mean().item(), rel=1e-5)
    error = reverse_kl.std() / len(reverse_kl) ** 0.5
    assert found["reverse_kl_standard_error"] == pytest.approx(error.item(), rel=1e-4)
    assert found["entropy"] == pytest.approx(-(log_q.exp() * log_q).sum(-1).mean().item(), rel=1e-5)

    (batch,) = judge.text
    log_q, log_p = (log_probs(model, batch.input_ids) for model in (student, teacher))
    counted = batch.loss_mask
    forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean().item()
    assert found["forward_kl"] == pytest.approx(forward_kl, rel=1e-5)
    of_labels = log_q.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0][counted]
    assert found["perplexity"] == pytest.approx(of_labels.mean().neg().exp().item(), rel=1e-5)


def test_minillm_says_where_it_loses(examples):
    report = sys.modules["minillm_report"]

    def record(mini_llm, further_sft):
        def point(reverse_kl, forward_kl):
            measured = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "entropy": 3.0}
            return measured | {"perplexity": 50.0, "reverse_kl_standard_error": 0.01, "steps": 5}

        arms = {name: [point(1.0, 1.0)] for name in ARMS}
        arms |= {"MiniLLM": [point(*mini_llm)], "further SFT": [point(*further_sft)]}
        seeds = [{"arms": arms, "student before": point(1.2, 1.2), "teacher": point(0.0, 0.0)}]
        return {"seeds": seeds, "summary": report.summary_of(seeds)}

    won = "\n".join(report.findings(record((0.5, 0.5), (1.0, 1.0))))
    assert "MiniLLM -50%, on-policy (token) +0%" in won
    assert "At least 20% below it: MiniLLM." in won
    assert "Reverse KL on own samples: MiniLLM (0.5) has the lowest, before" in won
    assert "ends better than it began in all three" in won
    lost = "\n".join(report.findings(record((0.81, 1.3), (1.0, 0.7))))
    assert "MiniLLM -19%" in lost
    assert "At least 20% below it: none." in lost
    assert "further SFT (0.7) has the lowest, MiniLLM (1.3) is number 6 of 6" in lost
    assert "ends worse than it began in forward KL on held-out text." in lost


def test_minillm_results_are_those_of_the_page(examples):
    """Table and findings in docs/examples.md are the JSON's, and the rates those that were chosen."""
    report, results = sys.modules["minillm_report"], EXAMPLES / "results"
    page = (ROOT / "docs/examples.md").read_text()
    if not (results / "minillm.json").exists():  # nothing measured, nothing said
        assert f"{report.BEGIN}\n{report.END}" in page
        return
    record = json.loads((results / "minillm.json").read_text())
    assert page == report.in_page(page, report.block_of(record), report.BEGIN, report.END)
    rates = {name: way.learning_rate for name, way in examples.minillm.ARMS.items()}
    assert record["config"]["learning_rates"] == rates
    assert json.loads((results / "minillm_tuning.json").read_text())["chosen"] == rates
