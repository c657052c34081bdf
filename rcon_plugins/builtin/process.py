"""What belongs to the process itself: umask, and the resource limits of setrlimit(2)."""

from __future__ import annotations

import os
import resource

from rcon_plugins.errors import ConfinementError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.policy import Policy

#: The kernel checks this limit when a process takes its user, and when it executes a program after that: execve(2).
_NPROC = "nproc"


class BeforeIdentity:
    """The umask, and the limit on processes of the user, which has to be set before the process becomes that user."""

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy) -> None:
        """Set both for the calling process. An executor thread has a umask of its own: umask(2), unshare(2).

        Set after the identity, ``nproc`` would only keep the process from forking: EAGAIN in execve(2).
        """
        if policy.umask is not None:
            os.umask(policy.umask)
        value = policy.rlimits.written().get(_NPROC)
        if value is not None:
            set_rlimit(_NPROC, value)


class Rlimits:
    """All other resource limits, after the other built-in plugins: the files and memory these need do not count."""

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy) -> None:
        """Set each limit, soft and hard alike, for the calling process. Policies for threads have none."""
        for name, value in policy.rlimits.written().items():
            if name != _NPROC:
                set_rlimit(name, value)


def set_rlimit(name: str, value: int) -> None:
    """Set one limit of the calling process, by its name in small letters. Raises `ConfinementError`.

    A lower hard limit of the server stays: it is the stricter one, and raising it takes CAP_SYS_RESOURCE.
    """
    kind = getattr(resource, f"RLIMIT_{name.upper()}")
    _, hard = resource.getrlimit(kind)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (most, most))
    except (OSError, ValueError) as error:
        raise ConfinementError(f"rlimits.{name} cannot be set to {value}: {error}") from error
