"""Measure the time from an event in a cgroup to the callback of a program.

A process in the cgroup notes the time before each step. When the callback runs, the last time noted is that of the step
that caused the event. So the result includes the kernel's own part: reclaim, choosing the victim, the kill. To show how
large that part is, the same is measured, in turns, for a thread that only polls the kernel's files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.kernel.cgroup.v1 import open_notice
from rcon_plugins.kernel.events import Watcher

MIB = 1 << 20
LIMIT = 16 * MIB
#: Seconds from a limit or a kill to the callback, on v2.
AIM = 0.002
KINDS = ("memory_limit", "oom_kill", "empty")

Told = Callable[[str], object]


def latency(rounds: int) -> dict[str, dict[str, float]]:
    """Return the median and the ninth decile, in seconds, for each kind of event that the kernel reports immediately.

    For kinds that the bare poll detects, too, add its figures, and our median as a multiple of its median.
    """
    clock = mmap.mmap(-1, mmap.PAGESIZE)
    # Touch the page here first, so that it is not charged to the cgroup: such a page might not outlive the kill.
    struct.pack_into("d", clock, 0, 0.0)
    with (
        _Side("ours", _watched, clock) as ours,
        _Side("bare", _polled, clock) as bare,
    ):
        for _ in range(rounds):
            ours.turn()
            bare.turn()
    found = {}
    for kind, some in ours.taken.items():
        if not some:
            continue
        found[kind] = _summary(some)
        if alone := bare.taken[kind]:
            found[kind] |= {f"bare_{name}": value for name, value in _summary(alone).items()}
            found[kind]["times"] = found[kind]["median"] / found[kind]["bare_median"]
    return found


def _summary(some: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(some),
        "p90": sorted(some)[int(len(some) * 0.9)],
        "count": len(some),
    }


class _Side:
    """A cgroup and the reporter of its events, ours or the bare poll."""

    def __init__(
        self, name: str, telling: Callable[[Cgroup, Told], AbstractContextManager[object]], clock: mmap.mmap
    ) -> None:
        self.taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._cgroup = Hierarchy.discover().cgroup(f"/rcon-bench-{os.getpid()}-{name}").create()
        self._cgroup.configure(Resources(memory_max=LIMIT))
        self._telling = telling(self._cgroup, self._told)
        self._clock = clock
        self._seen: set[str] = set(KINDS)
        self._complete = threading.Event()

    def __enter__(self) -> _Side:
        self._telling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._telling.__exit__(None, None, None)
        self._cgroup.kill()
        self._cgroup.delete()

    def turn(self) -> None:
        """Run a process that reaches the limit, and wait for its events."""
        self._seen = set()
        self._complete.clear()
        os.waitpid(_greedy(self._cgroup, self._clock), 0)
        self._complete.wait(0.3)
        self._seen = set(KINDS)
        time.sleep(0.05)

    def _told(self, kind: str) -> None:
        now = time.monotonic()
        if kind in self._seen:
            return  # one event may be reported more than once
        self._seen.add(kind)
        self.taken[kind].append(now - struct.unpack_from("d", self._clock)[0])
        if self._seen == set(KINDS):
            self._complete.set()


@contextlib.contextmanager
def _watched(cgroup: Cgroup, told: Told) -> Iterator[None]:
    with Watcher() as watcher:
        watcher.add(cgroup, lambda event: told(event.kind), kinds=KINDS)
        yield


@contextlib.contextmanager
def _polled(cgroup: Cgroup, told: Told) -> Iterator[None]:
    """Report events with the least work: poll(2), read, compare. v1 reports a kill in the same way as a limit hit."""
    files: dict[int, str] = {}
    reading, ending = os.pipe()
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        for name in ("memory.events", "cgroup.events"):
            if mount.version == 2 and Path(directory, name).exists():
                files[os.open(Path(directory, name), os.O_RDONLY)] = name
        if mount.version == 1 and "memory" in mount.controllers:
            files[open_notice(directory, "memory.oom_control", "")] = "eventfd"
    for descriptor, name in files.items():
        poll.register(descriptor, select.POLLIN if name == "eventfd" else select.POLLPRI)
    last = {"max": 0, "oom_kill": 0, "populated": 0}

    def run() -> None:
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == reading:
                    return
                if files[descriptor] == "eventfd":
                    os.eventfd_read(descriptor)
                    told("memory_limit")
                    continue
                for line in os.pread(descriptor, 4096, 0).split(b"\n")[:-1]:
                    key, value = line.decode().split()
                    before, last[key] = last.get(key, 0), int(value)
                    if key == "max" and last[key] > before:
                        told("memory_limit")
                    elif key == "oom_kill" and last[key] > before:
                        told("oom_kill")
                    elif key == "populated" and last[key] < before:
                        told("empty")

    for descriptor, name in files.items():
        if name != "eventfd":
            os.pread(descriptor, 4096, 0)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        os.write(ending, b"x")
        thread.join()
        for descriptor in (reading, ending, *files):
            os.close(descriptor)


def _greedy(cgroup: Cgroup, clock: mmap.mmap) -> int:
    """Fork a process that uses more and more memory until it is killed. Return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            cgroup.enter_process()
            memory = mmap.mmap(-1, 4 * LIMIT)
            for at in range(0, len(memory), mmap.PAGESIZE):
                struct.pack_into("d", clock, 0, time.monotonic())
                memory[at] = 1
        finally:
            os._exit(1)
    return pid
