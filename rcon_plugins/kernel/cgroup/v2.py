"""Cgroup version 2, with one directory per cgroup (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import contextlib
import errno
from typing import Any, Final

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.branch import Branch, create_levels, lower_burst
from rcon_plugins.kernel.cgroup.device import Device
from rcon_plugins.kernel.cgroup.resources import (
    CPU_PERIOD_MICROSECONDS,
    MAX,
    IoMax,
    LimitFile,
    Max,
    Read,
    Resources,
    cpus_of,
    in_microseconds,
    in_seconds,
    number_or_max,
    pairs_of,
    parse_list,
    read_back,
)

#: Controllers that work in threaded cgroups (cgroup-v2.rst, "Threads").
THREADED = frozenset({"cpu", "cpuset", "pids"})

#: The usual reason for a refused write.
_HINTS = {
    ("io.max", errno.ENODEV): "only whole disks that are present can be limited: see lsblk",
    ("cpu.max.burst", errno.EINVAL): "at most what the quota allows in one period",
    ("cpuset.cpus", errno.ERANGE): "this machine has no such CPU: see lscpu",
}


def _write_quota(cpus: float | Max) -> str:
    quota = cpus if cpus is MAX else round(cpus * CPU_PERIOD_MICROSECONDS)
    return f"{quota} {CPU_PERIOD_MICROSECONDS}"


def _read_quota(text: str) -> float | Max:
    quota, _, period = text.partition(" ")
    return MAX if quota == "max" else cpus_of(int(quota), int(period))


#: One row for each limit but ``io``, in the order of writing.
FILES = (
    LimitFile("cpu_quota", "cpu.max", _write_quota, _read_quota),
    LimitFile("cpu_burst", "cpu.max.burst", in_microseconds, in_seconds),  # kernel 5.14
    LimitFile("cpu_weight", "cpu.weight", str, int),
    LimitFile("cpus", "cpuset.cpus", str, str),
    # high before max: max alone kills processes that high would have throttled
    LimitFile("memory_high", "memory.high", str, number_or_max),
    LimitFile("memory_max", "memory.max", str, number_or_max),
    LimitFile("swap_max", "memory.swap.max", str, number_or_max),
    LimitFile("oom_group", "memory.oom.group", lambda _: "1", lambda text: text == "1"),  # kernel 4.19
    LimitFile("pids_max", "pids.max", str, number_or_max),
)


def pairs(resources: Resources) -> list[tuple[str, str]]:
    """Return the limits as (file, value), in the order of writing."""
    found = pairs_of(FILES, resources)
    for device, limits in sorted(resources.io.items()):
        keys = " ".join(f"{key}={value}" for key, value in limits._asdict().items() if value is not None)
        if keys:
            found.append(("io.max", f"{device} {keys}"))
    return found


def limits_of(read: Read) -> dict[str, Any]:
    """Return the fields of `Resources` whose files the directory has. The inverse of `pairs`."""
    found = read_back(FILES, read)
    if text := read("io.max"):
        found["io"] = _io_max(text)
    return found


def _io_max(text: str) -> dict[Device, IoMax]:
    found = {}
    for line in text.splitlines():
        device, *limits = line.split()
        named = dict(limit.split("=", 1) for limit in limits)
        found[Device.parse(device)] = IoMax(
            **{key: number_or_max(named.get(key, "max")) for key in IoMax._fields}
        )
    return found


#: The most cgroups below one that is delegated to the user of a command. Each takes memory of the kernel.
MOST_DESCENDANTS: Final = 1000


class V2Branch(Branch):
    """The directory of a cgroup in the v2 hierarchy. On hybrid hosts it usually has no controllers."""

    delegated_files = shut_files = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")

    def create(self) -> None:
        """Make the directory and those above it, and enable the controllers on the way down.

        Raises ControllerUnavailable if a controller is missing afterwards.
        """
        if not self.threaded and self.create_alone():
            return
        # Make all directories first: no process can remove one that has a child.
        for _, child in create_levels(self):
            files.make_directory(child)
        if self.threaded and files.read(self.directory, "cgroup.type") != "threaded":
            files.write(self.directory, "cgroup.type", "threaded")
        refusal: KernelError | None = None
        for parent, _ in create_levels(self):
            try:
                enable(parent, self.controllers)
            except KernelError as error:
                if error.errno in (errno.ENOENT, errno.ENODEV) and not files.is_directory(parent):
                    raise
                # Not allowed, or busy: report it only if the controller is missing below.
                refusal = error
        missing = self.controllers - offered(self.directory)
        if missing:
            raise ControllerUnavailable(
                f"{self.directory} has no {', '.join(sorted(missing))} controller"
                + (f" ({refusal.problem})" if refusal else ""),
                errno=(refusal.errno if refusal else None) or errno.ENOENT,
                path=f"{self.directory}/cgroup.controllers",
                hint="a cgroup above does not pass it on in cgroup.subtree_control; under systemd: "
                f"Delegate={' '.join(sorted(missing))}",
            )

    def complete(self) -> bool:
        """Return whether the cgroups above pass on all controllers of this branch."""
        return not self.controllers or self.controllers <= offered(self.directory)

    def delegate(self, uid: int, gid: int, *, shut: bool = False) -> None:
        """Delegate the directory. ``shut``: also bound how many cgroups that user makes below it.

        ``cgroup.max.descendants`` is there since Linux 4.14. Its owner stays root.
        """
        if shut and files.read_if_there(self.directory, "cgroup.max.descendants") == "max":
            files.write(self.directory, "cgroup.max.descendants", str(MOST_DESCENDANTS))
        super().delegate(uid, gid, shut=shut)

    def configure(self, resources: Resources) -> None:
        """Write the limits, and check that the kernel applies the cpuset."""
        for name, value in pairs(self._without_swap(resources)):
            if name.partition(".")[0] not in self.controllers:
                continue
            if name == "cpu.max":
                lower_burst(self.directory, "cpu.max.burst", value.partition(" ")[0])
            try:
                files.write(self.directory, name, value)
            except KernelError as error:
                error.hint = _HINTS.get((name, error.errno or 0), error.hint)
                raise
            if name == "cpuset.cpus":
                self._check_cpus(value)

    def _without_swap(self, resources: Resources) -> Resources:
        """Return the limits with no swap, if they limit memory alone. The file is missing if swap is not accounted."""
        alone = isinstance(resources.memory_max, int) and resources.swap_max is None
        if alone and "memory" in self.controllers and files.is_file(self.directory, "memory.swap.max"):
            return resources.replaced(swap_max=0)
        return resources

    def carries(self, controller: str) -> bool:
        """Return whether the hierarchy offers this controller, also one that this project does not use."""
        return controller in self.mount.controllers

    def write_file(self, name: str, value: str) -> None:
        """Write a file that no field of `Resources` sets.

        `create` enables only the controllers of this project. This first passes any other controller on, down to here.
        """
        controller = name.partition(".")[0]
        if controller not in self.controllers:
            for parent, _ in create_levels(self):
                enable(parent, frozenset({controller}))
        super().write_file(name, value)

    def _check_cpus(self, cpus: str) -> None:
        # The kernel accepts any list. If none of these CPUs is available, those of the parent stay in force.
        effective = files.read(self.directory, "cpuset.cpus.effective")
        if not parse_list(effective) <= parse_list(cpus):
            raise ControllerUnavailable(
                f"none of the CPUs {cpus} may be used in {self.directory}",
                path=f"{self.directory}/cpuset.cpus",
                value=cpus,
                hint=f"choose from {effective}",
            )

    @property
    def thread_file(self) -> str:
        """Return ``cgroup.threads`` (kernel 4.14)."""
        return "cgroup.threads"

    def enter_process(self, *, alone: bool) -> None:  # noqa: ARG002 - it makes no difference here
        """Write ``0`` to ``cgroup.procs``, which moves all threads of the calling process."""
        files.write_patiently(self.directory, "cgroup.procs", "0")

    def kill(self) -> bool:
        """Send SIGKILL to the whole subtree in one write. Return False before kernel 5.14."""
        try:
            files.write(self.directory, "cgroup.kill", "1")
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return True
            if error.errno != errno.ENOENT:
                raise
            return not self.exists()
        return True

    def freeze(self, frozen: bool) -> bool:
        """Freeze or thaw the subtree. Return False before kernel 5.2."""
        try:
            files.write(self.directory, "cgroup.freeze", "1" if frozen else "0")
        except KernelError as error:
            if error.errno == errno.ENOENT and self.exists():
                return False
            raise
        return True

    def is_frozen(self) -> bool:
        """Return whether all processes of the subtree are frozen."""
        return "frozen 1" in files.read(self.directory, "cgroup.events").splitlines()


def offered(directory: str) -> frozenset[str]:
    """Return the controllers that a cgroup has."""
    return frozenset(files.read(directory, "cgroup.controllers").split())


def enable(directory: str, controllers: frozenset[str]) -> None:
    """Enable for the children of ``directory`` those ``controllers`` that it has. Raises KernelError."""
    passed = frozenset(files.read(directory, "cgroup.subtree_control").split())
    missing = sorted((controllers & offered(directory)) - passed)
    if not missing:
        return
    try:
        files.write_patiently(directory, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))
    except KernelError as error:
        if len(missing) == 1 or error.errno != errno.EINVAL:
            raise
        # A controller that cannot be enabled (cpu, with realtime processes) must not prevent the others.
        for name in missing:
            with contextlib.suppress(KernelError):
                files.write_patiently(directory, "cgroup.subtree_control", f"+{name}")
        raise


def disable_all(directory: str) -> None:
    """Disable all controllers for the children, so that processes can enter ``directory`` again. Raises KernelError."""
    passed = files.read(directory, "cgroup.subtree_control").split()
    if passed:
        with contextlib.suppress(FileNotFoundError):
            files.write_patiently(
                directory, "cgroup.subtree_control", " ".join(f"-{name}" for name in passed)
            )
