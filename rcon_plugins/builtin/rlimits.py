"""Resource limits that every process of the work has for itself: setrlimit(2)."""

from __future__ import annotations

import resource

from rcon_plugins.errors import ConfinementError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.policy import Policy

#: What is judged when a process becomes its user, and when that executes a program next: see `defaults.nproc`.
OF_THE_USER = "nproc"


@hookimpl(trylast=True)
def rcon_drop(policy: Policy) -> None:
    """Set each limit but `OF_THE_USER`, soft and hard alike, of the calling process; policies for threads have none.

    After all other built-in plugins: what they open, and need of memory, is not the work's. To lower a limit takes no
    privilege, and no code of the work runs before.
    """
    for name, value in policy.rlimits.written().items():
        if name != OF_THE_USER:
            limit(name, value)


def limit(name: str, value: int) -> None:
    """Set one limit of the calling process, by its name in small letters. Raises `ConfinementError`.

    A hard limit of the server that is lower stays: to raise it would take CAP_SYS_RESOURCE, and it is the stricter.
    """
    kind = getattr(resource, f"RLIMIT_{name.upper()}")
    _, hard = resource.getrlimit(kind)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (most, most))
    except (OSError, ValueError) as error:
        raise ConfinementError(f"rlimits.{name} cannot be set to {value}: {error}") from error
