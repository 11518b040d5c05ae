"""Ranks that are threads of this process, for what runs where processes cost too much: the interpreter.

It is not made for threads, so one computes at a time: a rank holds the lock but in a collective, where it
waits for the others.
"""

import threading
from collections.abc import Callable

import torch

PATIENCE = 60.0  # seconds


class Threads:
    """What the ranks of a group share."""

    def __init__(self, size: int):
        self.size = size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.given: list[torch.Tensor | None] = [None] * size
        self.here = threading.local()

    def resolve(self, *_) -> "ThreadGroup":
        """In the place of ``groups.resolve``: the group as this thread sees it."""
        return ThreadGroup(self, self.here.rank)

    def run(self, function: Callable) -> list:
        """What ``function(rank)`` gives on each rank; raises what one raised."""
        found, errors = [None] * self.size, [None] * self.size

        def rank_of(rank: int) -> None:
            self.here.rank = rank
            with self.turn:
                try:
                    found[rank] = function(rank)
                except BaseException as e:
                    errors[rank] = e
                    self.barrier.abort()

        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raised = [e for e in errors if e is not None]
        for e in raised:  # what broke the barrier, rather than that it broke
            if not isinstance(e, threading.BrokenBarrierError):
                raise e
        if raised:
            raise raised[0]
        return found


class ThreadGroup:
    """A group as one rank sees it; what ``group=`` takes, as a mesh of one dimension."""

    ndim, mesh_dim_names, group_name = 1, None, "threads"

    def __init__(self, threads: Threads, rank: int):
        self.threads, self.rank, self.size = threads, rank, threads.size

    def get_group(self) -> "ThreadGroup":
        return self

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors in rank order, ``[size, *shape]``."""
        threads = self.threads
        threads.given[self.rank] = tensor.clone()
        threads.turn.release()
        try:
            threads.barrier.wait()
            found = torch.stack(threads.given)
            threads.barrier.wait()  # before another collective's tensors
        finally:
            threads.turn.acquire()
        return found

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, over the tensor."""
        return tensor.copy_(self.all_gather(tensor).sum(0))
