"""Writing files so that what is there is whole: one writer a target, and bytes before names."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

_held: set[int] = set()  # descriptors of the locks of this process


def _forget_locks() -> None:
    """In a forked child, which would keep its parent's claims after the parent's death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name this path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


class Writing(NamedTuple):
    """The hidden files of whoever writes a target: names of one length, the same for every writer,
    so that the next one finds what a killed one left."""

    target: Path
    lock: Path
    temporary: Path

    @classmethod
    def into(cls, folder: Path) -> "Writing":
        return cls(folder, folder / ".writer.lock", folder / ".writer.partial")

    @classmethod
    def beside(cls, file: Path) -> "Writing":
        stem = "." + sha256(os.fsencode(file.name)).hexdigest()[:16]
        return cls(file, file.with_name(f"{stem}.lock"), file.with_name(f"{stem}.partial"))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The target is this writer's alone meanwhile.

        Raises:
            BlockingIOError: another one is at work, in this process or elsewhere.
        """
        with naming(self.target):
            lock = self._lock()
        _held.add(lock)
        try:
            with naming(self.target):
                self.temporary.unlink(missing_ok=True)  # a killed writer's
                os.ftruncate(lock, 0)
                os.write(lock, json.dumps(_this_process()).encode())
            yield
        finally:
            if lock in _held:  # not so in a forked child
                _held.discard(lock)
                try:
                    with naming(self.target):
                        self.lock.unlink(missing_ok=True)
                finally:
                    os.close(lock)

    def _lock(self) -> int:
        """The descriptor of the lock file, locked: the kernel frees it when its process dies."""
        try:
            from fcntl import LOCK_EX, LOCK_NB, flock
        except ImportError as error:
            raise OSError(
                errno.ENOTSUP, "writing a store needs flock, not on this system"
            ) from error
        while True:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                flock(descriptor, LOCK_EX | LOCK_NB)
                if self._is_at_its_path(descriptor):
                    return descriptor
            except BlockingIOError as error:
                message = f"another writer is at work ({_holder(descriptor)})"
                os.close(descriptor)
                raise OSError(errno.EAGAIN, message) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # of a writer that ended, and took its lock away, in between

    def _is_at_its_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.lock), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def write(self, file: Path, content: bytes) -> None:
        """The file takes its name, over an older one, when its bytes are on the disk.

        Raises:
            BlockingIOError: in a process that was forked from the writer's, which goes on.
        """
        with naming(file):
            if not _held:
                raise OSError(
                    errno.EAGAIN, "this process was forked from the writer, which goes on"
                )
            try:
                with self.temporary.open("wb") as written:
                    written.write(content)
                    written.flush()
                    os.fsync(written.fileno())
                os.replace(self.temporary, file)
                sync_folder(file.parent)
            except BaseException:
                self.temporary.unlink(missing_ok=True)
                raise


def sync_folder(folder: Path) -> None:
    """The names in it, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _this_process() -> dict[str, int | str]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": now}


def _holder(lock: int) -> str:
    """Who says to have locked; just then the words may not be there yet."""
    try:
        found = json.loads(os.pread(lock, 1024, 0))
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "it does not say which"
