"""The watcher of a group of running processes that were taken: what ``rcon attach`` leaves behind. Also a program.

It owns the instance, waits for the processes to end and removes the group. Told to end itself (SIGTERM), it puts them
back first; if it is killed, the next start or ``rcon gc`` puts them back.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

if __name__ == "__main__":  # by path, in an interpreter that knows nothing but its own library
    sys.path.insert(0, __file__.rsplit("/", 3)[0])

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.tree import previous_cgroups
from rcon_plugins.tree.instance import Instance

#: SIGTERM asks it to put all back and end, SIGUSR1 to look again. Blocked in who becomes it.
HEARD = (signal.SIGTERM, signal.SIGUSR1)
#: Milliseconds after which it looks again, should a process be listed that has ended.
_PAUSE = 100


def main(base: str, name: str, group: str) -> None:
    """Watch over a group of the instance that this very process made before it executed this."""
    instance = Instance(Hierarchy.discover().narrowed(base), base, name, None)
    watch(instance, instance.taken(group))


def name_of(instance: Instance) -> str:
    """``rcon-<pid>-<starttime>``."""
    return instance.path.rpartition("/")[2]


def watch(instance: Instance, group: Cgroup, end: Callable[[], object] | None = None) -> None:
    """Wait until nothing is in the group, or SIGTERM comes; put back what is left, and remove all. KernelError.

    ``end`` ends what was done to the group in other threads meanwhile.
    """
    bell, rope = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(rope, warn_on_full_buffer=False)
    for number in HEARD:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    heard = b""
    while signal.SIGTERM not in heard and (pids := set(group.processes(subtree=True)) - {0}):
        _wait_for(min(pids), bell)
        with contextlib.suppress(BlockingIOError):
            heard = os.read(bell, 4096)
    if end is not None:
        end()
    let_go(instance, group)


def let_go(instance: Instance, group: Cgroup) -> None:
    """Put back what is in the group, and remove all. KernelError."""
    if not previous_cgroups.restore(group, previous_cgroups.load(name_of(instance))):
        group.delete()
        previous_cgroups.forget(name_of(instance))
    instance.close()


def _wait_for(pid: int, bell: int) -> None:
    """Until the process has ended, or the bell rings."""
    waiting = select.poll()
    waiting.register(bell, select.POLLIN)
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        waiting.poll(_PAUSE)
        return
    try:
        waiting.register(descriptor, select.POLLIN)
        if any(ready == descriptor for ready, _ in waiting.poll()):
            waiting.unregister(descriptor)
            waiting.poll(_PAUSE)  # it is listed until it is reaped
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(*sys.argv[1:])
