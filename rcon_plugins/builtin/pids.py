"""Controller pids: how many processes and threads."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.settings.limits import Limits


@hookimpl
def rcon_configure_cgroup(cgroup: Cgroup, limits: Limits) -> None:
    """Write the most processes and threads, the waiting executor processes among them."""
    if limits.pids is not None:
        cgroup.configure(Resources(pids_max=limits.pids))
