"""The cgroup file systems of this machine: v2, v1 or hybrid, behind one interface."""

from __future__ import annotations

import errno
import os
from typing import Literal, NamedTuple

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts, v1, v2
from rcon_plugins.kernel.cgroup.branch import Branch, check_path
from rcon_plugins.kernel.cgroup.cgroup import Cgroup
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.refusals import Refusal, refusals
from rcon_plugins.kernel.cgroup.resources import CONTROLLERS, Resources
from rcon_plugins.kernel.cgroup.v1 import V1Branch
from rcon_plugins.kernel.cgroup.v2 import V2Branch

Layout = Literal["v2", "v1", "hybrid"]

#: The file of the memory limit, by version.
_MEMORY_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}


class Hierarchy(NamedTuple):
    """What is mounted, and which limits can be set with it. Immutable; survives ``fork``."""

    layout: Layout
    controllers: frozenset[str]
    mounts: tuple[Mount, ...]
    #: The directory of v1 whose IO limits hold for all that is made here, and keep it from having its own.
    io_holder: str | None = None

    @classmethod
    def discover(cls) -> Hierarchy:
        """Return the hierarchies in ``/proc/self/mountinfo``.

        ``controllers`` are those at the root of the tree. A cgroup below it may have fewer: see :meth:`narrowed`.
        Raises ControllerUnavailable if no cgroup file system is mounted.
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
        """The hierarchy made of these mounts. Raises ControllerUnavailable for none."""
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
        """The same with the controllers that the existing cgroup ``base`` has.

        A hierarchy without limits (the v2 side of a hybrid) is left out where ``base`` is not there, or this
        process may not go there; that of v1's IO where ``base`` has IO limits: what is below stays in that
        cgroup, or they would not hold.
        Raises KernelError (ENOENT) where it is not in one with limits.
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
        """The same with the mounts that have a cgroup ``path``, each with what it has there; None where none has.

        Raises KernelError.
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
        """The v2 mount, where there is one."""
        return next((mount for mount in self.mounts if mount.version == 2), None)

    @property
    def limit_mounts(self) -> list[Mount]:
        """The mounts in which limits are set."""
        found = {self.mount_of(name) for name in self.controllers}
        return [mount for mount in self.mounts if mount in found]

    def mount_of(self, controller: str) -> Mount | None:
        """The mount in which the limits of ``controller`` are set."""
        if controller not in self.controllers:
            return None
        for mount in self.mounts:
            if mount.version == 1 and v1.KERNEL_NAMES[controller] in mount.controllers:
                return mount
        return self.unified

    def cgroup(self, path: str, *, controllers: frozenset[str] | None = None, shared: bool = False) -> Cgroup:
        """The cgroup at ``path`` (``/a/b``, below the mounts); nothing is made. Raises ValueError."""
        wanted = self.controllers if controllers is None else controllers & self.controllers
        return Cgroup(check_path(path), self._branches, wanted, shared=shared)

    def _branches(self, path: str, controllers: frozenset[str], threaded: bool) -> list[Branch]:
        found: list[Branch] = []
        for mount in self.mounts:
            here = frozenset(name for name in controllers if self.mount_of(name) == mount)
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
        """Return the bytes of memory that this process can have: those of the machine, or of its container.

        This is the least of ``/proc/meminfo`` and the visible limits of its own cgroup and those around it. Raises
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

    def refusals(
        self, resources: Resources, *, threaded: bool = False, within: Resources | None = None
    ) -> list[Refusal]:
        """Which of these limits this machine cannot enforce, why, and what would help.

        ``threaded`` asks for a cgroup of threads; ``within`` are the limits of the cgroup around it.
        Nothing is written.
        """
        return refusals(self, resources, threaded=threaded, within=within)


def _may_go(mount: Mount, base: str) -> bool:
    """Whether this process may move itself below ``base`` of a v2 hierarchy: it has to be allowed to write the cgroup
    around both. Source: cgroup-v2.rst, Delegation Containment.
    """
    own = mounts.membership(mount, mounts.parse_membership(files.read_own("cgroup")))
    if own is None:
        return False
    common = os.path.commonpath([own, base])
    return os.access(f"{mount.directory(common)}/cgroup.procs", os.W_OK)


def _installed_memory() -> int:
    for line in files.read("/proc", "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    raise KernelError("/proc/meminfo does not say how much memory there is", path="/proc/meminfo")
