"""Units that processes share by record locks: a failed call gives none away and takes none for ever."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator

import pytest

from rcon_plugins.tree.locks import ByteLocks
from tests.children import in_child


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("rcon-test-locks")
    yield descriptor
    os.close(descriptor)


def free_for_others(file: int, stop: int) -> int:
    """How many of the first bytes another process can lock."""

    def other() -> int:
        locks = ByteLocks(file)
        return sum(locks.reserve_one(byte, byte + 1) is not None for byte in range(stop))

    return in_child(other)


def test_what_cannot_be_unlocked_is_unlocked_by_the_next_call(file: int) -> None:
    locks = ByteLocks(file)
    slots = [locks.reserve_one(0, 3) for _ in range(3)]
    assert free_for_others(file, 3) == 0
    locks.file = 10**6  # no such descriptor: each call fails with EBADF
    for slot in slots:
        assert slot is not None
        locks.release(slot)
    locks.file = file
    assert free_for_others(file, 3) == 0
    again = locks.reserve_one(0, 3)
    assert again is not None
    assert free_for_others(file, 3) == 2
    locks.release(again)
    assert free_for_others(file, 3) == 3


def test_a_release_in_a_fork_releases_nothing(file: int) -> None:
    locks = ByteLocks(file)
    slot = locks.reserve_one(0, 1)
    assert slot is not None
    in_child(lambda: locks.release(slot))
    assert free_for_others(file, 1) == 0


def test_a_process_that_holds_all_locks_does_not_stop_the_others(file: int) -> None:
    """Code with the server's user can open the ledger of the budget to read, and lock it."""
    locked, holding = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
        fcntl.lockf(own, fcntl.LOCK_SH, 0, 1)
        os.write(holding, b"x")
        signal.pause()
        os._exit(0)
    try:
        os.read(locked, 1)
        locks, began = ByteLocks(file), time.monotonic()
        assert locks.reserve(1, 10) is None
        assert time.monotonic() - began < 5
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(locked)
        os.close(holding)
    assert locks.reserve(10, 10) is not None
