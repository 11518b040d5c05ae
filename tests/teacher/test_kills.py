"""Writers that are killed, by ``kill -9``, while bytes are written: what is there is whole, and a resumed
write ends as one that nothing has disturbed."""

import os
import random
import signal
import time
from typing import NamedTuple

import pytest

from distill_ops import TeacherTopK, TeacherTopKDataset, rows_written, save_teacher_topk
from tests.support.stored_teachers import FACTS, in_child, make_topk, snapshot, status_of


class Form(NamedTuple):
    n_rows: int
    rows_per_shard: int | None
    batch: int  # rows
    jitter: float  # seconds that pass at most once bytes are seen: about what a file takes

    def save(self, path, rows, first=0):
        facts = FACTS | {"rows_per_shard": self.rows_per_shard}
        if self.rows_per_shard is not None:
            facts["resume"] = True
        starts = range(first, self.n_rows, self.batch)
        batches = (TeacherTopK(*(x[i : i + self.batch] for x in rows)) for i in starts)
        save_teacher_topk(path, batches, **facts)


FORMS = {
    "many shards": Form(60, 2, 3, 1e-3),
    "large shards": Form(120_000, 15_000, 15_000, 2e-3),
    "one file": Form(60_000, None, 20_000, 1e-3),
}


def files_with_bytes(path):
    """Files and when they were changed, but for the lock, which says who is writing."""
    found = {}
    for folder in (path.parent, path):
        if folder.is_dir():
            for file in os.scandir(folder):
                if file.is_file() and not file.name.endswith(".lock") and file.stat().st_size:
                    found[file.name] = file.stat().st_mtime_ns
    return found


def kill_one(form, path, rows, chance, whole_s):
    """Kill a writer that begins where it must; whether it was at work, and whether it had written."""
    before = files_with_bytes(path)
    first = rows_written(path) if form.rows_per_shard else 0
    child = in_child(lambda: form.save(path, rows, first))
    running = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    if chance.random() < 0.15:  # at any time, of its start too
        time.sleep(chance.uniform(0, whole_s))
    else:
        wanted = chance.randint(1, 4 if form.rows_per_shard else 1)
        while running():
            try:
                if len(files_with_bytes(path).items() - before.items()) >= wanted:
                    break
            except FileNotFoundError:  # renamed just now
                continue
            time.sleep(1e-4)
        time.sleep(chance.uniform(0, form.jitter))
    os.kill(child, signal.SIGKILL)
    status = status_of(child)
    assert status in (0, -signal.SIGKILL)
    return status != 0, bool(files_with_bytes(path).items() - before.items())


@pytest.mark.parametrize(
    ("name", "n_kills"),
    [
        ("many shards", 8),
        ("large shards", 6),
        ("one file", 6),
        *(pytest.param(name, 20, marks=pytest.mark.full) for name in FORMS),
    ],
)
def test_killed_writers(tmp_path, name, n_kills):
    form, chance = FORMS[name], random.Random(name)
    rows = make_topk(form.n_rows)
    start = time.perf_counter()
    form.save(tmp_path / "whole", rows)
    whole_s = time.perf_counter() - start
    expected = content_of(tmp_path / "whole")
    kills = n_with_bytes = n_stores = 0
    while kills < n_kills:
        n_stores += 1
        path, older, n_rows, killed = tmp_path / str(n_stores) / "store", None, 0, True
        path.parent.mkdir()
        if form.rows_per_shard is None:
            save_teacher_topk(path, make_topk(3), **FACTS)
            older = content_of(path)
        while killed and kills < n_kills and n_rows < form.n_rows:
            killed, with_bytes = kill_one(form, path, rows, chance, whole_s)
            kills += killed
            n_with_bytes += killed and with_bytes
            n_rows, last = check_what_is_there(path, expected, older), n_rows
            assert n_rows >= last
        form.save(path, rows, n_rows)
        assert content_of(path) == expected
        assert os.listdir(path.parent) == ["store"]
    assert n_with_bytes >= kills / 2, "most died before they had written anything"


def content_of(path):
    return snapshot(path) if path.is_dir() else path.read_bytes()


def check_what_is_there(path, expected, older):
    """How many rows: what opens is whole, and what has its name has its bytes."""
    if older is not None:
        assert content_of(path) in (older, expected)
        TeacherTopKDataset(path).verify()
        return 0
    n_rows = rows_written(path)
    if not path.exists():
        return n_rows
    found = {name: x for name, x in snapshot(path).items() if not name.name.startswith(".")}
    assert found.items() <= expected.items()
    if "index.json" in map(str, found):
        assert found == expected
        TeacherTopKDataset(path).verify()
    else:
        with pytest.raises(ValueError, match=f"index.json, and {n_rows} whole rows"):
            TeacherTopKDataset(path)
    return n_rows
