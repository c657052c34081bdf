"""The umask: what permissions new files do not get."""

from __future__ import annotations

import os

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy) -> None:
    """Set the umask of the process, or of an executor thread, which has one of its own (umask(2), unshare(2))."""
    if policy.umask is not None:
        os.umask(policy.umask)
