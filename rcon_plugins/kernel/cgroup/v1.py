"""Cgroup version 1, with one directory per cgroup in each hierarchy (Documentation/admin-guide/cgroup-v1/)."""

from __future__ import annotations

import errno
import os
import posix
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import descriptors, files
from rcon_plugins.kernel.cgroup import swap
from rcon_plugins.kernel.cgroup.branch import Branch, create_levels, levels, lower_burst
from rcon_plugins.kernel.cgroup.device import Device
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.resources import (
    CPU_PERIOD_MICROSECONDS,
    MAX,
    IoMax,
    LimitFile,
    Max,
    Read,
    Resources,
    cpus_of,
    format_list,
    in_microseconds,
    in_seconds,
    number_or_max,
    pairs_of,
    parse_list,
    read_back,
)

#: Controllers that act on a single thread. Memory is charged to the whole process.
THREADED = frozenset({"cpu", "cpuset", "io", "pids"})

#: The kernel's names of our controllers.
KERNEL_NAMES = {"cpu": "cpu", "cpuset": "cpuset", "memory": "memory", "io": "blkio", "pids": "pids"}

#: The one hierarchy in which a cgroup may have no directory: see `io_holder`.
_ONLY_IO = frozenset({"blkio"})
_UNLIMITED = "-1"
#: v1 reports memory without a limit as a number just below 2**63, by the size of a page.
_UNLIMITED_BYTES = 2**63 - 2**20
_CPUSET = ("cpuset.cpus", "cpuset.mems")
IO_FILES = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}


def shares_of(weight: int) -> int:
    """Convert a v2 weight to ``cpu.shares``, as the kernel does: 100 is 1024 (kernel/sched/core.c)."""
    return max(2, min(262_144, round(weight * 1024 / 100)))


def weight_of(shares: int) -> int:
    """Convert ``cpu.shares`` to a v2 weight. The inverse of `shares_of`."""
    return max(1, min(10_000, round(shares * 100 / 1024)))


def _write_bytes(value: int | Max) -> str:
    return str(value) if isinstance(value, int) else _UNLIMITED


def _read_bytes(text: str) -> int | Max:
    return MAX if int(text) >= _UNLIMITED_BYTES else int(text)


#: The buffers of TCP connections, which v1 does not count as memory of a cgroup. They get the same limit, beside it.
_TCP_LIMIT = "memory.kmem.tcp.limit_in_bytes"

#: One row for each limit with a single file, in the order of writing. Quota, swap and ``io`` need several files.
FILES = (
    LimitFile("cpu_burst", "cpu.cfs_burst_us", in_microseconds, in_seconds),  # kernel 5.14
    LimitFile(
        "cpu_weight", "cpu.shares", lambda weight: str(shares_of(weight)), lambda text: weight_of(int(text))
    ),
    LimitFile("cpus", "cpuset.cpus", str, str),
    LimitFile("memory_max", "memory.limit_in_bytes", _write_bytes, _read_bytes),
    LimitFile("pids_max", "pids.max", str, number_or_max),
)


def pairs(resources: Resources) -> list[tuple[str, str]]:
    """Return the limits as (file, value), in the order of writing when they are lowered.

    Leaves out ``oom_group``, which v1 lacks. ``swap_max`` becomes a limit on the sum of swap and ``memory_max``. Raises
    ControllerUnavailable for limits that v1 does not have.
    """
    if resources.memory_high is not None:
        raise ControllerUnavailable(
            "cgroup v1 has no memory_high", value=str(resources.memory_high), hint="set memory_max alone"
        )
    found: list[tuple[str, str]] = []
    if (quota := resources.cpu_quota) is not None:
        found.append(("cpu.cfs_period_us", str(CPU_PERIOD_MICROSECONDS)))
        value = _UNLIMITED if quota is MAX else str(round(quota * CPU_PERIOD_MICROSECONDS))
        found.append(("cpu.cfs_quota_us", value))
    found += pairs_of(FILES, resources)
    if resources.swap_max is not None:
        found.append(("memory.memsw.limit_in_bytes", _memory_and_swap(resources)))
    for device, limits in sorted(resources.io.items()):
        for key, rate in limits._asdict().items():
            if rate is not None:
                # 0 removes the rule.
                found.append((IO_FILES[key], f"{device} {rate if isinstance(rate, int) else 0}"))
    return found


def limits_of(read: Read) -> dict[str, Any]:
    """Return the fields of `Resources` whose files a directory of one hierarchy has. The inverse of `pairs`."""
    found = read_back(FILES, read)
    if (text := read("cpu.cfs_quota_us")) is not None:
        period = int(read("cpu.cfs_period_us") or CPU_PERIOD_MICROSECONDS)
        found["cpu_quota"] = MAX if int(text) < 0 else cpus_of(int(text), period)
    memory, both = read("memory.limit_in_bytes"), read("memory.memsw.limit_in_bytes")
    if memory is not None and both is not None:
        unlimited = MAX in (_read_bytes(memory), _read_bytes(both))
        found["swap_max"] = MAX if unlimited else max(0, int(both) - int(memory))
    if devices := _throttled({key: read(file) or "" for key, file in IO_FILES.items()}):
        found["io"] = devices
    return found


def _throttled(texts: Mapping[str, str]) -> dict[Device, IoMax]:
    found: dict[Device, IoMax] = {}
    for key, text in texts.items():
        for line in text.splitlines():
            name, value = line.split()
            device = Device.parse(name)
            known = found.get(device, IoMax(MAX, MAX, MAX, MAX))
            found[device] = known._replace(**{key: int(value)})
    return found


def _memory_and_swap(resources: Resources) -> str:
    memory, beside = resources.memory_max, resources.swap_max
    if not isinstance(beside, int):
        return _UNLIMITED
    if memory is None:
        raise ControllerUnavailable(
            "cgroup v1 limits swap only together with memory",
            value=str(beside),
            hint="limit the memory as well",
        )
    # Without a limit on memory there is no limit on the sum.
    return str(memory + beside) if isinstance(memory, int) else _UNLIMITED


class V1Branch(Branch):
    """The directory of a cgroup in one v1 hierarchy, which may carry several controllers (cpu,cpuacct)."""

    delegated_files = ("tasks", "cgroup.procs")

    def carries(self, controller: str) -> bool:
        """Return whether this hierarchy carries a controller, by the kernel's name."""
        return controller in self.mount.controllers

    def create(self) -> None:
        """Make the directory and those above it, ready for processes to enter."""
        if self._io_holder is not None:
            # A directory made before the cgroup above got its limits is still empty.
            files.remove_directory(self.directory)
            return
        if self.create_alone():
            return
        for parent, child in create_levels(self):
            if files.make_directory(child) and self.carries("memory"):
                _account_hierarchically(child)
            if self.carries("cpuset"):
                _inherit_cpuset(parent, child)

    def complete(self) -> bool:
        """Account the memory in the cgroups above, too, and copy the cpuset of the one above.

        Return False if that cpuset is empty.
        """
        if self.carries("memory") and not _all_account_hierarchically(self.mount.path):
            _account_hierarchically(self.directory)
        return not self.carries("cpuset") or _pass_cpuset_on(self.directory)

    @property
    def _io_holder(self) -> str | None:
        """The directory above with IO limits; None without any. Processes must enter it for the limits to hold."""
        return io_holder(self.mount, os.path.dirname(self.path))

    def entry_directory(self) -> str:
        """Return the directory that processes enter: that of a cgroup above, if its IO limits must hold."""
        if self.mount.controllers != _ONLY_IO or super().exists():
            return self.directory
        return self._io_holder or self.directory

    def exists(self) -> bool:
        """Return whether the directory exists, or is not needed."""
        return super().exists() or self._io_holder is not None

    def delegate(self, uid: int, gid: int, *, shut: bool = False) -> None:
        """Delegate the directory, unless it has IO limits: these would not hold in cgroups below."""
        if not (self.mount.controllers == {"blkio"} and io_is_limited(self.entry_directory())):
            super().delegate(uid, gid, shut=shut)

    @property
    def thread_file(self) -> str:
        """Return ``tasks``."""
        return "tasks"

    def enter_process(self, *, alone: bool) -> None:
        """Write ``0`` to ``tasks``, which is cheap; with several threads to ``cgroup.procs``."""
        name = self.thread_file if alone else "cgroup.procs"
        try:
            files.write(self.directory, name, "0")
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            files.write(self.entry_directory(), name, "0")

    def freeze(self, frozen: bool) -> bool:
        """Freeze or thaw the subtree (cgroup-v1/freezer-subsystem.rst). Return True."""
        files.write(self.directory, "freezer.state", "FROZEN" if frozen else "THAWED")
        return True

    def is_frozen(self) -> bool:
        """Return whether the whole subtree is frozen."""
        return files.read(self.directory, "freezer.state") == "FROZEN"

    def configure(self, resources: Resources) -> None:
        """Write the limits in an order that the kernel accepts."""
        wanted = [
            (name, value) for name, value in pairs(self._without_swap(resources)) if self._carries(name)
        ]
        names = [name for name, _ in wanted]
        if "memory.memsw.limit_in_bytes" in names and not self._order_memory(wanted):
            wanted = [pair for pair in wanted if pair[0] != "memory.memsw.limit_in_bytes"]
        if any(name.startswith("blkio.") for name in names):
            self._check_io()
        for name, value in wanted:
            if name == "cpuset.cpus":
                _set_cpus(self.directory, value)
            elif name == "cpu.cfs_quota_us":
                _set_quota(self.directory, int(value))
            elif name == "memory.limit_in_bytes":
                _limit_memory(self.directory, value)
            else:
                files.write(self.directory, name, value)
        if self.mount.controllers == _ONLY_IO:
            self._keep_in_limits()

    def _keep_in_limits(self) -> None:
        """See to it that IO limits hold for all that is below, also those that another process wrote just now."""
        if (self._is_of_another() or not files.is_childless(self.directory)) and io_is_limited(
            self.directory
        ):
            self._take_back()
            self._take_children_in()

    def _without_swap(self, resources: Resources) -> Resources:
        """Return the limits with no swap, if they limit memory alone and this machine has swap that is accounted.

        Also if memory and swap are limited together already: that limit must not be below the one of memory.
        """
        alone = isinstance(resources.memory_max, int) and resources.swap_max is None
        if not alone or not self._carries("memory.limit_in_bytes"):
            return resources
        both = files.read_if_there(self.directory, "memory.memsw.limit_in_bytes")
        if both is None or (_read_bytes(both) is MAX and not swap.present()):
            return resources
        return resources.replaced(swap_max=0)

    def _carries(self, name: str) -> bool:
        controller = name.partition(".")[0]
        return self.carries(controller) and any(KERNEL_NAMES[ours] == controller for ours in self.controllers)

    def _order_memory(self, wanted: list[tuple[str, str]]) -> bool:
        """Move the limit on memory and swap to the front if it is raised. Return False if it need not be written."""
        current = files.read_if_there(self.directory, "memory.memsw.limit_in_bytes")
        if current is None:
            if not swap.present():
                # There is no swap accounting, but no swap either.
                return False
            raise ControllerUnavailable(
                "swap is not accounted for",
                path=f"{self.directory}/memory.memsw.limit_in_bytes",
                hint="boot with swapaccount=1, or turn swap off",
            )
        index = next(i for i, (name, _) in enumerate(wanted) if name == "memory.memsw.limit_in_bytes")
        target = int(wanted[index][1])
        if target < 0 or target >= int(current):
            wanted.insert(0, wanted.pop(index))
        return True

    def _check_io(self) -> None:
        if not super().exists():
            raise ControllerUnavailable(
                f"the IO of {self.path} is limited by the cgroup above",
                path=self.directory,
                hint="cgroup v1 can limit IO either of a group as a whole or of each of its processes: set one of them",
            )

    def _is_of_another(self) -> bool:
        return files.owner_of(self.directory) not in (None, os.geteuid())

    def _take_back(self) -> None:
        """Take the ownership of a delegated cgroup back, so that its user makes no cgroups in it; see `delegate`."""
        if self._is_of_another():
            files.change_owner(self.directory, None, os.geteuid(), os.getegid())

    def _take_children_in(self) -> None:
        """Remove the directories of children, whose IO would not count here (see `io_holder`).

        A child has a directory if it was made before this cgroup got its limits. Raises KernelError (EBUSY).
        """
        for name in files.subdirectories(self.directory):
            child = f"{self.directory}/{name}"
            if not files.remove_directory(child):
                raise KernelError(
                    f"the IO limits of {self.path} would not hold for the processes in {child}",
                    errno=errno.EBUSY,
                    path=child,
                    hint="cgroup v1 does not count the IO of child cgroups: set the limits before they run",
                )


def io_holder(mount: Mount, path: str) -> str | None:
    """Return the directory of ``path``, or of the nearest cgroup above it, that has IO limits; None without any.

    On v1 a throttled cgroup does not count the IO of its child cgroups, because blk-throttle is flat there
    (cgroup-v1/blkio-controller.rst, "Hierarchical Cgroups"). So no cgroup below it may have a directory.
    """
    if mount.controllers != _ONLY_IO:
        return None
    for level in levels(path)[:0:-1]:
        directory = mount.directory(level)
        if io_is_limited(directory):
            return directory
    return None


def io_is_limited(directory: str) -> bool:
    """Return whether a blkio cgroup has a throttling rule."""
    return not files.are_empty(directory, IO_FILES.values())


def gather_io(directory: str, seconds: float = 2.0) -> None:
    """Move the processes in the child cgroups of a blkio cgroup up into it, where its limits hold (see `io_holder`).

    Processes further down stay there. Gives up after ``seconds``. Each process takes milliseconds. Raises KernelError.
    """
    deadline = time.monotonic() + seconds
    children = [f"{directory}/{name}" for name in files.subdirectories(directory)]
    for child in children:
        if files.subdirectories(child):
            continue
        # Processes forked meanwhile start in the child; the next round finds them.
        while pids := (files.read_if_there(child, "cgroup.procs") or "").split():
            for pid in pids:
                try:
                    files.write(directory, "cgroup.procs", pid)
                except KernelError as error:
                    if error.errno != errno.ESRCH:
                        raise
            if time.monotonic() >= deadline:
                return


@cache
def _all_account_hierarchically(root: str) -> bool:
    """Return whether the root of a hierarchy accounts so: all cgroups below it inherit that, and cannot change it."""
    return files.read_if_there(root, "memory.use_hierarchy") == "1"


def _account_hierarchically(directory: str) -> None:
    # Without use_hierarchy (the default before 5.11) the limit of a cgroup does not hold for cgroups below it.
    if files.read_if_there(directory, "memory.use_hierarchy") == "0":
        files.write(directory, "memory.use_hierarchy", "1")


def _inherit_cpuset(parent: str, child: str) -> None:
    # A new v1 cpuset is empty, and no process can enter an empty one (cgroup-v1/cpusets.rst).
    for name in _CPUSET:
        if not files.read(child, name):
            files.write(child, name, files.read(parent, name))


def _pass_cpuset_on(directory: str) -> bool:
    """Copy the cpuset of the cgroup above to a new one. Return False if it is empty."""
    above = files.read_those_there(os.path.dirname(directory), _CPUSET)
    if not all(above.get(name) for name in _CPUSET):
        return False
    with files.Directory(directory) as opened:
        for name, value in above.items():
            opened.write(name, value)
    return True


def _limit_memory(directory: str, value: str) -> None:
    with files.Directory(directory) as opened:
        opened.write("memory.limit_in_bytes", value)
        if opened.has(_TCP_LIMIT):
            opened.write(_TCP_LIMIT, value)


def _set_quota(directory: str, quota: int) -> None:
    """Write a CPU quota. On v1 it may not exceed the quota of a cgroup above (EINVAL)."""
    lower_burst(directory, "cpu.cfs_burst_us", str(quota))
    try:
        return files.write(directory, "cpu.cfs_quota_us", str(quota))
    except KernelError as error:
        if error.errno != errno.EINVAL or quota < 0:
            raise
    # The quota exceeds that of a cgroup above, which is the tighter limit in any case.
    above = _quota_around(directory)
    if 0 <= above < quota:
        return files.write(directory, "cpu.cfs_quota_us", str(above))
    # The quota is below that of a child: lower the children first.
    for name in files.subdirectories(directory):
        child = f"{directory}/{name}"
        if _quota_of(child) > quota:
            _set_quota(child, quota)
    return files.write(directory, "cpu.cfs_quota_us", str(quota))


def _quota_around(directory: str) -> int:
    """Return the quota of the nearest cgroup above that has one; a negative number if none has."""
    above = os.path.dirname(directory)
    while (quota := files.read_if_there(above, "cpu.cfs_quota_us")) is not None:
        if int(quota) >= 0:
            return int(quota)
        above = os.path.dirname(above)
    return int(_UNLIMITED)


def _quota_of(directory: str) -> int:
    return int(files.read_if_there(directory, "cpu.cfs_quota_us") or _UNLIMITED)


def _set_cpus(directory: str, cpus: str) -> None:
    """Write a cpuset, after removing the CPUs beyond it from the children.

    A child that keeps some CPUs gets no new ones: its cpuset may be deliberate.
    """
    old = parse_cpus(files.read(directory, "cpuset.cpus"))
    new = parse_list(cpus)
    if old == new:
        return
    children = [f"{directory}/{name}" for name in files.subdirectories(directory)]
    had = {child: parse_cpus(files.read_if_there(child, "cpuset.cpus") or "") for child in children}
    # The kernel requires each set to be within that of its parent. A child without any CPU left gets all of them.
    if not all(before <= new for before in had.values()):
        _write_cpus(directory, old | new)
    for child, before in had.items():
        if not before <= new:
            _set_cpus(child, format_list(before & new or new))
    _write_cpus(directory, new)


def _write_cpus(directory: str, cpus: frozenset[int]) -> None:
    files.write(
        directory,
        "cpuset.cpus",
        format_list(cpus),
        hint="some of these CPUs do not exist, or are not allowed in the cgroup above",
    )


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a cpuset file, which may be empty."""
    return parse_list(text) if text.strip() else frozenset()


def open_notice(directory: str, name: str, argument: str = "") -> int:
    """Return a new eventfd that the kernel signals at an event of the file ``name``, or when the cgroup is removed.

    execve(2) closes it, and reading it does not block. Raises KernelError.
    """
    descriptor = descriptors.event_counter()
    try:
        add_notice(directory, name, descriptor, argument)
    except BaseException:
        posix.close(descriptor)
        raise
    return descriptor


def add_notice(directory: str, name: str, descriptor: int, argument: str = "") -> None:
    """Have the kernel signal an eventfd at an event of the file ``name``, and when the cgroup is removed.

    One eventfd may serve several cgroups. Raises KernelError. Source: memory.rst, chapters 9 and 10.
    """
    with files.Directory(directory) as opened:
        about = opened.open(name, os.O_RDONLY)
        try:
            opened.write("cgroup.event_control", f"{descriptor} {about} {argument}".strip())
        finally:
            posix.close(about)


def count_notices(descriptor: int) -> int:
    """Return how often the kernel signalled an eventfd since the last call."""
    try:
        return os.eventfd_read(descriptor)
    except BlockingIOError:
        return 0
