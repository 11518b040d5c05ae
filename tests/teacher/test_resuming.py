"""A write that was interrupted or failed resumes: finished shards stay, and the bytes are the same."""

import os
import shutil
from functools import partial

import pytest

from distill_ops import TeacherTopKDataset, rows_written, save_teacher_topk
from tests.support.stored_teachers import (
    FACTS,
    TOPK,
    assert_same,
    make_topk,
    rows,
    save,
    snapshot,
)


def breaks_at(row, start=0):
    """Batches of 3 rows, and an error of the teacher."""
    while start + 3 <= row:
        yield rows(start, start + 3)
        start += 3
    yield rows(start, row)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("stops", [[0], [3], [4], [11, 15], [8, 8, 22], [23]], ids=str)
def test_an_interrupted_write_resumes(tmp_path, uninterrupted, stops):
    """To the bytes of one that was not; the batches need not be the same."""
    path = tmp_path / "store"
    for stop in stops:
        first = rows_written(path)
        with pytest.raises(RuntimeError, match="out of memory"):
            save(path, breaks_at(stop, first), resume=True)
        assert rows_written(path) == stop // 4 * 4
        assert sorted(os.listdir(tmp_path)) == (["store"] if stop >= 4 else [])
        if stop >= 4:
            assert len(os.listdir(path)) == stop // 4
            message = rf"store is not .*no index.json, and {stop // 4 * 4} whole rows, which resume"
            with pytest.raises(ValueError, match=message):
                TeacherTopKDataset(path)
    save(path, rows(rows_written(path)), resume=True)
    assert snapshot(path) == uninterrupted
    assert rows_written(path) == 23
    assert_same(TeacherTopKDataset(path)[:], TOPK)


def test_a_last_shard_without_an_index_is_written_again(tmp_path, uninterrupted):
    path = tmp_path / "store"
    save(path, TOPK)
    (path / "index.json").unlink()
    assert rows_written(path) == 20
    save(path, rows(20), resume=True)
    assert snapshot(path) == uninterrupted
    (path / "index.json").unlink()
    save(path, [], resume=True)  # the teacher has no more
    assert len(TeacherTopKDataset(path)) == 20
    assert len(os.listdir(path)) == 6


def test_a_whole_store_resumes_with_nothing(tmp_path, uninterrupted):
    path = tmp_path / "store"
    save(path, TOPK)
    for batches in ([], rows(23)):
        save(path, batches, resume=True)
    with pytest.raises(ValueError, match="batches must hold no more rows, .*store is whole: 23"):
        save(path, rows(22), resume=True)
    with pytest.raises(ValueError, match="teacher must be 'a teacher', which .*store records"):
        save(path, [], resume=True, teacher="another")
    with pytest.raises(ValueError, match="path must be a new or empty folder.*store$"):
        save(path, TOPK)
    assert snapshot(path) == uninterrupted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 51}, "vocab_size must be 50, which .*store records, got 51"),
        ({"temperature": 1.0}, "temperature must be 2.0, which .*store records, got 1.0"),
        ({"teacher": "b"}, "teacher must be 'a teacher', which .*store records, got 'b'"),
        ({"rows_per_shard": 5}, "rows_per_shard must be 4, which .*store records, got 5"),
        ({"batches": make_topk(4, k=3)}, "batch 0 must have k=8 slots a row as before, got 3"),
        ({"resume": False}, "path must be a new or empty .*; resume=True completes the store"),
    ],
)
def test_only_the_same_store_resumes(tmp_path, change, message):
    path = tmp_path / "store"
    with pytest.raises(RuntimeError):
        save(path, breaks_at(10))
    before = snapshot(path)
    arguments = {"batches": rows(8), "resume": True} | change
    with pytest.raises(ValueError, match=message):
        save(path, arguments.pop("batches"), **arguments)
    assert snapshot(path) == before


def test_a_short_last_shard_tells_its_settings(tmp_path):
    """All that a store of few rows has: killed before its index."""
    path = tmp_path / "store"
    save_teacher_topk(path, TOPK, rows_per_shard=100, **FACTS)
    (path / "index.json").unlink()
    assert rows_written(path) == 0
    before = snapshot(path)
    with pytest.raises(ValueError, match="teacher must be 'a teacher', which .* got 'another'"):
        save_teacher_topk(
            path, TOPK, rows_per_shard=100, resume=True, **{**FACTS, "teacher": "another"}
        )
    with pytest.raises(ValueError, match="rows_per_shard must be 100, which .* got 50"):
        save_teacher_topk(path, TOPK, rows_per_shard=50, resume=True, **FACTS)
    assert snapshot(path) == before
    save_teacher_topk(path, TOPK, rows_per_shard=100, resume=True, **FACTS)
    assert rows_written(path) == 23


def test_shards_that_do_not_belong_together_do_not_resume(tmp_path):
    path, other = tmp_path / "store", tmp_path / "other"
    for folder, facts in ((path, {}), (other, {"teacher": "b"})):
        with pytest.raises(RuntimeError):
            save(folder, breaks_at(12), **facts)
    name = "shard-00001.safetensors"
    own = (path / name).read_bytes()
    for spoil, message in (
        (lambda: shutil.copy(other / name, path), f"{name} .*teacher 'a teacher' in its place"),
        (lambda: (path / name).unlink(), f"{name} is not .*no file"),
        (lambda: (path / name).write_bytes(own[:-1]), f"{name} is not .*complete"),
    ):
        spoil()
        for asked in (rows_written, partial(save, batches=[], resume=True), TeacherTopKDataset):
            with pytest.raises(ValueError, match=message):
                asked(path)
        (path / name).write_bytes(own)
    (path / "notes.txt").touch()  # whose they are is not the store's to know
    save(path, rows(12), resume=True)
    assert len(TeacherTopKDataset(path)) == 23
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").touch()
    with pytest.raises(ValueError, match="path must be a new or empty folder"):
        save(tmp_path / "notes", TOPK, resume=True)


def test_rows_written_of_what_is_there(tmp_path):
    assert rows_written(tmp_path / "nothing") == 0
    assert rows_written(str(tmp_path)) == 0
    save_teacher_topk(tmp_path / "file", TOPK, **FACTS)
    assert rows_written(tmp_path / "file") == 23
    (tmp_path / "text").write_text("something else")
    with pytest.raises(ValueError, match="text is not a teacher top-k store"):
        rows_written(tmp_path / "text")
    with pytest.raises(TypeError, match="path must be a str or a path, got int"):
        rows_written(3)
