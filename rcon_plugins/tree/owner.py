"""The owner of an instance: the process that made it. The name of the instance identifies it on this machine.

The name is ``rcon-<pid>-<starttime>``. An owner in another PID namespace than the initial one, as in a container, adds
the number of its namespace: ``rcon-<pid>-<starttime>.<namespace>``. Further instances of a process add a number. So
every process that sees the instance knows whether it can judge if the owner lives: see `Owner.is_alive`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Self

from rcon_plugins.kernel import proc

#: The name of an instance: pid, start time and PID namespace of its owner.
INSTANCE_NAME = re.compile(r"rcon-([1-9][0-9]{0,9})-([0-9]{1,20})(?:\.([0-9]{1,20}))?(?:-[0-9]{1,4})?")


class Owner(NamedTuple):
    """The pid of a process in its own PID namespace, its start time, and that namespace."""

    pid: int
    started: int
    namespace: int

    @classmethod
    def here(cls) -> Self:
        """Return the calling process."""
        return cls(os.getpid(), proc.start_time(os.getpid()) or 0, proc.pid_namespace())

    @classmethod
    def of(cls, instance: str) -> Self | None:
        """Return the owner of the instance of this name; None for any other name."""
        match = INSTANCE_NAME.fullmatch(instance)
        if match is None:
            return None
        return cls(int(match[1]), int(match[2]), int(match[3] or proc.INITIAL_PID_NAMESPACE))

    @property
    def instance_name(self) -> str:
        """The name of the first instance of this owner."""
        suffix = "" if self.namespace == proc.INITIAL_PID_NAMESPACE else f".{self.namespace}"
        return f"rcon-{self.pid}-{self.started}{suffix}"

    def is_alive(self) -> bool | None:
        """Return whether the process is alive; None if that cannot be known from this PID namespace."""
        return proc.is_alive(self.pid, self.started, self.namespace)

    def visible_pid(self) -> int | None:
        """Return the pid of the process in this PID namespace; None if it is dead or cannot be seen from here."""
        return proc.visible_pid(self.pid, self.started, self.namespace)
