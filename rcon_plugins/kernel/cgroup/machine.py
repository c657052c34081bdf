"""How much memory there is to give out."""

from __future__ import annotations

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts
from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}


def memory_of_machine(hierarchy: Hierarchy) -> int:
    """Bytes of memory that this process could have: those of the machine (``/proc/meminfo``), or of its container.

    That is: the least limit of its own cgroup and those around it, as far as they can be seen. Raises KernelError.
    """
    total = _machine()
    mount = hierarchy.mount_of("memory")
    if mount is None:
        return total
    path = mounts.membership(mount, mounts.parse_membership(files.read_own("cgroup")))
    while path is not None:
        text = files.read_if_there(mount.directory(path), _LIMIT[mount.version])
        if text and text.strip() != "max":
            total = min(total, int(text))
        path = None if path == "/" else path.rpartition("/")[0] or "/"
    return total


def _machine() -> int:
    for line in files.read("/proc", "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    raise KernelError("/proc/meminfo does not say how much memory there is", path="/proc/meminfo")
