"""Run the watcher of an attached group, the process that ``rcon attach`` starts. Also executed as a program.

The watcher owns the instance, waits for the processes to end, and removes the group. On SIGTERM it first moves the
processes back to their previous cgroups. If the watcher is killed, the next start or ``rcon gc`` does that.
"""

from __future__ import annotations

import contextlib
import os
import posix
import select
import signal
import sys
from collections.abc import Callable

if __name__ == "__main__":  # executed by path, in an isolated interpreter
    sys.path.insert(0, __file__.rsplit("/", 3)[0])

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.kernel.files import gone
from rcon_plugins.tree import previous_cgroups
from rcon_plugins.tree.instance import Instance

#: SIGTERM: move all processes back and end. SIGUSR1: check the group again. Both stay blocked until `watch` runs.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: The pause before another check while the cgroup still lists an ended process, milliseconds.
_PAUSE = 100


def main(base: str, name: str, group: str) -> None:
    """Watch a group. This process made the instance before it executed this program."""
    instance = Instance(Hierarchy.discover().narrowed(base), base, name, None)
    watch(instance, instance.attached(group))


def name_of(instance: Instance) -> str:
    """Return the name of an instance: ``rcon-<pid>-<starttime>``."""
    return instance.path.rpartition("/")[2]


def watch(instance: Instance, group: Cgroup, stop: Callable[[], object] | None = None) -> None:
    """Wait until the group is empty or SIGTERM arrives. Then move the remaining processes back, and remove everything.

    Before that, call ``stop``, which ends the threads that monitor the group. Raises KernelError.
    """
    wakeup, writing = descriptors.pipe(blocking=False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    received = b""
    while signal.SIGTERM not in received and (pids := set(group.processes(subtree=True)) - {0}):
        _wait_for(min(pids), wakeup)
        with contextlib.suppress(BlockingIOError):
            received = os.read(wakeup, 4096)
    if stop is not None:
        stop()
    release(instance, group)


def release(instance: Instance, group: Cgroup) -> None:
    """Move the processes of the group back to their previous cgroups, and remove everything. Raises KernelError."""
    if not previous_cgroups.restore(group, previous_cgroups.load(name_of(instance))):
        group.delete()
        previous_cgroups.forget(name_of(instance))
    instance.close()


def _wait_for(pid: int, wakeup: int) -> None:
    """Wait until the process has ended, or ``wakeup`` is readable."""
    waiting = select.poll()
    waiting.register(wakeup, select.POLLIN)
    try:
        descriptor = descriptors.of_process(pid)
    except KernelError as error:
        if not gone(error):
            raise
        waiting.poll(_PAUSE)
        return
    try:
        waiting.register(descriptor, select.POLLIN)
        if any(ready == descriptor for ready, _ in waiting.poll()):
            waiting.unregister(descriptor)
            waiting.poll(_PAUSE)  # the cgroup lists the process until it is reaped
    finally:
        posix.close(descriptor)


if __name__ == "__main__":
    main(*sys.argv[1:])
