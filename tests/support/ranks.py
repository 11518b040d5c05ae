"""Four processes that wait for work, each a rank of groups of two, three and four: started once a session.

A test sends them a function of a module and its arguments, which every rank of one group calls, and gets
what each returned. They are forked from a process that has imported torch once. Where a rank raises, the
others may wait for it in a collective: its traceback comes back at once, and the next call starts anew.
"""

import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WORLD = 4
MEMBERS = {2: (1, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}  # a rank of the world is not one of its group
PATIENCE = 60  # seconds until processes that wait for each other are ended
GRACE = 1.0  # ... once one of them has failed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.vocab_parallel.work"])


class Member(NamedTuple):
    """One rank of a group, as it knows itself."""

    rank: int
    size: int
    group: dist.ProcessGroup


class RankError(Exception):
    """Ranks raised, or did not answer: the text has their tracebacks."""


class Ranks:
    """The processes, started by the first call."""

    def __init__(self):
        self.processes: list = []
        self.connections: list[Connection] = []

    def call(self, size: int, function: Callable, *arguments, patience: float = PATIENCE) -> list:
        """What ``function(member, *arguments)`` returned on each rank of the group of that size.

        The function is one of a module, and it, its arguments and its results can be pickled."""
        if not self.processes:
            self._start()
        request = pickle.dumps((size, function, arguments))
        pending = {}
        for rank in MEMBERS[size]:
            self.connections[rank].send_bytes(request)
            pending[self.connections[rank]] = rank
        replies, failed = {}, {}
        end = time.monotonic() + patience
        while pending and time.monotonic() < end:
            for connection in wait(pending, max(end - time.monotonic(), 0)):
                rank = pending.pop(connection)
                try:
                    good, found = pickle.loads(connection.recv_bytes())
                except EOFError:
                    good, found = False, "its process ended\n"
                (replies if good else failed)[rank] = found
                if failed:
                    end = min(end, time.monotonic() + GRACE)
        if failed or pending:
            if pending or any("process ended" in text for text in failed.values()):
                self.close(patience=0)
            lost = dict.fromkeys(pending.values(), f"no answer within {patience} s\n")
            texts = failed or lost
            raise RankError("\n".join(f"rank {rank}: {texts[rank]}" for rank in sorted(texts)))
        return [replies[rank] for rank in MEMBERS[size]]

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(WORLD):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=serve, args=(rank, self.folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def close(self, patience: float = 5.0) -> None:
        """End the processes, by force those that have not ended in time; the next call starts others."""
        for connection in self.connections:
            connection.close()  # which they wait for
        end = time.monotonic() + patience
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.connections = [], []


def serve(rank: int, folder: str, connection: Connection) -> None:
    """What each process does: join the groups, then answer calls until there is nobody to make one."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # not the address that the machine's name happens to resolve to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )  # fmt: skip
    members = {}
    for size, ranks in MEMBERS.items():
        group = dist.new_group(ranks)  # which every process of the world takes part in
        if rank in ranks:
            members[size] = Member(ranks.index(rank), size, group)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            dist.destroy_process_group()
            return
        connection.send_bytes(pickle.dumps(answer(members, request)))


def answer(members: dict[int, Member], request: bytes) -> tuple[bool, Any]:
    """Whether the function returned, and what; else the traceback."""
    try:
        size, function, arguments = pickle.loads(request)
        return True, function(members[size], *arguments)
    except Exception:  # of which the end says enough
        return False, traceback.format_exc(limit=-3)
