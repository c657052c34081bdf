"""How much work of one confinement may be under way at once, in all workers of a server together.

A slot is one byte of a file that all workers share, locked (fcntl(2), POSIX record locks) while a work is under
way. The kernel releases the locks of a process that ends, however it ends, so no slot is ever lost. Offsets reach
2**63 without the file having any size, so each confinement takes its bytes where the hash of its name says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator

#: The most slots of one confinement.
MOST = 1 << 16


class Slots:
    """The slots of every confinement, seen from one process; ``file`` is `Instance.locks`. Thread-safe.

    POSIX locks belong to the process: threads of one process are told apart here, processes by the kernel. No
    other descriptor of the same file may be closed in this process, for that would release its locks.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._held: set[int] = set()
        self._lock = threading.Lock()

    def take(self, first: int, limit: int) -> int | None:
        """A free slot among the ``limit`` that begin at ``first`` (see `first_slot`); None when all are taken."""
        with self._lock:
            for slot in range(first, first + limit):
                if slot in self._held:
                    continue
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot, os.SEEK_SET)
                except (BlockingIOError, PermissionError):
                    continue  # EAGAIN or EACCES: another process holds it
                self._held.add(slot)
                return slot
        return None

    def release(self, slot: int) -> None:
        """Give a slot back."""
        with self._lock:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, slot, os.SEEK_SET)
            self._held.discard(slot)


@contextlib.contextmanager
def entering(file: int, name: str) -> Iterator[None]:
    """Be the only process of the server that enters the confinement ``name``; waits for its turn."""
    turn = first_slot(name) + MOST
    fcntl.lockf(file, fcntl.LOCK_EX, 1, turn, os.SEEK_SET)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, turn, os.SEEK_SET)


def first_slot(name: str) -> int:
    """Where the slots of the confinement ``name`` begin: the same in every process."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 18 << 17
