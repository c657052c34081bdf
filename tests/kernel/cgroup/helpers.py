"""Processes under test: forked, moved into a cgroup, ended for certain."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rcon_plugins.kernel.cgroup import Cgroup

MIB = 1 << 20
#: Where files for IO tests go: on a block device.
DISK = Path(os.environ.get("RCON_TEST_DISK", "/var/tmp"))


class Running:
    """A forked child that entered a cgroup and then calls a function."""

    def __init__(self, cgroup: Cgroup | None, function: Callable[..., Any], *arguments: Any) -> None:
        self._pipe, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._pipe)
                if cgroup is not None:
                    cgroup.enter_process()
                os.write(writing, b"\n")
                data = pickle.dumps(function(*arguments))
                os.write(writing, data)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        self.status: int | None = None
        if os.read(self._pipe, 1) != b"\n":
            self.wait()
            raise RuntimeError("the child could not enter the cgroup; it said why on stderr")

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def result(self) -> Any:
        """What the function returned."""
        data = b""
        while chunk := os.read(self._pipe, 65536):
            data += chunk
        assert self.wait() == 0, f"the child ended with {self.status}"
        return pickle.loads(data)

    def end_by_signal(self) -> None:
        """Kill it, and wait for its end; it is still to be closed."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def end(self) -> None:
        """Kill it, if it is still there."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._pipe)


@contextlib.contextmanager
def running(cgroup: Cgroup | None, function: Callable[..., Any], *arguments: Any) -> Iterator[Running]:
    child = Running(cgroup, function, *arguments)
    try:
        yield child
    finally:
        child.end()


def settings_of(cgroup: Cgroup, name: str) -> str:
    """A file of the cgroup, in whichever of its directories it is, read without the code under test."""
    found = [Path(directory, name) for directory in cgroup.directories if Path(directory, name).exists()]
    assert len(found) == 1, f"{name} in {found}"
    return found[0].read_text().strip()


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def sleep_forever() -> None:
    while True:
        signal.pause()


def touch(size: int) -> int:
    """Have ``size`` bytes of memory for a moment."""
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
    return size


def write_directly(path: str, size: int, block: int = 256 * 1024) -> float:
    """Write ``size`` bytes past the page cache; seconds it took."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, block) as data:
        data.write(os.urandom(block))
        # Allocate first, so that only the writing is measured.
        os.posix_fallocate(fd, 0, size)
        os.fsync(fd)
        begin = time.monotonic()
        for at in range(0, size, block):
            os.pwrite(fd, data, at)
        seconds = time.monotonic() - begin
    os.close(fd)
    return seconds


def layout() -> str:
    mounted = {line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
    return "hybrid" if {"cgroup", "cgroup2"} <= mounted else "v2" if "cgroup2" in mounted else "v1"
