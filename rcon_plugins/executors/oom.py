"""Kill an executor with all its processes once the OOM killer has ended one of them, on cgroup v1.

On v2 the kernel does it itself (``memory.oom.group``). On v1 it ends one process, and the others go on without it. So
the host has one eventfd that the kernel signals before an OOM kill in any executor. The supervisor then reads the
counters of the executors. On Linux 6.18 they rise 0.03 to 20 ms after the notice, and 2 ms or more before the parent of
the killed process learns of its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors

if TYPE_CHECKING:
    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.executors.supervisor import Supervisor

LOGGER = logging.getLogger("rcon")

#: How long the supervisor looks for a risen counter after a notice, seconds.
_PATIENCE = 0.25
#: The first pause between two looks, seconds; each further one is twice as long.
_PAUSE = 0.001
#: The reason for the kill, in the messages about the executor.
REASON = "the OOM killer ended one of its processes"


class OomGuard:
    """Watches all executors of a host. ``living`` returns them, and ``kill`` kills one. Made before the first one."""

    def __init__(
        self, living: Callable[[], Iterable[Executor]], kill: Callable[[Executor, str], object]
    ) -> None:
        self._living = living
        self._kill = kill
        self._notice = descriptors.event_counter()
        self._supervisor: Supervisor | None = None
        self._until = 0.0
        self._pause = 0.0
        self._logged = False

    def start(self, supervisor: Supervisor) -> None:
        """Have the supervisor receive the notices. Call it before the supervisor starts."""
        self._supervisor = supervisor
        supervisor.watch(self._notice, self._receive)

    def add(self, executor: Executor) -> None:
        """Watch a new executor, unless the kernel ends all its processes itself, or its policy says otherwise.

        Raises `KernelError`.
        """
        if not (executor.policy.oom_group and executor.leaf.kills_one_by_one):
            return
        executor.guarded = True
        executor.channel.why_void = partial(self._why_void, executor)
        if not executor.leaf.notify_of_oom(self._notice) and not self._logged:
            self._logged = True
            LOGGER.warning(
                "this kernel does not notify of OOM kills: after one, the other processes of a request or task run on, "
                "until it ends or answers (boot with cgroup v2)"
            )

    def close(self) -> None:
        """Close the eventfd. Call it after the supervisor has ended."""
        os.close(self._notice)

    def _why_void(self, executor: Executor) -> str | None:
        """Return why nothing that an executor sends counts. Kill it if it has to be killed and is not yet."""
        try:
            if executor.kill_reason != REASON and not executor.had_oom_kill():
                return None
        except KernelError as error:
            reason = f"its OOM kills could not be read: {error}"
            self._kill(executor, reason)
            return reason
        self._kill(executor, REASON)
        return REASON

    def _receive(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._notice)
        now = time.monotonic()
        is_looking = now < self._until
        self._until, self._pause = now + _PATIENCE, _PAUSE
        if not is_looking:
            self._look()
        return True

    def _look(self) -> None:
        """Kill the executors in which the OOM killer ended a process. Look again soon: a counter may rise later."""
        for executor in self._living():
            try:
                if executor.had_oom_kill():
                    self._kill(executor, REASON)
            except KernelError as error:
                # No answer. `_why_void` asks again, before anything that the executor sends counts.
                LOGGER.error("%s: its OOM kills could not be read: %s", executor.leaf.path, error)
        now = time.monotonic()
        if now < self._until and self._supervisor is not None:
            self._supervisor.at(now + self._pause, self._look)
            self._pause *= 2
