"""Find the cgroup file systems of this machine (v2, v1 or hybrid), and the limits that they can enforce."""

from __future__ import annotations

import errno
import os
from typing import Literal, NamedTuple

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts, swap, v1, v2
from rcon_plugins.kernel.cgroup.branch import Branch, check_path
from rcon_plugins.kernel.cgroup.cgroup import Cgroup
from rcon_plugins.kernel.cgroup.device import whole_disk
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.resources import (
    CONTROLLERS,
    MAX,
    Resources,
    controller_of,
    controller_of_file,
    format_list,
    parse_list,
)
from rcon_plugins.kernel.cgroup.v1 import V1Branch
from rcon_plugins.kernel.cgroup.v2 import V2Branch

Layout = Literal["v2", "v1", "hybrid"]

#: The file of the memory limit, by version.
_MEMORY_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}


class Refusal(NamedTuple):
    """A limit (a field of Resources, or ``files.NAME``), the reason why it cannot be enforced, and the remedy."""

    limit: str
    reason: str
    remedy: str


class Hierarchy(NamedTuple):
    """The mounted cgroup hierarchies, and the controllers whose limits can be set. Immutable; survives ``fork``."""

    layout: Layout
    controllers: frozenset[str]
    mounts: tuple[Mount, ...]
    #: On v1: the directory whose IO limits hold for every cgroup made here. These cannot have IO limits of their own.
    io_holder: str | None = None

    @classmethod
    def discover(cls) -> Hierarchy:
        """Return the hierarchies in ``/proc/self/mountinfo``.

        ``controllers`` are those at the root of the tree. A cgroup below may have fewer: see :meth:`narrowed`. Raises
        ControllerUnavailable if no cgroup file system is mounted.
        """
        found = mounts.cgroup_mounts(mounts.parse_mountinfo(files.read_own("mountinfo")))
        return cls.of(
            [
                mount._replace(controllers=v2.offered(mount.path)) if mount.version == 2 else mount
                for mount in found
            ]
        )

    @classmethod
    def of(cls, found: list[Mount]) -> Hierarchy:
        """Return the hierarchy of these mounts. Raises ControllerUnavailable if ``found`` has no usable mount."""
        ones = {name for mount in found if mount.version == 1 for name in mount.controllers}
        offered = {name for mount in found if mount.version == 2 for name in mount.controllers}
        has_two = any(mount.version == 2 for mount in found)
        if not ones and not has_two:
            raise ControllerUnavailable(
                "no cgroup file system is mounted",
                path="/proc/self/mountinfo",
                hint="mount -t cgroup2 none /sys/fs/cgroup",
            )
        usable = {ours for ours, kernel in v1.KERNEL_NAMES.items() if kernel in ones}
        layout: Layout = "v2" if not usable else "hybrid" if has_two else "v1"
        return cls(layout, frozenset(usable | (offered & CONTROLLERS)), tuple(found))

    def narrowed(self, base: str) -> Hierarchy:
        """Return this hierarchy with only the controllers of the existing cgroup ``base``.

        Leaves out a mount without limits (the v2 side of a hybrid) if it has no ``base``, or if this process may not
        enter that. Leaves out the blkio mount of v1 if ``base`` or a cgroup above has IO limits: processes below must
        stay in that cgroup, or its limits would not hold. Raises KernelError (ENOENT) if a mount with limits has no
        ``base``.
        """
        limiting = {self.mount_of(name) for name in self.controllers}
        kept = []
        holder = self.io_holder
        for mount in self.mounts:
            directory = mount.directory(base)
            if (found := v1.io_holder(mount, base)) is not None:
                holder = found
                continue
            if not files.is_directory(directory):
                if mount in limiting:
                    raise KernelError(f"there is no {directory}", errno=errno.ENOENT, path=directory)
                continue
            if mount.version == 2:
                if mount not in limiting and not _may_go(mount, base):
                    continue
                mount = mount._replace(controllers=v2.offered(directory))
            kept.append(mount)
        return Hierarchy.of(kept)._replace(io_holder=holder)

    def where(self, path: str) -> Hierarchy | None:
        """Return this hierarchy with only the mounts that have a cgroup ``path``; None if no mount has one.

        A v2 mount keeps the controllers of that cgroup. Raises KernelError.
        """
        kept = []
        for mount in self.mounts:
            directory = mount.directory(path)
            if mount.version == 1 and files.is_directory(directory):
                kept.append(mount)
            elif mount.version == 2:
                controllers = files.read_if_there(directory, "cgroup.controllers")
                if controllers is not None:
                    kept.append(mount._replace(controllers=frozenset(controllers.split())))
        return Hierarchy.of(kept) if kept else None

    @property
    def unified(self) -> Mount | None:
        """The v2 mount; None without one."""
        return next((mount for mount in self.mounts if mount.version == 2), None)

    @property
    def limit_mounts(self) -> list[Mount]:
        """The mounts in which limits are set."""
        found = {self.mount_of(name) for name in self.controllers}
        return [mount for mount in self.mounts if mount in found]

    def mount_of(self, controller: str) -> Mount | None:
        """Return the mount in which the limits of ``controller`` are set; None without that controller."""
        if controller not in self.controllers:
            return None
        for mount in self.mounts:
            if mount.version == 1 and v1.KERNEL_NAMES[controller] in mount.controllers:
                return mount
        return self.unified

    def cgroup(self, path: str, *, controllers: frozenset[str] | None = None, shared: bool = False) -> Cgroup:
        """Return the cgroup at ``path`` (``/a/b``, below the mounts), without making it. Raises ValueError."""
        wanted = self.controllers if controllers is None else controllers & self.controllers
        return Cgroup(check_path(path), self._branches, wanted, shared=shared)

    def _branches(self, path: str, controllers: frozenset[str], threaded: bool) -> list[Branch]:
        found: list[Branch] = []
        homes = [(name, self.mount_of(name)) for name in controllers]
        for mount in self.mounts:
            here = frozenset([name for name, home in homes if home == mount])
            if mount.version == 2:
                if threaded:
                    here &= v2.THREADED
                    if self.layout != "v2" and not here:
                        continue  # cgroup.kill and cgroup.freeze are not for threaded cgroups
                found.append(V2Branch(mount, path, here, threaded))
                continue
            if threaded:
                here &= v1.THREADED
            helps = ("cpu" in controllers and "cpuacct" in mount.controllers) or (
                not threaded and "freezer" in mount.controllers and self.unified is None
            )
            if here or helps:
                found.append(V1Branch(mount, path, here, threaded))
        return found

    def usable_memory(self) -> int:
        """Return the bytes of memory that this process can use: those of the machine, or of its container.

        This is the least of ``/proc/meminfo`` and the visible limits of its own cgroup and those above. Raises
        KernelError.
        """
        total = _installed_memory()
        mount = self.mount_of("memory")
        if mount is None:
            return total
        path = mounts.membership(mount, mounts.parse_membership(files.read_own("cgroup")))
        while path is not None:
            text = files.read_if_there(mount.directory(path), _MEMORY_LIMIT[mount.version])
            if text and text.strip() != "max":
                total = min(total, int(text))
            path = None if path == "/" else path.rpartition("/")[0] or "/"
        return total

    def swap_gap(self) -> Refusal | None:
        """Return why a limit of memory does not bound swap, and the remedy; None if it does, or there is no swap."""
        found = self.refusals(Resources(memory_max=2**40, swap_max=0))
        return next((one for one in found if one.limit == "swap_max"), None)

    def refusals(
        self, resources: Resources, *, threaded: bool = False, within: Resources | None = None
    ) -> list[Refusal]:
        """Return the limits that this machine cannot enforce, each with the reason and the remedy.

        ``threaded``: the limits are for a cgroup of threads. ``within`` are the limits of the cgroup above. Writes
        nothing.
        """
        values = {name: getattr(resources, name) for name in resources.written()}
        asked = [
            name for name, value in values.items() if name not in ("oom_group", "files") and value is not MAX
        ]
        if resources.swap_max == 0 and not swap.present() and not _needs_memory(self, resources):
            # Without swap on the machine, the limit holds already.
            asked.remove("swap_max")
        found = []
        for name in asked:
            refusal = _controller(self, controller_of(name), threaded)
            if refusal is None:
                refusal = _CHECKS[name](self, resources, within) if name in _CHECKS else None
            if refusal is not None:
                found.append(Refusal(name, *refusal))
        for name in resources.files:
            refusal = _file(self, name, threaded)
            if refusal is not None:
                found.append(Refusal(f"files.{name}", *refusal))
        return found


def _may_go(mount: Mount, base: str) -> bool:
    """Return whether this process may move itself below ``base`` of a v2 hierarchy.

    It must be allowed to write the cgroup that contains both. Source: cgroup-v2.rst, Delegation Containment.
    """
    own = mounts.membership(mount, mounts.parse_membership(files.read_own("cgroup")))
    if own is None:
        return False
    common = os.path.commonpath([own, base])
    return files.may_write(mount.directory(common), "cgroup.procs")


def _installed_memory() -> int:
    for line in files.read("/proc", "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    raise KernelError("/proc/meminfo does not say how much memory there is", path="/proc/meminfo")


# -- refusals: limits that this machine cannot enforce


def _file(hierarchy: Hierarchy, name: str, threaded: bool) -> tuple[str, str] | None:
    """Return why a file that no field of Resources sets cannot be written, and the remedy."""
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
            if controller in mounts.switched_off():
                return mounts.refusal_of_boot(controller)
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
                f"the IO limits of {hierarchy.io_holder} apply here, and cgroup v1 cannot nest IO limits",
                f"set IO limits only in {hierarchy.io_holder}, or boot with cgroup v2",
            )
        kernel_name = v1.KERNEL_NAMES[controller]
        if kernel_name in mounts.switched_off():
            return mounts.refusal_of_boot(kernel_name)
        if hierarchy.layout == "v2":
            reason = f"the {controller} controller is not available in this part of the cgroup tree"
            return (reason, _delegate(controller))
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
    directory = _directory_with(quota, mount.path)
    if directory is not None and files.read_if_there(directory, burst) is None:
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
        return (f"CPUs {format_list(missing)} do not exist or are not allowed", f"choose from {text}")
    return None


def _memory_high(
    hierarchy: Hierarchy, _resources: Resources, _within: Resources | None
) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("memory")
    if mount is not None and mount.version == 1:
        return ("cgroup v1 has no memory_high", "set a memory limit alone, or boot with cgroup v2")
    return None


def _needs_memory(hierarchy: Hierarchy, resources: Resources) -> bool:
    """Return whether the limit of swap cannot be set without one of memory, as on v1."""
    mount = hierarchy.mount_of("memory")
    return mount is not None and mount.version == 1 and resources.memory_max is None


def _swap(hierarchy: Hierarchy, resources: Resources, _within: Resources | None) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("memory")
    if mount is None:
        return None
    if _needs_memory(hierarchy, resources):
        return ("cgroup v1 limits swap only together with memory", "limit the memory as well")
    if mount.version == 1:
        if files.read_if_there(mount.path, "memory.memsw.limit_in_bytes") is None:
            return ("swap is not accounted for", "boot with swapaccount=1, or turn swap off")
        return None
    directory = _directory_with("memory.max", mount.path)
    if directory is not None and files.read_if_there(directory, "memory.swap.max") is None:
        return ("swap is not accounted for", "boot with swapaccount=1, or turn swap off")
    return None


def _directory_with(name: str, root: str) -> str | None:
    """Return ``root``, or the first directory in it, with a file ``name``. The root of v2 has no files of limits."""
    directories = [root, *(f"{root}/{child}" for child in files.subdirectories(root))]
    return next((directory for directory in directories if os.path.exists(f"{directory}/{name}")), None)


def _io(hierarchy: Hierarchy, resources: Resources, within: Resources | None) -> tuple[str, str] | None:
    mount = hierarchy.mount_of("io")
    if mount is not None and mount.version == 1 and within is not None and within.io:
        return (
            "cgroup v1 can limit IO either of a group as a whole or of each of its processes, not both",
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
