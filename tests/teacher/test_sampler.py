"""Blocks of rows: every row once, in an order that epochs and replicas agree on; and how fast they are."""

import time
import warnings

import pytest
import torch

from distill_ops import BlockSampler, TeacherTopK, TeacherTopKDataset, save_teacher_topk
from tests.support.stored_teachers import FACTS, assert_same, make_topk

ROWS = range(23)  # whatever has a length


def rows_of(blocks):
    return [row for block in blocks for row in ROWS[block]]


@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_every_row_once(rows):
    sampler = BlockSampler(ROWS, rows)
    blocks = [*sampler]
    assert len(blocks) == len(sampler) == -(-23 // rows)
    assert all(block.start % rows == 0 and block.stop <= 23 for block in blocks)
    assert sorted(rows_of(blocks)) == [*ROWS]
    in_order = BlockSampler(ROWS, rows, shuffle=False)
    assert rows_of(in_order) == [*ROWS]
    whole = BlockSampler(ROWS, rows, drop_last=True)
    assert len(whole) == len([*whole]) == 23 // rows
    assert {block.stop - block.start for block in whole} <= {rows}


def test_orders():
    """Of a seed and an epoch; not of the program's generator, which is left alone."""
    state = torch.get_rng_state()
    sampler = BlockSampler(ROWS, 2)
    first = [*sampler]
    assert [*sampler] == first == [*BlockSampler(ROWS, 2)]
    assert first != [*BlockSampler(ROWS, 2, shuffle=False)]
    assert first != [*BlockSampler(ROWS, 2, seed=1)]
    sampler.set_epoch(1)
    assert [*sampler] != first
    assert sorted(rows_of(sampler)) == [*ROWS]
    sampler.set_epoch(0)
    assert [*sampler] == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rows", "num_replicas"), [(5, 2), (2, 5), (23, 3), (2, 1)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_replicas(rows, num_replicas, drop_last, shuffle):
    """As many blocks in each; together every block, and as in a DistributedSampler over blocks."""
    options = {"drop_last": drop_last, "shuffle": shuffle}
    samplers = [
        BlockSampler(ROWS, rows, rank=rank, num_replicas=num_replicas, **options)
        for rank in range(num_replicas)
    ]
    blocks = [[*sampler] for sampler in samplers]
    assert {len(x) for x in blocks} == {len(sampler) for sampler in samplers} == {len(blocks[0])}
    n_blocks = 23 // rows if drop_last else -(-23 // rows)
    whole = [*BlockSampler(ROWS, rows, **options)]
    for rank, found in enumerate(blocks):
        theirs = torch.utils.data.DistributedSampler(
            range(n_blocks), num_replicas, rank, shuffle=False, drop_last=drop_last
        )
        # its own count is too small where there are fewer blocks than replicas
        expected = [whole[i] for i in theirs] if n_blocks >= num_replicas or not drop_last else []
        assert found == expected


def test_an_empty_store_has_no_block():
    assert [*BlockSampler([])] == []
    assert len(BlockSampler([], num_replicas=2, rank=1)) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": 3}, TypeError, "dataset must have a length, got int"),
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"rows": 2.0}, TypeError, "rows must be an int"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False, got 1"),
        ({"drop_last": None}, TypeError, "drop_last must be True or False, got None"),
        ({"seed": -1}, ValueError, "seed must be in .*, got -1"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be at least 1"),
        ({"rank": 2, "num_replicas": 2}, ValueError, r"rank must be in \[0, 1\], got 2"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BlockSampler(**({"dataset": ROWS} | arguments))
    with pytest.raises(TypeError, match="epoch must be an int"):
        BlockSampler(ROWS).set_epoch(0.5)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_data_loader(tmp_path, n_workers):
    topk = make_topk(50)
    save_teacher_topk(tmp_path / "store", topk, rows_per_shard=8, **FACTS)
    dataset = TeacherTopKDataset(tmp_path / "store")
    sampler = BlockSampler(dataset, 12)
    loader = torch.utils.data.DataLoader(
        dataset, sampler=sampler, batch_size=None, num_workers=n_workers
    )
    assert len(loader) == 5
    for block, batch in zip(sampler, loader, strict=True):
        assert isinstance(batch, TeacherTopK)
        assert_same(batch, TeacherTopK(*(x[block] for x in topk)))


def store_of(path, n_rows):
    """Of 64 tokens a row, in shards of 20,000 rows."""
    batch = make_topk(10_000, k=48)
    rest = torch.full((10_000, 16), -40.0), torch.arange(50, 66).expand(10_000, 16)
    batch = TeacherTopK(*(torch.cat(pair, -1) for pair in zip(batch, rest, strict=True)))
    facts = FACTS | {"vocab_size": 100, "rows_per_shard": 20_000}
    save_teacher_topk(path, (batch for _ in range(n_rows // 10_000)), **facts)
    return TeacherTopKDataset(path)


def rows_a_second(read, n_rows, clock=time.perf_counter):
    start = clock()
    read()
    return n_rows / (clock() - start)


def test_single_rows_are_fast(tmp_path):
    dataset = store_of(tmp_path / "store", 20_000)
    order = torch.randperm(len(dataset)).tolist()[:2000]
    read = lambda: [dataset[row] for row in order]
    # of this process's own time: others may have the core meanwhile
    assert max(rows_a_second(read, 2000, time.process_time) for _ in range(5)) >= 20_000


@pytest.mark.full  # the cores are needed for it
def test_a_loader_of_blocks_is_half_as_fast_as_one_read(tmp_path):
    """With four workers, of a store of 200 MB; their start is not counted."""
    dataset = store_of(tmp_path / "store", 520_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more workers than cores
        loader = torch.utils.data.DataLoader(
            dataset, sampler=BlockSampler(dataset), batch_size=None, num_workers=4,
            persistent_workers=True,
        )  # fmt: skip
        by_blocks = lambda: sum(len(ids) for _, ids in loader)
        assert by_blocks() == len(dataset)
        ratios = []
        for _ in range(6):
            whole = max(rows_a_second(lambda: dataset[:], len(dataset)) for _ in range(2))
            ratios.append(rows_a_second(by_blocks, len(dataset)) / whole)
    assert max(ratios) >= 0.5, ratios
