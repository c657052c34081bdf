"""The limits that a machine cannot enforce, found before anything is made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts, v1, v2
from rcon_plugins.kernel.cgroup.device import whole_disk
from rcon_plugins.kernel.cgroup.resources import (
    CONTROLLERS,
    MAX,
    Resources,
    controller_of,
    controller_of_file,
    format_list,
    parse_list,
)

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy


class Refusal(NamedTuple):
    """A limit (the name of a field of Resources, or ``files.NAME``), why it cannot be enforced, and the remedy."""

    limit: str
    reason: str
    remedy: str


def refusals(
    hierarchy: Hierarchy, resources: Resources, *, threaded: bool, within: Resources | None
) -> list[Refusal]:
    """See :meth:`Hierarchy.refusals`."""
    values = {name: getattr(resources, name) for name in resources.written()}
    asked = [
        name for name, value in values.items() if name not in ("oom_group", "files") and value is not MAX
    ]
    if resources.swap_max == 0 and not v1.has_swap():
        # without swap on the machine, the limit holds already
        asked.remove("swap_max")
    found = []
    for name in asked:
        refusal = _controller(hierarchy, controller_of(name), threaded)
        if refusal is None:
            refusal = _CHECKS[name](hierarchy, resources, within) if name in _CHECKS else None
        if refusal is not None:
            found.append(Refusal(name, *refusal))
    for name in resources.files:
        refusal = _file(hierarchy, name, threaded)
        if refusal is not None:
            found.append(Refusal(f"files.{name}", *refusal))
    return found


def _file(hierarchy: Hierarchy, name: str, threaded: bool) -> tuple[str, str] | None:
    """Why a file that no field of Resources sets cannot be written."""
    controller = controller_of_file(name)
    mount = hierarchy.mount_of(controller)
    if controller in CONTROLLERS:
        if refusal := _controller(hierarchy, controller, threaded):
            return refusal
    elif threaded:
        return (f"a thread cannot have {controller} limits of its own", "use isolation by process")
    else:
        mount = hierarchy.unified
        if mount is None or controller not in mount.controllers:
            remedy = _delegate(controller) if hierarchy.layout == "v2" else "boot with cgroup v2"
            return (f"the {controller} controller is not available here", remedy)
    if mount is None:
        return None
    for directory in (f"{mount.path}/{child}" for child in files.subdirectories(mount.path)):
        has_controller = mount.version == 1 or controller in v2.offered(directory)
        if has_controller and not os.path.exists(f"{directory}/{name}"):
            return (f"there is no {directory}/{name}", f"leave {name} out, or boot a kernel that has it")
    return None


def _delegate(controller: str) -> str:
    return (
        f"under systemd set Delegate={controller} in the unit; else write +{controller} to "
        "cgroup.subtree_control of the cgroups above"
    )


def _controller(hierarchy: Hierarchy, controller: str, threaded: bool) -> tuple[str, str] | None:
    mount = hierarchy.mount_of(controller)
    if mount is None:
        if controller == "io" and hierarchy.io_holder is not None:
            return (
                f"the IO limits of {hierarchy.io_holder} hold here, and on cgroup v1 none can be within others",
                "set IO limits there alone, or boot with cgroup v2",
            )
        if hierarchy.layout == "v2":
            reason = f"the {controller} controller is not available in this part of the cgroup tree"
            return (reason, _delegate(controller))
        kernel_name = v1.KERNEL_NAMES[controller]
        remedy = f"mount -t cgroup -o {kernel_name} none /sys/fs/cgroup/{kernel_name}, or boot with cgroup v2"
        return (f"the {controller} controller is not mounted", remedy)
    if mount.read_only:
        return (f"{mount.path} is mounted read-only", mounts.writable_remedy([mount]))
    if threaded and controller not in (v2.THREADED if mount.version == 2 else v1.THREADED):
        return (f"a thread cannot have {controller} limits of its own", "use isolation by process")
    return None


def _cpu_burst(
    hierarchy: Hierarchy, resources: Resources, _within: Resources | None
) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("cpu")
    if mount is None or not resources.cpu_burst:
        return None
    quota, burst = (
        ("cpu.max", "cpu.max.burst") if mount.version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_burst_us")
    )
    for directory in _with_controller(mount.path, quota):
        if files.read_if_there(directory, burst) is None:
            return ("this kernel has no CPU burst", "leave cpu_burst out, or boot Linux 5.14 or newer")
    return None


def _cpus(hierarchy: Hierarchy, resources: Resources, within: Resources | None) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("cpuset")
    if mount is None:
        return None
    name = "cpuset.cpus.effective" if mount.version == 2 else "cpuset.cpus"
    text = files.read_if_there(mount.path, name) or files.read("/sys/devices/system/cpu", "online")
    there = parse_list(text)
    if within is not None and within.cpus is not None:
        there &= parse_list(within.cpus)
    missing = parse_list(resources.cpus or "0") - there
    if missing:
        return (f"CPUs {format_list(missing)} are not there or not allowed", f"choose from {text}")
    return None


def _memory_high(
    hierarchy: Hierarchy, _resources: Resources, _within: Resources | None
) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("memory")
    if mount is not None and mount.version == 1:
        return ("cgroup v1 has no memory_high", "set a memory limit alone, or boot with cgroup v2")
    return None


def _swap(hierarchy: Hierarchy, resources: Resources, _within: Resources | None) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("memory")
    if mount is None:
        return None
    if mount.version == 1:
        if resources.memory_max is None:
            return ("cgroup v1 limits swap only together with memory", "set memory_max as well")
        if files.read_if_there(mount.path, "memory.memsw.limit_in_bytes") is None:
            return ("swap is not accounted for", "boot with swapaccount=1, or turn swap off")
        return None
    for directory in _with_controller(mount.path, "memory.max"):
        if files.read_if_there(directory, "memory.swap.max") is None:
            return ("swap is not accounted for", "boot with swapaccount=1, or turn swap off")
        break
    return None


def _with_controller(root: str, name: str) -> list[str]:
    """The first cgroup near the root that has a file; the root itself has no limits."""
    for first in [root, *(f"{root}/{child}" for child in files.subdirectories(root))]:
        if os.path.exists(f"{first}/{name}"):
            return [first]
    return []


def _io(hierarchy: Hierarchy, resources: Resources, within: Resources | None) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("io")
    if mount is not None and mount.version == 1 and within is not None and within.io:
        return (
            "cgroup v1 holds either IO limits for all work together or for each, not both",
            "set one of them, or boot with cgroup v2",
        )
    for device in resources.io:
        try:
            disk = whole_disk(device)
        except KernelError as error:
            return (error.problem, error.hint or "")
        if disk != device:
            return (f"{device} is a partition", f"only whole disks can be limited: use {disk}")
    return None


_CHECKS = {"cpu_burst": _cpu_burst, "cpus": _cpus, "memory_high": _memory_high, "swap_max": _swap, "io": _io}
