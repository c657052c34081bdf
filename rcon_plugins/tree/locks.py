"""Share a limited number of units among processes, with byte-range locks on a shared file.

Each byte stands for one unit (a slot, a mebibyte). The process that holds the unit locks its byte (fcntl(2), POSIX
record locks). The kernel releases the locks of a process however it ends, so no unit is ever lost. The file itself
stays empty: offsets reach 2**63 whatever its size.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator

#: The most slots of one confinement.
MAX_SLOTS = 1 << 16
#: The byte that a process locks while it searches for several free bytes. It is far beyond all bytes that count.
_SEARCH = 1 << 61
#: How long to wait for that byte, seconds. Who holds it only asks for a few locks.
_SEARCH_SECONDS = 0.25
#: struct flock, native: type, whence, start, length, pid.
_FLOCK = "hhqqi"


class Allocation:
    """Bytes that this process holds, as ranges: the first byte, and the byte after the last."""

    __slots__ = ("ranges",)

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.ranges = list(ranges)


class ByteLocks:
    """The locks of one process on one shared file. Thread-safe; a fork starts with none.

    POSIX locks belong to the process: the kernel keeps processes apart, and this class keeps the threads of a process
    apart. So use one `ByteLocks` for each file in a process. Close no descriptor of that file: that would release all
    locks of the process on it.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self._lock = threading.Lock()
        #: The byte after the last of each held range, by its first byte.
        self._held: dict[int, int] = {}
        #: Held ranges, by their first byte, that are free but could not be unlocked yet.
        self._stuck: set[int] = set()
        _LOCKS.add(self)

    def forget(self) -> None:
        """Forget the parent's ranges, in a new child. Replace the lock: a thread of the parent may have held it."""
        self._lock = threading.Lock()
        self._held = {}
        self._stuck = set()

    def reserve_one(self, start: int, stop: int) -> Allocation | None:
        """Reserve the first free byte from ``start`` up to ``stop``. Return None if all are held."""
        with self._lock:
            self._unlock_stuck()
            for byte in range(start, stop):
                if byte in self._held:
                    continue
                try:
                    self._set(fcntl.LOCK_EX | fcntl.LOCK_NB, byte, byte + 1)
                except (BlockingIOError, PermissionError):
                    continue  # EAGAIN or EACCES: another process holds it
                self._held[byte] = byte + 1
                return Allocation((byte, byte + 1))
        return None

    def reserve(self, count: int, stop: int) -> Allocation | None:
        """Reserve ``count`` of the first ``stop`` bytes, in any ranges. Return None if fewer are free.

        Also if another process searches all the time: whoever can open the file can hold any lock on it for ever.
        """
        found = Allocation()
        with self._lock, self._searching() as alone:
            self._unlock_stuck()
            if not alone:
                return None
            free = []
            for start, end in self._free(stop):
                end = min(end, start + count)
                free.append((start, end))
                count -= end - start
                if not count:
                    break
            else:
                return None
            try:
                for start, end in free:
                    found.ranges.append((start, end))  # first, so that an exception at any point releases it
                    self._held[start] = end
                    self._set(fcntl.LOCK_EX | fcntl.LOCK_NB, start, end)
            except BaseException as error:
                self._release(found)
                if isinstance(error, (BlockingIOError, PermissionError)):
                    return None  # locked by a process that did not wait for the search byte
                raise
        return found

    def release(self, allocation: Allocation) -> None:
        """Release an allocation. Does nothing if it was released before, or in a fork of the process that made it."""
        with self._lock:
            self._release(allocation)

    def _release(self, allocation: Allocation) -> None:
        while allocation.ranges:
            start, _ = allocation.ranges.pop()
            if start in self._held:
                self._stuck.add(start)
        self._unlock_stuck()

    def _unlock_stuck(self) -> None:
        """Unlock what was released. What the kernel refuses (ENOLCK, ENOMEM) stays, and is tried again by each call."""
        for start in list(self._stuck):
            try:
                self._set(fcntl.LOCK_UN, start, self._held[start])
            except OSError:
                continue
            self._stuck.discard(start)
            del self._held[start]

    def _set(self, kind: int, start: int, end: int) -> None:
        fcntl.lockf(self.file, kind, end - start, start, os.SEEK_SET)

    @contextlib.contextmanager
    def _searching(self) -> Iterator[bool]:
        """Keep other processes from searching in the block. Yield False if another one does, and does not end it."""
        until = time.monotonic() + _SEARCH_SECONDS
        while not self._try_search():
            if time.monotonic() > until:
                yield False
                return
            time.sleep(0.001)
        try:
            yield True
        finally:
            self._set(fcntl.LOCK_UN, _SEARCH, _SEARCH + 1)

    def _try_search(self) -> bool:
        try:
            self._set(fcntl.LOCK_EX | fcntl.LOCK_NB, _SEARCH, _SEARCH + 1)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _free(self, stop: int) -> list[tuple[int, int]]:
        """Return the free ranges below ``stop``, in order. Asks the kernel once for each lock on the file."""
        to_ask, begin = [], 0
        for start, end in [*sorted(self._held.items()), (stop, stop)]:
            if begin < min(start, stop):
                to_ask.append((begin, min(start, stop)))
            begin = max(begin, end)
        free = []
        while to_ask:
            begin, bound = to_ask.pop()
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, bound - begin, 0)
            kind, _, start, length, _ = struct.unpack(_FLOCK, fcntl.fcntl(self.file, fcntl.F_GETLK, question))
            if kind == fcntl.F_UNLCK:
                free.append((begin, bound))
                continue
            end = start + length if length else bound
            to_ask += [(a, b) for a, b in ((begin, start), (end, bound)) if a < b]
        return sorted(free)


_LOCKS: weakref.WeakSet[ByteLocks] = weakref.WeakSet()


def _forget_all() -> None:
    for locks in _LOCKS:
        locks.forget()


os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def entering(file: int, name: str) -> Iterator[None]:
    """Let only one process of the server at a time enter the confinement ``name``. Waits for the others."""
    byte = first_slot(name) + MAX_SLOTS
    fcntl.lockf(file, fcntl.LOCK_EX, 1, byte, os.SEEK_SET)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, byte, os.SEEK_SET)


def first_slot(name: str) -> int:
    """Return the byte at which the slots of the confinement ``name`` begin. It is the same in every process."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 18 << 17
