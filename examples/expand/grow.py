"""A program that watches itself, and gives itself more memory as it needs it: ``python grow.py``, as root.

It makes a cgroup with a limit of 32 MiB that may grow to 128 MiB, runs a child in it that needs a little more every
tenth of a second, and says what happens. The child needs 160 MiB at last, which is more than it may ever have.
"""

from __future__ import annotations

import os
import signal
import time

from rcon_plugins import Event, Memory, expand, watch
from rcon_plugins.kernel.cgroup import Hierarchy

MIB = 2**20
MEMORY = Memory.parse({"limit": "32M", "expand": "2x", "up_to": "128M"})


def need_more_and_more() -> None:
    """The child: 8 MiB more at a time, up to 160."""
    held = []
    for _ in range(20):
        held.append(os.urandom(8 * MIB))
        time.sleep(0.1)


def raised(event: Event) -> None:
    """Called in the watching thread each time that the limit is reached, before it is raised."""
    bound, becomes = (event.bound or 0) / MIB, (event.next_bound or 0) / MIB
    print(f"needs {(event.usage or 0) / MIB:.0f} MiB: {bound:.0f} MiB become {becomes:.0f}")


def main() -> None:
    """Run the child and tell its story."""
    cgroup = Hierarchy.discover().cgroup(f"/rcon-grow-{os.getpid()}").create()
    try:
        with watch(cgroup, kinds=["oom_kill", "empty"]) as events:
            growing = expand(cgroup, MEMORY, on_event=raised)
            child = os.fork()
            if child == 0:
                cgroup.enter_process()
                need_more_and_more()
                os._exit(0)
            for event in events:
                print(f"{event.kind}, {event.count} time(s)")
                if event.kind == "empty":
                    break
            growing.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        how = (
            f"killed: it needed more than {MEMORY.describe()}"
            if status == -signal.SIGKILL
            else f"status {status}"
        )
        print(f"the child ended, {how}")
    finally:
        cgroup.kill()
        cgroup.delete()


if __name__ == "__main__":
    main()
