"""End a whole command once the OOM killer has ended one of its processes, on cgroup v1. On v2 the kernel does it.

This module imports little, because ``rcon run`` starts with it.
"""

from __future__ import annotations

import _thread
import os
import select
import time
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError, thread_not_started
from rcon_plugins.kernel import descriptors
from rcon_plugins.kernel.cgroup.v1 import count_notices
from rcon_plugins.kernel.files import gone

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup, Meter

#: How long to wait for the counter of OOM kills after a notice, seconds. It rises some milliseconds later.
_PATIENCE = 0.25
#: How long to try to kill the group, seconds.
_KILL_SECONDS = 5.0
#: Look only at the command's own counter for so long, because looking at nested groups takes longer.
_OWN_FIRST = 0.02
#: How long to wait before the next poll(2), after one that failed, seconds.
_POLL_AGAIN = 0.05
#: A peak this close to the limit reached it, as in `rcon_plugins.ending`.
_REACHED = 0.95


class OomGuard:
    """Counts the OOM notices of a group on v1, and kills the group after an OOM kill if `start` is told to.

    ``notices`` is the number of notices until `stop`. On v2 it stays 0.
    """

    def __init__(self, group: Cgroup, leaf: Cgroup) -> None:
        self.notices = 0
        self._group = group
        self._leaf = leaf
        self._notice = -1
        self._meter: Meter | None = None
        self._over = False
        self._running = _thread.allocate_lock()

    def start(self, kills_all: bool) -> None:
        """Start to count; with ``kills_all`` in a thread that kills. The cgroups exist. Raises `KernelError`."""
        if not self._group.kills_one_by_one:
            return
        self._notice = descriptors.event_counter()
        if self._group.notify_of_oom(self._notice) and kills_all:
            self._meter = self._leaf.meter({"memory"})  # opened now, because the time after a kill is short
            self._running.acquire()
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError as error:  # `rcon_plugins.kernel.threads` would import more
                self._running.release()
                raise thread_not_started("oom-guard", error) from None

    def stop(self) -> None:
        """End the thread, and count the notices until now. Call it while the group exists."""
        if self._notice < 0:
            return
        self._over = True
        os.eventfd_write(self._notice, 1)
        with self._running:  # the thread has ended
            self.notices += count_notices(self._notice) - 1

    def close(self) -> None:
        """Stop, and close the descriptor. Calling it again does nothing."""
        if self._notice >= 0:
            self.stop()
            os.close(self._notice)
            self._notice = -1
        if self._meter is not None:
            self._meter.close()

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self._notice, select.POLLIN)
            while True:
                try:
                    poll.poll()
                except OSError:  # for want of memory
                    time.sleep(_POLL_AGAIN)
                if self._over:
                    return
                self.notices += count_notices(self._notice)
                self._kill_after_a_kill()
        finally:
            self._running.release()

    def _kill_after_a_kill(self) -> None:
        """Kill the group as soon as the counters show an OOM kill in it. A notice may be for a group around it.

        A call that fails is tried again.
        """
        began, pause, found = time.monotonic(), 0.0002, False
        while not self._over and (waited := time.monotonic() - began) < (
            _KILL_SECONDS if found else _PATIENCE
        ):
            try:
                found = found or self._shows_a_kill(waited)
                if found:
                    self._group.kill_once()
                    return
            except KernelError as error:
                if gone(error):
                    return  # the command has ended, and the group is being removed
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _shows_a_kill(self, waited: float) -> bool:
        if self._meter is not None and self._meter.oom_kills():
            return True
        return waited > _OWN_FIRST and self._was_killed_below()

    def _was_killed_below(self) -> bool:
        """Return whether the OOM killer ended a process of a group nested in this one, at the limit of this one."""
        from rcon_plugins.kernel.cgroup.limits import read_limits
        from rcon_plugins.kernel.cgroup.statistics import read_usage

        bound, usage = read_limits(self._group).memory_max, read_usage(self._group)
        return bool(
            usage.oom_kills and isinstance(bound, int) and (usage.memory_peak or 0) >= _REACHED * bound
        )
