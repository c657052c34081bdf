"""Manage control groups of version 1, version 2 and hybrid through one interface. The package knows no policy.

::

    hierarchy = Hierarchy.discover()
    cgroup = hierarchy.cgroup("/servers/example").create()
    cgroup.configure(Resources(cpu_quota=0.3, memory_max=64 * 1024**2, pids_max=16))
"""

from rcon_plugins.kernel.cgroup.cgroup import Cgroup
from rcon_plugins.kernel.cgroup.device import Device, device_of
from rcon_plugins.kernel.cgroup.entrance import Entrance
from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy, Refusal
from rcon_plugins.kernel.cgroup.limits import change_limits, keep_swap, read_limits
from rcon_plugins.kernel.cgroup.meter import Meter, Reading
from rcon_plugins.kernel.cgroup.mounts import mount_points, mount_table
from rcon_plugins.kernel.cgroup.resources import CONTROLLERS, MAX, IoMax, Resources

__all__ = [
    "CONTROLLERS",
    "MAX",
    "Cgroup",
    "Device",
    "Entrance",
    "Hierarchy",
    "IoMax",
    "Meter",
    "Reading",
    "Refusal",
    "Resources",
    "change_limits",
    "device_of",
    "keep_swap",
    "mount_points",
    "mount_table",
    "read_limits",
]
