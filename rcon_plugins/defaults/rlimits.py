"""Resource limits that every process of the work has for itself: setrlimit(2)."""

from __future__ import annotations

import resource

from rcon_plugins.errors import ConfinementError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy) -> None:
    """Set each limit, soft and hard alike, of the calling process; policies for threads have none.

    A hard limit of the server that is lower stays: to raise it would take CAP_SYS_RESOURCE, and it is the stricter.
    """
    for name, value in policy.rlimits.written().items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}")
        _, hard = resource.getrlimit(kind)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError) as error:
            raise ConfinementError(f"rlimits.{name} cannot be set to {value}: {error}") from error
