"""Controller cpuset: which processors."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.settings.limits import Limits


@hookimpl
def rcon_configure_cgroup(cgroup: Cgroup, limits: Limits) -> None:
    """Write the list of processors."""
    if limits.cpus is not None:
        cgroup.configure(Resources(cpus=str(limits.cpus)))
