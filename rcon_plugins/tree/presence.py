"""A process as another may know it, on any machine: told from a later one of the same number."""

from __future__ import annotations

import os
from typing import NamedTuple, Self

from rcon_plugins.kernel import proc


class Presence(NamedTuple):
    """A process: the system it is in (see `rcon_plugins.kernel.proc.system_id`), its pid, when it started."""

    system: str
    pid: int
    started: int

    @classmethod
    def here(cls) -> Self:
        """The calling process."""
        return cls(proc.system_id(), os.getpid(), proc.start_time(os.getpid()) or 0)

    def has_gone(self) -> bool:
        """Whether it has surely ended. False also where nobody here can tell: on another machine, say."""
        return proc.system_id() == self.system and not proc.is_alive(self.pid, self.started)
