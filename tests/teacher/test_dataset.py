"""Reading a stored teacher: indices, workers, and files that are not what they should be."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distill_ops import BlockSampler, TeacherTopK, TeacherTopKDataset, save_teacher_topk
from distill_ops.teacher import dataset as reading
from tests.support.stored_teachers import FACTS, assert_same, make_topk


@pytest.fixture(params=[None, 7], ids=["file", "shards"])
def stored(request, tmp_path):
    topk = make_topk(20)
    save_teacher_topk(tmp_path / "store", topk, rows_per_shard=request.param, **FACTS)
    return tmp_path / "store", topk


@pytest.mark.parametrize(
    "index",
    [
        0, 19, -1, -20, torch.tensor(6), torch.tensor(7, dtype=torch.int32),
        np.int64(5), np.uint64(19), np.int8(-2), torch.tensor(-3, dtype=torch.int8),
        range(3, 17), range(18, 2, -5), range(-4, 2), range(5, 5), np.arange(4, 9), (1, 0),
        slice(None), slice(5, 9), slice(7, 14), slice(6, 15), slice(19, 40), slice(0, 20, 3), slice(-3, None), slice(15, 2, -4), slice(8, 8), slice(9, 3),
        [3, 18, -1, 3], [], torch.tensor([[6, 7], [13, 14]]), torch.tensor([19], dtype=torch.uint8),
    ],
    ids=str,
)  # fmt: skip
def test_indexing(stored, index):
    path, topk = stored
    ours = TeacherTopKDataset(path)[index]
    rows = torch.arange(20)
    if isinstance(index, slice):
        rows = torch.tensor(list(range(20))[index], dtype=torch.int64)
    else:
        plain = index.numpy() if isinstance(index, torch.Tensor) else index
        rows = rows[torch.as_tensor(np.asarray(plain, dtype=np.int64))]
    assert ours.ids.shape == (*rows.shape, 8)
    assert_same(ours, TeacherTopK(topk.log_probs[rows], topk.ids[rows]))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (20, IndexError, "row 20 of a store of 20 rows"),
        (-21, IndexError, "row -21 of"),
        ([0, 25], IndexError, "row 25 of"),
        (range(10, 25), IndexError, "row 24 of"),
        (range(-21, 3), IndexError, "row -21 of"),
        (np.bool_(True), TypeError, "index must be ints.*got torch.bool"),
        (np.float32(1), TypeError, "index must be ints.*got torch.float32"),
        (1.0, TypeError, "index must be ints.*got torch.float32"),
        (True, TypeError, "index must be ints.*got torch.bool"),
        (torch.ones(20, dtype=torch.bool), TypeError, "index must be ints"),
        ("3", TypeError, "index must be ints.*got str"),
        (None, TypeError, "index must be ints.*got NoneType"),
    ],
)
def test_bad_index(stored, index, error, message):
    with pytest.raises(error, match=message):
        TeacherTopKDataset(stored[0])[index]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_data_loader(stored, n_workers):
    """Collated as it comes, and a batch at a time."""
    path, topk = stored
    dataset = TeacherTopKDataset(path)
    assert_same(dataset[3], TeacherTopK(topk.log_probs[3], topk.ids[3]))  # mapped before the fork
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [order[i : i + 6] for i in range(0, 20, 6)]
    options = {"num_workers": n_workers}
    for loader in (
        torch.utils.data.DataLoader(dataset, batch_sampler=batches, **options),
        torch.utils.data.DataLoader(dataset, sampler=batches, batch_size=None, **options),
    ):
        for rows, batch in zip(batches, loader, strict=True):
            assert isinstance(batch, TeacherTopK)
            assert_same(batch, TeacherTopK(topk.log_probs[rows], topk.ids[rows]))


def test_pickles_without_what_it_has_mapped(stored):
    path, topk = stored
    dataset = TeacherTopKDataset(path)
    size = len(pickle.dumps(dataset))
    assert_same(dataset[:], topk)
    assert len(pickle.dumps(dataset)) == size
    assert_same(pickle.loads(pickle.dumps(dataset))[:], topk)


def test_a_relative_path_survives_a_change_of_folder(stored, monkeypatch, tmp_path):
    path, topk = stored
    monkeypatch.chdir(path.parent)
    dataset = pickle.loads(pickle.dumps(TeacherTopKDataset(path.name)))
    monkeypatch.chdir(Path(path.anchor))
    assert_same(dataset[:], topk)


def test_a_file_replaced_meanwhile_is_noticed(stored):
    path, _ = stored
    pickled = pickle.dumps(TeacherTopKDataset(path))
    file = path if path.is_file() else path / "shard-00002.safetensors"
    save_teacher_topk(file, make_topk(20), **FACTS | {"teacher": "another"})
    with pytest.raises(
        ValueError, match=f"{file.name} .*'a teacher' in its place, found 'another'"
    ):
        pickle.loads(pickled)[-1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_rows_stay_on_the_disk(tmp_path):
    log_probs = torch.full((1, 8), -3.0).expand(1_000_000, 8)
    ids = torch.arange(8, dtype=torch.int32).expand(1_000_000, 8)
    save_teacher_topk(tmp_path / "a", [(log_probs, ids)], **FACTS)
    resident = lambda: (
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    )
    del log_probs, ids
    TeacherTopKDataset(tmp_path / "a")[0]  # what the first use imports
    before = resident()
    dataset = TeacherTopKDataset(tmp_path / "a")
    assert dataset[[0, 500_000, -1]].ids.shape == (3, 8)
    assert resident() - before < 0.4 * (tmp_path / "a").stat().st_size


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": 1}, "temperature must be 2.0, which .*store records, got 1.0"),
        ({"vocab_size": 51}, "vocab_size must be 50, which .*store records, got 51"),
        ({"teacher": "other"}, "teacher must be 'a teacher', which .*store records, got 'other'"),
    ],
)
def test_disagreement(stored, asked, message):
    with pytest.raises(ValueError, match=message):
        TeacherTopKDataset(stored[0], **asked)
    TeacherTopKDataset(stored[0], temperature=2, vocab_size=50, teacher="a teacher")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": None}, TypeError, "path must be a str or a path, got NoneType"),
        ({"path": "nowhere"}, FileNotFoundError, "nothing is at .*nowhere"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int"),
        ({"teacher": 3}, TypeError, "teacher must be a str, its name, got int"),
    ],
)
def test_dataset_arguments(stored, arguments, error, message):
    with pytest.raises(error, match=message):
        TeacherTopKDataset(**({"path": stored[0]} | arguments))


def test_truncated_at_any_length(stored):
    path, _ = stored
    file = path if path.is_file() else path / "shard-00001.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=f"{file.name} is not .*expected a complete safetensors"
        ):
            TeacherTopKDataset(path)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"{file.name} is not .*expected a complete safetensors"):
        TeacherTopKDataset(path)


def test_files_that_are_something_else(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model")
    (tmp_path / "text").write_text("not a store, but long enough to hold the length of a header")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("model", "model is not .*expected format 'distill_ops.teacher_topk' .*found None"),
        ("text", "text is not .*expected a complete safetensors file"),
        ("folder", "folder is not .*expected a folder with index.json, which is written last"),
    ]:
        with pytest.raises(ValueError, match=message):
            TeacherTopKDataset(tmp_path / name)


@pytest.mark.parametrize("index", [3, slice(1, 7, 2), [6, -1], torch.tensor([[0], [5]])], ids=str)
def test_defaults_of_the_program_do_not_matter(index, tmp_path):
    save_teacher_topk(tmp_path / "store", make_topk(8), **FACTS)
    dataset = TeacherTopKDataset(tmp_path / "store")
    expected = dataset[index]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = dataset[index]
    finally:
        torch.set_default_dtype(before)
    assert_same(found, expected)


def test_what_is_given_is_the_caller_s(stored):
    """A copy, whichever way it was read: neither the file nor a later read changes with it."""
    path, topk = stored
    dataset = TeacherTopKDataset(path)
    for index in (3, slice(2, 9), [4, 12], torch.tensor(5)):
        for x in dataset[index]:
            x.fill_(7)
    assert_same(dataset[:], topk)
    dataset.verify()


def test_blocks_from_workers_lie_in_shared_memory(tmp_path, monkeypatch):
    """Those that are worth a file of their own."""
    topk = make_topk(64)
    save_teacher_topk(tmp_path / "store", topk, **FACTS)
    dataset = TeacherTopKDataset(tmp_path / "store")
    for bytes_needed, expected in ((1, True), (10**9, False)):
        monkeypatch.setattr(reading, "SHARED_BYTES", bytes_needed)
        assert not dataset[0:32].ids.is_shared()
        loader = torch.utils.data.DataLoader(
            Shared(dataset), sampler=BlockSampler(dataset, 32), batch_size=None, num_workers=1
        )
        assert [*loader] == [expected, expected]


class Shared(torch.utils.data.Dataset):
    """Whether a worker finds what it reads in shared memory."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, block):
        return all(x.is_shared() for x in self.dataset[block])
