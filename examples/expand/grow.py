"""Expand the memory limit of a child as the child needs more: ``python grow.py``, as root.

Makes a cgroup with a limit of 32 MiB that may expand to 128 MiB, runs a child in it that allocates 8 MiB every tenth of
a second, and prints the events. At 128 MiB the limit no longer expands, and the kernel kills the child.
"""

from __future__ import annotations

import os
import signal
import time

from rcon_plugins import Event, Memory, expand, watch
from rcon_plugins.kernel.cgroup import Hierarchy

MIB = 2**20
MEMORY = Memory.parse({"limit": "32M", "expand": "2x", "up_to": "128M"})


def allocate() -> None:
    """Allocate 8 MiB at a time, up to 160 MiB. Runs in the child."""
    held = []
    for _ in range(20):
        held.append(os.urandom(8 * MIB))
        time.sleep(0.1)


def print_expansion(event: Event) -> None:
    """Print each expansion. Called in the watcher's thread when the limit is hit, before it expands."""
    bound, becomes = (event.bound or 0) / MIB, (event.next_bound or 0) / MIB
    print(
        f"{(event.usage or 0) / MIB:.0f} MiB in use: the limit expands from {bound:.0f} to {becomes:.0f} MiB"
    )


def main() -> None:
    """Run the child and print what happens to it."""
    cgroup = Hierarchy.discover().cgroup(f"/rcon-grow-{os.getpid()}").create()
    try:
        with watch(cgroup, kinds=["oom_kill", "empty"]) as events:
            expansion = expand(cgroup, MEMORY, on_event=print_expansion)
            child = os.fork()
            if child == 0:
                cgroup.enter_process()
                allocate()
                os._exit(0)
            for event in events:
                print(f"{event.kind}, {event.count} time(s)")
                if event.kind == "empty":
                    break
            expansion.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        how = (
            f"killed at its memory limit {MEMORY.describe()}"
            if status == -signal.SIGKILL
            else f"status {status}"
        )
        print(f"the child ended, {how}")
    finally:
        cgroup.kill()
        cgroup.delete()


if __name__ == "__main__":
    main()
