"""Files of a store as they are written: one writer at a time, on the disk before they count, errors that
name the path."""

import json
import math
import os
import resource
import shutil
import signal
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from distill_ops import TeacherTopK, TeacherTopKDataset, rows_written, save_teacher_topk
from tests.support.stored_teachers import (
    FACTS,
    SHARDS,
    TOPK,
    assert_same,
    in_child,
    make_topk,
    rows,
    save,
    snapshot,
    status_of,
)


def hidden(folder):
    return sorted(p.name for p in folder.rglob(".*"))


@pytest.mark.parametrize("facts", [FACTS, SHARDS], ids=["file", "folder"])
def test_one_writer_at_a_time(tmp_path, facts):
    """Of one target: nested, in a thread, in another process; the first is not disturbed."""
    path, found = tmp_path / "store", []

    def second():
        with pytest.raises(BlockingIOError, match="another writer is at work") as caught:
            save_teacher_topk(path, TOPK, **facts)
        found.append(str(caught.value))

    def run_teacher():
        yield rows(0, 10)
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert status_of(in_child(second)) == 0
        save_teacher_topk(tmp_path / "beside", TOPK, **facts)
        yield rows(10)

    save_teacher_topk(path, run_teacher(), **facts)
    assert len(found) == 2
    for message in found:
        assert f"process {os.getpid()} on " in message
        assert str(path) in message
    assert_same(TeacherTopKDataset(path)[:], TOPK)
    assert hidden(tmp_path) == []


def test_a_dead_writer_loses_its_claim_at_once(tmp_path, uninterrupted):
    """Even to a child that it left behind, which has no part in the writing."""
    path, (reading, writing) = tmp_path / "store", os.pipe()

    def run_teacher():
        yield rows(0, 10)
        if os.fork() == 0:
            os.write(writing, str(os.getpid()).encode())
            signal.pause()
        signal.pause()

    writer = in_child(lambda: save(path, run_teacher()))
    orphan = int(os.read(reading, 100))
    with pytest.raises(BlockingIOError, match=f"process {writer} on"):
        save(path, rows(8), resume=True)
    os.kill(writer, signal.SIGKILL)
    assert status_of(writer) == -signal.SIGKILL
    assert hidden(path) == [".writer.lock"]
    try:
        save(path, rows(8), resume=True)
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert snapshot(path) == uninterrupted


def test_leftovers_of_killed_writers_are_nothing(tmp_path, uninterrupted):
    for name in ("folder", "file"):
        target = tmp_path / name

        def run_teacher():
            os.kill(os.getpid(), signal.SIGKILL)
            yield

        facts = SHARDS if name == "folder" else FACTS
        child = in_child(lambda: save_teacher_topk(target, run_teacher(), **facts))  # noqa: B023
        assert status_of(child) == -signal.SIGKILL
        (lock,) = tmp_path.rglob(".*.lock")
        lock.with_suffix(".partial").write_text("half of a file")
        if name == "folder":
            with pytest.raises(ValueError, match="folder is not .* 0 whole rows"):
                TeacherTopKDataset(target)
        assert rows_written(target) == 0
        save_teacher_topk(target, TOPK, **facts)
        assert hidden(tmp_path) == []
    assert snapshot(tmp_path / "folder") == uninterrupted


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_symbolic_links_are_written_through(tmp_path, kind):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk/target", tmp_path / "link"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("older")
    link.symlink_to("disk/target")
    save_teacher_topk(link, TOPK, **(FACTS if kind == "file" else SHARDS))
    assert link.is_symlink()
    assert os.listdir(tmp_path / "disk") == ["target"]
    for path in (link, target):
        assert_same(TeacherTopKDataset(path)[:], TOPK)
        assert rows_written(path) == 23


@pytest.mark.parametrize("facts", [FACTS, SHARDS], ids=["file", "folder"])
def test_long_names(tmp_path, facts):
    path = tmp_path / ("n" * 255)
    save_teacher_topk(path, TOPK, **facts)
    assert_same(TeacherTopKDataset(path)[:], TOPK)
    for call in (
        partial(save_teacher_topk, batches=TOPK, **facts), TeacherTopKDataset, rows_written
    ):  # fmt: skip
        with pytest.raises(OSError, match="too long: .*nnn"):
            call(tmp_path / ("n" * 256))


@pytest.mark.parametrize(("facts", "kept"), [(FACTS, 0), (SHARDS, 40)], ids=["file", "folder"])
def test_a_full_disk(tmp_path, facts, kept):
    """Here a limit on the size of files; what was whole stays."""
    path, facts = tmp_path / "store", facts | ({"rows_per_shard": 20} if kept else {})
    many = make_topk(40)

    def run_teacher():
        if kept:
            yield many
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        yield many

    def write():
        with pytest.raises(OSError, match=f"File too large: '{path}"):
            save_teacher_topk(path, run_teacher(), **facts)

    assert status_of(in_child(write)) == 0
    assert rows_written(path) == kept
    assert len(os.listdir(tmp_path)) == bool(kept)
    assert hidden(tmp_path) == []


def test_what_may_not_be_read_or_written_is_named():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    file, shards, new = folder / "file", folder / "shards", folder / "new"
    save_teacher_topk(file, TOPK, **FACTS)
    save(shards, TOPK)
    (shards / "index.json").unlink()
    shard = shards / "shard-00001.safetensors"
    for path in (file, shard):
        path.chmod(0)
    for path in (folder, shards):
        path.chmod(0o755)

    def as_another():
        if os.getuid() == 0:
            os.setuid(65534)
        for path, call in (
            (file, TeacherTopKDataset),
            (file, rows_written),
            (shard, partial(rows_written, shards)),
            (shard, partial(TeacherTopKDataset, shards)),
            (new, partial(save_teacher_topk, new, TOPK, **FACTS)),
            (new, partial(save, new, TOPK)),
            (shards, partial(save, shards, [], resume=True)),
        ):
            with pytest.raises(PermissionError, match=f"Permission denied: '{path}'"):
                call(path) if call in (TeacherTopKDataset, rows_written) else call()

    if os.getuid() != 0:
        folder.chmod(0o555)
        shards.chmod(0o555)
    try:
        assert status_of(in_child(as_another)) == 0
    finally:
        for path in (folder, shards):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_an_error_between_files_leaves_the_older_file(tmp_path, monkeypatch):
    """Of the disk, when the bytes are there but not safe."""
    save_teacher_topk(tmp_path / "store", TOPK, **FACTS)
    before = snapshot(tmp_path)

    def fails(descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output error: '.*store'"):
            save_teacher_topk(tmp_path / "store", rows(0, 5), **FACTS)
        with pytest.raises(OSError, match="Input/output error: '.*folder'"):
            save(tmp_path / "folder", TOPK)
    assert snapshot(tmp_path) == before


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Bytes, then the name, then the folder's entry, file by file; the index last."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replaced(source, target):
        done.append(("name", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path / "store", rows(0, 6))
    expected = [("sync", tmp_path.name)]
    for name in ("shard-00000.safetensors", "shard-00001.safetensors", "index.json"):
        expected += [("sync", ".writer.partial"), ("name", name), ("sync", "store")]
    assert done == expected


def test_the_lock_says_who(tmp_path):
    def run_teacher():
        found = json.loads((tmp_path / "store/.writer.lock").read_text())
        assert found["process"] == os.getpid()
        assert found["since"].startswith("2")
        yield TOPK

    save(tmp_path / "store", run_teacher())


def test_a_child_of_a_writer_that_unwinds_takes_nothing(tmp_path, uninterrupted):
    """A process forked in the teacher ends with an error: the writer goes on."""
    path = tmp_path / "store"

    def run_teacher():
        yield rows(0, 10)
        if os.fork() == 0:
            raise RuntimeError("in the child")
        os.wait()
        assert hidden(path) == [".writer.lock"]
        yield rows(10)

    def write():
        try:
            save(path, run_teacher())
        except RuntimeError:
            os._exit(0)

    assert status_of(in_child(write)) == 0
    assert snapshot(path) == uninterrupted


def test_rows_written_while_a_writer_is_at_work(tmp_path):
    path, seen = tmp_path / "store", []

    def run_teacher():
        for row in range(23):
            seen.append(rows_written(path))
            yield rows(row, row + 1)

    save(path, run_teacher())
    assert seen == [row // 4 * 4 for row in range(23)]


def test_nothing_is_read_as_a_tensor_s_default(tmp_path):
    """Nor written: a program's default dtype and device are its own."""
    save(tmp_path / "a", TOPK)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            save(tmp_path / "b", TOPK)
    finally:
        torch.set_default_dtype(before)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for facts in (FACTS, SHARDS):
        with pytest.raises(ValueError, match="path must not be a loop of symbolic links"):
            save_teacher_topk(tmp_path / "a", TOPK, **facts)
    assert (tmp_path / "a").is_symlink()


def test_a_shard_that_goes_while_others_are_written(tmp_path):
    def batches():
        yield rows(0, 9)
        (tmp_path / "store" / "shard-00001.safetensors").unlink()
        yield rows(9, 23)

    with pytest.raises(OSError, match="shards came or went .*store"):
        save(tmp_path / "store", batches())
    assert not (tmp_path / "store" / "index.json").exists()


def test_a_forked_child_that_goes_on_is_refused(tmp_path, uninterrupted):
    """Two processes would write the same names."""
    path = tmp_path / "store"
    result = tmp_path / "result"

    def batches():
        yield rows(0, 9)
        if os.fork() == 0:
            yield rows(9, 23)
            os._exit(3)
        os.wait()
        yield rows(9, 23)

    here = os.getpid()
    try:
        save(path, batches())
    except BaseException as error:
        if os.getpid() == here:
            raise
        result.write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    if os.getpid() != here:
        os._exit(4)
    assert snapshot(path) == uninterrupted
    assert "BlockingIOError" in result.read_text()
    assert "forked from the writer" in result.read_text()


@pytest.mark.parametrize("kind", ["meta", "sparse", "nested"])
def test_batches_of_a_wrong_kind(tmp_path, kind):
    change = {
        "meta": lambda x: x.to("meta"),
        "sparse": torch.Tensor.to_sparse,
        "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    }[kind]
    for batch in (
        TOPK._replace(ids=change(TOPK.ids)),
        TOPK._replace(log_probs=change(TOPK.log_probs)),
    ):
        with pytest.raises(TypeError, match=r"(ids|log_probs) of batch 0 (hold|is|must)"):
            save_teacher_topk(tmp_path / "a", batch, **FACTS)


def test_what_is_taken_passes_its_own_verification(tmp_path):
    log_probs = torch.randn(300, 8, dtype=torch.float64).log_softmax(-1)
    log_probs += math.log(1.25) - 1e-12
    log_probs[0, 0] = -1e300
    batch = TeacherTopK(log_probs, torch.arange(8).expand(300, 8))
    save_teacher_topk(tmp_path / "a", batch, **FACTS)
    dataset = TeacherTopKDataset(tmp_path / "a")
    dataset.verify()
    assert dataset[0].log_probs.isfinite().all()
