"""Controller cpu: the share of the processors, as quota and as weight."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.settings.limits import Limits


@hookimpl
def rcon_configure_cgroup(cgroup: Cgroup, limits: Limits) -> None:
    """Write the CPU quota and the weight among siblings."""
    if limits.cpu is not None or limits.cpu_burst is not None or limits.cpu_weight is not None:
        quota = None if limits.cpu is None else float(limits.cpu)
        cgroup.configure(Resources(cpu_quota=quota, cpu_burst=limits.cpu_burst, cpu_weight=limits.cpu_weight))
