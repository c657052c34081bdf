"""Set the umask and the resource limits of a process: umask(2), setrlimit(2)."""

from __future__ import annotations

import os
import resource

from rcon_plugins.errors import ConfinementError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.policy import Policy

#: The kernel checks this limit when a process takes its user, and when it executes a program after that: execve(2).
_NPROC = "nproc"


class BeforeIdentity:
    """Set the umask, and ``nproc``, which limits the user's processes. Runs before the process changes to that user."""

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy) -> None:
        """Set both for the calling process. An executor thread has a umask of its own: umask(2), unshare(2).

        If ``nproc`` were set after the identity, the kernel would only refuse forks: see EAGAIN in execve(2).
        """
        if policy.umask is not None:
            os.umask(policy.umask)
        value = policy.rlimits.written().get(_NPROC)
        if value is not None:
            set_rlimit(_NPROC, value)


class Rlimits:
    """Set all other resource limits. Runs after the other built-in plugins, which need files and memory themselves."""

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy) -> None:
        """Set soft and hard value of each limit for the calling process. Policies for threads have no rlimits."""
        for name, value in policy.rlimits.written().items():
            if name != _NPROC:
                set_rlimit(name, value)


def set_rlimit(name: str, value: int) -> None:
    """Set one limit of the calling process, by its name in lower case. Raises `ConfinementError`.

    Keep a lower hard limit of the server: it is stricter, and raising it needs CAP_SYS_RESOURCE.
    """
    kind = getattr(resource, f"RLIMIT_{name.upper()}")
    _, hard = resource.getrlimit(kind)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (most, most))
    except (OSError, ValueError) as error:
        raise ConfinementError(f"rlimits.{name} cannot be set to {value}: {error}") from error
