"""RLIMIT_NPROC, the most processes and threads of the user that the work has."""

from __future__ import annotations

from rcon_plugins.builtin.rlimits import OF_THE_USER, limit
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy) -> None:
    """Set it before the identity is taken.

    The kernel looks at it then: a process that becomes a user with too many may not execute a program. Set afterwards
    it would only keep that from forking. Source: execve(2), EAGAIN.
    """
    value = policy.rlimits.written().get(OF_THE_USER)
    if value is not None:
        limit(OF_THE_USER, value)
