"""A stored teacher reads back as it was, in the bytes promised; what no teacher can have is refused."""

import json
import math
import os
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from distill_ops import (
    TeacherTopK,
    TeacherTopKDataset,
    reference,
    rows_written,
    save_teacher_topk,
    teacher_topk,
)
from tests.support import ROOT
from tests.support.helpers import make_logits
from tests.support.stored_teachers import FACTS, allowed_error, assert_same, make_topk, snapshot

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("rows_per_shard", [None, 1, 7, 10, 30, 100])
def test_round_trip(tmp_path, rows_per_shard):
    """Rows in order, whatever the batches and the files, and at most 6 bytes a slot, 16 a row."""
    batches = [make_topk(n, seed=n) for n in (3, 0, 12, 1, 14)]
    every = TeacherTopK(*(torch.cat(x) for x in zip(*batches, strict=True)))
    shaped = [
        TeacherTopK(*(x.view(2, 6, 8) for x in b)) if len(b.ids) == 12 else b for b in batches
    ]
    path = tmp_path / "store"
    save_teacher_topk(path, iter(shaped), rows_per_shard=rows_per_shard, **FACTS)
    assert os.listdir(tmp_path) == ["store"]
    dataset = TeacherTopKDataset(path, **FACTS)
    assert len(dataset) == 30
    assert (dataset.k, dataset.vocab_size, dataset.temperature) == (8, 50, 2.0)
    assert dataset.teacher == "a teacher"
    read = dataset[:]
    assert read.log_probs.dtype == torch.float32
    assert read.ids.dtype == torch.int64
    assert_same(read, every)
    files = [path] if rows_per_shard is None else sorted(path.glob("shard-*"))
    assert len(files) == (1 if rows_per_shard is None else -(-30 // rows_per_shard))
    for file in files:
        n_rows = min(rows_per_shard or 30, 30)
        assert file.stat().st_size <= 6 * 8 * n_rows + 16 * n_rows + 1024
        if rows_per_shard is not None:
            with pytest.raises(ValueError, match="expected a whole store: open its folder"):
                TeacherTopKDataset(file)
    assert dataset.verify() is None
    assert rows_written(path) == 30


def test_one_batch_pairs_and_empty_stores(tmp_path):
    topk = make_topk(4)
    for batches in (topk, [tuple(topk)], [[topk.log_probs.double(), topk.ids.int()]]):
        save_teacher_topk(tmp_path / "a", batches, **FACTS)
        assert_same(TeacherTopKDataset(tmp_path / "a")[:], topk)
    save_teacher_topk(tmp_path / "a", TeacherTopK(*(x[0] for x in topk)), **FACTS)  # [k]: a row
    assert_same(TeacherTopKDataset(tmp_path / "a")[0], TeacherTopK(*(x[0] for x in topk)))
    for name, rows_per_shard in [("a", None), ("b", 5)]:
        none = TeacherTopK(*(x[:0] for x in topk))
        save_teacher_topk(tmp_path / name, none, rows_per_shard=rows_per_shard, **FACTS)
        dataset = TeacherTopKDataset(tmp_path / name)
        assert len(dataset) == 0
        assert dataset[:].ids.shape == (0, 8)


def test_unused_slots_infinities_and_extreme_differences(tmp_path):
    log_probs = torch.tensor(
        [
            [-0.5, -1.0, -INF],  # a used slot of probability 0
            [-0.5, 7.0, NAN],  # unused slots, whatever they hold
            [-INF, -INF, -INF],
            [-INF, -INF, -INF],  # used, all of them
            [-0.5, -70000.5, -3e38],  # beyond float16
            [-1.5, -1.5 - 2**-23, -1.5 - 2**-14],
            [-3.0, -0.5, -1.5],  # in no order
        ]
    )
    ids = torch.tensor([[3, 1, 2], [4, -1, -1], [-1] * 3, *[[0, 1, 2]] * 4])
    save_teacher_topk(tmp_path / "a", [(log_probs, ids)], **FACTS)
    dataset = TeacherTopKDataset(tmp_path / "a")
    dataset.verify()
    read = dataset[:]
    expected = log_probs.clone()
    expected[1, 1:] = -INF
    expected[4, 1:] = -65504.5
    assert torch.equal(read.ids, ids)
    torch.testing.assert_close(read.log_probs, expected, rtol=0, atol=2**-23)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-60000, 0, width=32), min_size=4, max_size=4))
def test_accuracy(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "accuracy"
    log_probs = torch.log_softmax(torch.tensor(values), -1)
    save_teacher_topk(path, TeacherTopK(log_probs, torch.arange(4)), **FACTS)
    read = TeacherTopKDataset(path)[0].log_probs.double()
    log_probs = log_probs.double()
    assert ((read - log_probs).abs() <= allowed_error(log_probs)).all()


def test_the_sum_of_a_row_is_kept(tmp_path):
    """To float32 rounding: what a confident teacher leaves for the rest is far less than float16's."""
    logits, _ = make_logits((200, 50), scale=6.0)
    topk = teacher_topk(logits, 8)
    save_teacher_topk(tmp_path / "a", topk, **FACTS)
    read = TeacherTopKDataset(tmp_path / "a")[:]
    unshifted = topk.log_probs[:, :1] + (topk.log_probs - topk.log_probs[:, :1]).half()
    sums = (x.double().exp().sum(-1) for x in (topk.log_probs, read.log_probs, unshifted))
    truth, ours, without = (1 - x for x in sums)
    seen = truth > 1e-4  # far enough from float32's own rounding of the sum
    assert ((ours / truth - 1)[seen].abs() < 0.01).all()
    assert ((without / truth - 1)[seen].abs() > 0.1).any()


@pytest.mark.parametrize(
    "divergence", ["soft_cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon"]
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_loss_within_bfloat16_rounding(tmp_path, divergence, scale):
    """Over the K tokens and the rest as one outcome, K + 1 in all."""
    student, teacher = (x.double() for x in make_logits((64, 50), scale=scale))
    original = teacher_topk(teacher, 8)
    save_teacher_topk(tmp_path / "a", original, **FACTS)
    read = TeacherTopKDataset(tmp_path / "a")[:]
    log_q = torch.log_softmax(student, -1).gather(-1, original.ids)
    outside = student.scatter(-1, original.ids, -INF).logsumexp(-1) - student.logsumexp(-1)
    losses = []
    for log_probs in (original.log_probs.double(), read.log_probs.double()):
        rest = (1 - log_probs.exp().sum(-1)).clamp(min=2**-24).log()
        pair = [
            torch.cat([inside, tail[:, None]], -1)
            for inside, tail in [(log_q, outside), (log_probs, rest)]
        ]
        loss = reference.distillation_loss(*pair, divergence=divergence, reduction="none")
        losses.append(loss)
    assert losses[0].min() > 0.01
    assert ((losses[1] / losses[0] - 1).abs() <= 2**-8).all()


def test_metadata_and_tensors_on_disk(tmp_path):
    """The format as documented, read without this package."""
    save_teacher_topk(tmp_path / "a", make_topk(5), **FACTS | {"temperature": 0.1})
    raw = (tmp_path / "a").read_bytes()
    rows = raw[8 + int.from_bytes(raw[:8], "little") :]
    settings = {
        "k": 8, "rows_per_shard": None, "teacher": "a teacher", "temperature": 0.1, "vocab_size": 50
    }  # fmt: skip
    hashed = json.dumps(["distill_ops.teacher_topk", "2", settings], sort_keys=True)
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert [*metadata] == ["distill_ops.teacher_topk"]
    strings = {
        "format": "distill_ops.teacher_topk",
        "version": "2",
        "vocab_size": "50",
        "temperature": "0.1",
        "teacher": "a teacher",
        "k": "8",
        "rows_per_shard": "none",
        "store": sha256(hashed.encode()).hexdigest(),
        "shard": "0",
        "first_row": "0",
        "rows": "5",
        "largest_id": str(tensors["ids"].max().item()),
        "checksum": sha256(rows).hexdigest(),
    }
    assert metadata["distill_ops.teacher_topk"] == json.dumps(strings, sort_keys=True)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        "ids": (torch.int32, (5, 8)),
        "differences": (torch.float16, (5, 8)),
        "top": (torch.float32, (5,)),
    }
    assert TeacherTopKDataset(tmp_path / "a", temperature=0.1).temperature == 0.1
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert save(tensors, metadata) == raw


def test_equal_writes_give_equal_bytes(tmp_path):
    """In another process too, whose hashes of strings differ; and whatever the batches are."""
    program = (
        "import sys; from distill_ops import save_teacher_topk;"
        "from tests.support.stored_teachers import FACTS, make_topk;"
        "save_teacher_topk(sys.argv[1], make_topk(10), rows_per_shard=4, **FACTS);"
        "save_teacher_topk(sys.argv[1] + '/file', make_topk(10), **FACTS)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], check=True, cwd=ROOT)
    topk = make_topk(10)
    here = tmp_path / "here"
    save_teacher_topk(
        here, zip(*(x.split(3) for x in topk), strict=True), rows_per_shard=4, **FACTS
    )
    save_teacher_topk(here / "file", topk, **FACTS)
    assert len(snapshot(here)) == 5
    assert snapshot(here) == snapshot(tmp_path / "there")


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_shards_are_written_as_the_teacher_runs(tmp_path, ids_dtype):
    """And a batch's tensors may be refilled for the next."""
    topk, buffer = make_topk(12), make_topk(3)
    buffer = TeacherTopK(buffer.log_probs, buffer.ids.to(ids_dtype))
    written = []

    def run_teacher():
        for start in range(0, 12, 3):
            written.append(len(list(tmp_path.glob("store/shard-*"))))
            for x, source in zip(buffer, topk, strict=True):
                x.copy_(source[start : start + 3])
            yield buffer

    save_teacher_topk(tmp_path / "store", run_teacher(), rows_per_shard=4, **FACTS)
    assert written == [0, 0, 1, 2]
    assert_same(TeacherTopKDataset(tmp_path / "store")[:], topk)


def with_ids(ids):
    return TeacherTopK(torch.full((1, 3), -2.0), torch.tensor([ids]))


def refill(x, index, value):
    x = x.clone()
    x[index] = value
    return x


BAD_BATCHES = [
    # a batch that comes after good ones of k = 3, error, part of the message
    (torch.zeros(2, 3), TypeError, "batch 1 must be a TeacherTopK or a pair .*got Tensor"),
    (((1.0,), (2,)), TypeError, r"batch 1 must be a TeacherTopK or a pair .*got tuple"),
    ((torch.zeros(2, 3).int(), torch.zeros(2, 3).int()), TypeError, "log_probs of batch 1 must be"),
    ((-torch.ones(2, 3), torch.zeros(2, 3)), TypeError, "ids of batch 1 must be int32 or int64"),
    ((-torch.ones(2, 3), torch.zeros(3, 2).int()), ValueError, r"got \(2, 3\) and \(3, 2\)"),
    ((-torch.ones(2, 0), torch.zeros(2, 0).int()), ValueError, "at least one slot"),
    ((torch.zeros(()), torch.zeros(()).int()), ValueError, r"\[..., k\]"),
    (make_topk(2, k=4), ValueError, "batch 1 must have k=3 slots a row as before, got 4"),
    (
        (-torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64, device="meta")),
        TypeError,
        "ids of batch 1 hold no values: they are on meta",
    ),
    (
        with_ids([0, 1, 50]),
        ValueError,
        r"batch 1 must hold ids in \[0, 50\), or -1, got 50 in row 0",
    ),
    (with_ids([0, -2, 1]), ValueError, r"batch 1 must hold ids in \[0, 50\), or -1, got -2"),
    (with_ids([4, 0, 4]), ValueError, "batch 1 must hold ids unique within a row.* got 4 in row 0"),
    (
        (refill(-torch.ones(2, 3), (1, 2), 0.5), torch.arange(6).view(2, 3)),
        ValueError,
        "batch 1 must hold log-probabilities <= 0, got 0.5 in row 1",
    ),
    (
        (refill(-torch.ones(2, 3), (0, 0), INF), torch.arange(6).view(2, 3)),
        ValueError,
        "log-probabilities <= 0, got inf",
    ),
    (
        (refill(-2 * torch.ones(2, 3), (1, 1), NAN), torch.arange(6).view(2, 3)),
        ValueError,
        "batch 1 must hold log-probabilities <= 0, got nan in row 1",
    ),
    (
        (refill(-2 * torch.ones(2, 3), (1, 1), 0.0), torch.arange(6).view(2, 3)),
        ValueError,
        r"batch 1 must hold probabilities that add up to at most 1, got 1.27\d* in row 1",
    ),
    (
        (torch.full((2, 3), -2.0).to(torch.float8_e5m2), torch.arange(6).view(2, 3)),
        TypeError,
        "log_probs of batch 1 must be float32, bfloat16, .*got torch.float8_e5m2",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
def test_rounding_of_a_dtype_is_no_error(tmp_path, dtype, scale):
    """Whole rows, whose probabilities add up to 1 before their logarithms are rounded."""
    logits, _ = make_logits((2000, 50), scale=scale)
    rows = TeacherTopK(torch.log_softmax(logits, -1).to(dtype), torch.arange(50).expand(2000, 50))
    save_teacher_topk(tmp_path / "a", rows, **FACTS)
    TeacherTopKDataset(tmp_path / "a").verify()
    more = rows._replace(log_probs=rows.log_probs.float() + 0.3)
    with pytest.raises(ValueError, match="add up to at most 1, got 1.3|log-probabilities <= 0"):
        save_teacher_topk(tmp_path / "a", more, **FACTS)


@pytest.mark.parametrize(("batch", "error", "message"), BAD_BATCHES)
def test_a_bad_batch_leaves_the_older_file(tmp_path, batch, error, message):
    save_teacher_topk(tmp_path / "store", make_topk(3), **FACTS)
    before = snapshot(tmp_path)
    with pytest.raises(error, match=message):
        save_teacher_topk(tmp_path / "store", [make_topk(5, k=3), batch], **FACTS)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": 3}, TypeError, "path must be a str or a path, got int"),
        (
            {"path": "nowhere/store"},
            ValueError,
            "path must lie in a folder that exists, got .*where",
        ),
        ({"path": "folder"}, ValueError, "path is a folder, which needs rows_per_shard"),
        ({"path": "file", "rows_per_shard": 2}, ValueError, "path must be a new or empty folder"),
        ({"path": "/dev/null"}, ValueError, "path must be a file, new or to be replaced"),
        ({"path": "a\0b"}, ValueError, "path must hold no null character"),
        ({"path": "\udc80"}, ValueError, "path must be text that UTF-8 can hold"),
        ({"path": "folder", "rows_per_shard": 2}, ValueError, "path must be a new or empty folder"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be in .*, got 0"),
        ({"vocab_size": 2**31}, ValueError, "vocab_size must be in .*, got 2147483648"),
        ({"vocab_size": "50"}, TypeError, "vocab_size must be an int"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1"),
        ({"teacher": None}, TypeError, "teacher must be a str, its name, got NoneType"),
        ({"teacher": "x" * 4097}, ValueError, "teacher must have at most 4096 char.*, got 4097"),
        ({"teacher": "\ud800"}, ValueError, "teacher must be text that UTF-8 can hold"),
        ({"resume": 1}, TypeError, "resume must be True or False, got 1"),
        ({"resume": True}, ValueError, "resume needs rows_per_shard"),
        ({"rows_per_shard": 10**30}, ValueError, "rows_per_shard must be in"),
        ({"rows_per_shard": 0}, ValueError, "rows_per_shard must be in .*, got 0"),
        ({"rows_per_shard": 1.5}, TypeError, "rows_per_shard must be an int"),
        ({"batches": 3}, TypeError, "batches must be a TeacherTopK or an iterable.*got int"),
        ({"batches": torch.zeros(2, 3)}, TypeError, "batches must be .*got Tensor"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
    ],
)
def test_arguments_are_checked_before_the_teacher_runs(
    tmp_path, monkeypatch, change, error, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/something").touch()
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)

    def run_teacher():
        pytest.fail("the teacher ran")
        yield

    arguments = {"path": "store", "batches": run_teacher()} | FACTS | change
    with pytest.raises(error, match=message):
        save_teacher_topk(arguments.pop("path"), arguments.pop("batches"), **arguments)
    assert snapshot(tmp_path) == before
