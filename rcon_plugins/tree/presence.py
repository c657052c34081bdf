"""Identify a process across machines, and distinguish it from a later process with the same pid."""

from __future__ import annotations

import os
from typing import NamedTuple, Self

from rcon_plugins.kernel import proc


class Presence(NamedTuple):
    """The identity of a process: its system (see `rcon_plugins.kernel.proc.system_id`), its pid, its start time."""

    system: str
    pid: int
    started: int

    @classmethod
    def here(cls) -> Self:
        """Return the presence of the calling process."""
        return cls(proc.system_id(), os.getpid(), proc.start_time(os.getpid()) or 0)

    def has_gone(self) -> bool:
        """Return whether the process has ended. Return False if that is unknown, for example on another machine."""
        return proc.system_id() == self.system and not proc.is_alive(
            self.pid, self.started, proc.pid_namespace()
        )
