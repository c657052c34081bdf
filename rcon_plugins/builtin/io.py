"""Controller io (v1: blkio): bytes and operations a second on a device."""

from __future__ import annotations

from rcon_plugins.builtin import in_bytes
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import Cgroup, IoMax, Resources, device_of
from rcon_plugins.settings.limits import Limits


@hookimpl
def rcon_configure_cgroup(cgroup: Cgroup, limits: Limits) -> None:
    """Write the limits of each device. A path stands for the disk that holds it."""
    if limits.io:
        cgroup.configure(
            Resources(
                io={
                    device_of(where): IoMax(
                        rbps=in_bytes(most.read),
                        wbps=in_bytes(most.write),
                        riops=most.read_iops,
                        wiops=most.write_iops,
                    )
                    for where, most in limits.io.items()
                }
            )
        )
