"""The order in which a ``DataLoader`` reads a store: blocks of neighbouring rows, shuffled."""

from collections.abc import Iterator, Sized

import torch

from ..scalars import flag, integer

# four workers on two cores with k = 64, their start not counted, reach this of the speed of dataset[:]:
# 0.59 in blocks of 4096 rows, 0.84 of 8192, 0.97 of 16384 (12 MiB), as each costs a message
BLOCK_ROWS = 16384
LARGEST_SEED = 2**62


class BlockSampler(torch.utils.data.Sampler):
    """Blocks of neighbouring rows, as slices, in an order that is shuffled by block.

    ``dataset[block]`` is one contiguous read, where rows that are drawn one by one are as many reads.
    A dataset goes in; slices of ``rows`` rows come out, for ``DataLoader(..., batch_size=None)``.

    Example:
        >>> import tempfile, torch, distill_ops
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = folder.name + "/teacher.safetensors"
        >>> distill_ops.save_teacher_topk(
        ...     path, distill_ops.teacher_topk(torch.randn(10, 100), 8),
        ...     vocab_size=100, temperature=1.0, teacher="a-teacher",
        ... )
        >>> dataset = distill_ops.TeacherTopKDataset(path)
        >>> sampler = distill_ops.BlockSampler(dataset, rows=4)
        >>> loader = torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     print(len(loader), sum(len(ids) for log_probs, ids in loader))
        3 10
        3 10

    Args:
        dataset: a :class:`TeacherTopKDataset`, or whatever has a length.
        rows: of a block; the last one is shorter. A multiple of the sequences' length keeps them whole.
        shuffle: by block, another order in each epoch; rows within a block stay in their order.
        drop_last: leave out a shorter last block, and blocks that not every replica can have one of;
            else replicas without a last block take one from the beginning again.
        seed: of the order, the same in all replicas.
        rank, num_replicas: read every ``num_replicas``-th block, from the ``rank``-th.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    def __init__(
        self,
        dataset: Sized,
        rows: int = BLOCK_ROWS,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
    ):
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset must have a length, got {type(dataset).__name__}")
        self.rows = integer("rows", rows, 1)
        self.seed = integer("seed", seed, 0, LARGEST_SEED)
        self.num_replicas = integer("num_replicas", num_replicas, 1)
        self.rank = integer("rank", rank, 0, self.num_replicas - 1)
        self.dataset = dataset
        self.shuffle, self.drop_last = flag("shuffle", shuffle), flag("drop_last", drop_last)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the blocks: the same in all replicas, before each epoch."""
        self.epoch = integer("epoch", epoch, 0, LARGEST_SEED)

    def _n_blocks(self) -> int:
        n_rows = len(self.dataset)
        return n_rows // self.rows if self.drop_last else -(-n_rows // self.rows)

    def __len__(self) -> int:
        """Blocks of this replica, as many as of every other."""
        n_blocks = self._n_blocks()
        return (
            n_blocks // self.num_replicas if self.drop_last else -(-n_blocks // self.num_replicas)
        )

    def __iter__(self) -> Iterator[slice]:
        n_blocks, n_rows = self._n_blocks(), len(self.dataset)
        order = torch.arange(n_blocks, device="cpu")
        if self.shuffle:
            generator = torch.Generator("cpu").manual_seed(self.seed + self.epoch)
            order = torch.randperm(n_blocks, generator=generator, device="cpu")
        for i in range(len(self)):
            start = order[(self.rank + i * self.num_replicas) % n_blocks].item() * self.rows
            yield slice(start, min(start + self.rows, n_rows))
