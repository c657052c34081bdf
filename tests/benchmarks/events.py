"""From event to callback: how long it takes until a program is told what happened to a cgroup.

A process in the cgroup writes down the time before everything it does; when the callback runs, the last time is that
of what caused the event. So the kernel's own part is in it: reclaim, choosing whom to kill, the kill.
"""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import threading
import time

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.kernel.cgroup.events import Event, Watcher

MIB = 1 << 20
LIMIT = 16 * MIB
#: Seconds from a limit or a kill to the callback, on v2.
AIM = 0.002
KINDS = ("memory_limit", "oom_kill", "empty")


def latency(rounds: int) -> dict[str, dict[str, float]]:
    """Median and ninth decile, in seconds, for each kind of event that the kernel tells of at once."""
    cgroup = Hierarchy.discover().cgroup(f"/rcon-bench-{os.getpid()}").create()
    cgroup.configure(Resources(memory_max=LIMIT))
    clock = mmap.mmap(-1, mmap.PAGESIZE)
    # Touched here first, so that it is not the cgroup's own: a page of that is not sure to outlive the kill.
    struct.pack_into("d", clock, 0, 0.0)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seen: set[str] = set()
    complete = threading.Event()

    def told(event: Event) -> None:
        now = time.monotonic()
        if event.kind in seen:
            return  # one incident may be told more than once
        seen.add(event.kind)
        taken[event.kind].append(now - struct.unpack_from("d", clock)[0])
        if seen == set(KINDS):
            complete.set()

    try:
        with Watcher() as watcher:
            watcher.add(cgroup, told, kinds=KINDS)
            for _ in range(rounds):
                seen.clear()
                complete.clear()
                os.waitpid(_greedy(cgroup, clock), 0)
                complete.wait(1)
                time.sleep(0.05)
    finally:
        cgroup.kill()
        cgroup.delete()
    return {
        kind: {
            "median": statistics.median(some),
            "p90": sorted(some)[int(len(some) * 0.9)],
            "count": len(some),
        }
        for kind, some in taken.items()
        if some
    }


def _greedy(cgroup: Cgroup, clock: mmap.mmap) -> int:
    """A process that needs ever more memory, until it is killed."""
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
