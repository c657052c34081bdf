"""Represent the directory of one cgroup in one hierarchy, a branch. Check the names and paths of cgroups.

On v2 a cgroup has one branch. On v1 it has one in each hierarchy that it uses; on hybrid also one on the v2 side.
"""

from __future__ import annotations

import abc
import errno
import itertools
from collections.abc import Iterable

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.resources import Resources

#: The longest file name, in bytes (NAME_MAX).
LONGEST_NAME = 255

_RESERVED = frozenset({"tasks", "notify_on_release", "release_agent"})
#: Prefixes of the kernel's own files; a later kernel may add files with them.
_RESERVED_PREFIXES = (
    "cgroup.", "cpu.", "cpuacct.", "cpuset.", "memory.", "io.", "blkio.", "pids.", "freezer.", "devices.",
    "hugetlb.", "rdma.", "misc.",
)  # fmt: skip


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid name of a cgroup; else raise ValueError. Makes no system call."""
    if not name or name in (".", ".."):
        raise ValueError(f"not the name of a cgroup: {name!r}")
    if "/" in name or not name.isprintable():
        raise ValueError(f"the name of a cgroup has no slash and only printable characters: {name!r}")
    if len(name.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        raise ValueError(f"the name of a cgroup is at most {LONGEST_NAME} bytes: {name!r}")
    if name in _RESERVED or name.startswith(_RESERVED_PREFIXES):
        raise ValueError(f"the kernel has files of this name: {name!r}")
    return name


def check_path(path: str) -> str:
    """Return ``path`` if it is a valid path of a cgroup below a mount, ``/`` or ``/a/b``; else raise ValueError."""
    if path == "/":
        return path
    if not path.startswith("/"):
        raise ValueError(f"the path of a cgroup begins with a slash: {path!r}")
    for name in path[1:].split("/"):
        # Cgroups of other programs may have any name; refuse only names that lead elsewhere.
        if not name or name in (".", "..") or "\0" in name or "\n" in name:
            raise ValueError(f"not the path of a cgroup: {path!r}")
    return path


def levels(path: str) -> list[str]:
    """Return the path of each level down to ``path``: ``/a/b`` gives ``["/", "/a", "/a/b"]``."""
    found = ["/"]
    for name in path.strip("/").split("/"):
        if name:
            found.append(f"{found[-1].rstrip('/')}/{name}")
    return found


class Branch:
    """One directory of a cgroup, in one version of the interface.

    It is no `abc.ABC`, whose ``isinstance`` is a function of Python. A new process takes a hundred of them.
    """

    #: The files whose owner changes with that of the directory when a cgroup is delegated.
    delegated_files: tuple[str, ...] = ()
    #: The same for a delegation that keeps processes of other cgroups out.
    shut_files: tuple[str, ...] = ()

    def __init__(self, mount: Mount, path: str, controllers: frozenset[str], threaded: bool) -> None:
        self.mount = mount
        self.path = path
        #: The controllers (cpu, cpuset, memory, io, pids) whose limits are set in this branch.
        self.controllers = controllers
        self.threaded = threaded
        self.directory = mount.directory(path)

    @abc.abstractmethod
    def create(self) -> None:
        """Make the directory and those above it. Raises KernelError (ENOENT: another process removed one meanwhile)."""

    def create_alone(self) -> bool:
        """Make the directory, but none above it. Return whether processes can enter it now."""
        try:
            return files.make_directory(self.directory) and self.complete()
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return False

    @abc.abstractmethod
    def complete(self) -> bool:
        """Prepare the new directory. Return False if those above it must be prepared first."""

    @abc.abstractmethod
    def configure(self, resources: Resources) -> None:
        """Write the limits whose controllers are in this branch."""

    @abc.abstractmethod
    def carries(self, controller: str) -> bool:
        """Return whether the directory can have files of this controller, by the kernel's name."""

    def write_file(self, name: str, value: str) -> None:
        """Write a file that no field of `Resources` sets. Raises KernelError."""
        hint = f"this kernel, or this cgroup, has no {name}: see ls {self.directory}"
        try:
            files.write(self.directory, name, value)
        except KernelError as error:
            error.hint = hint if error.errno == errno.ENOENT else error.hint
            raise

    @abc.abstractmethod
    def enter_process(self, *, alone: bool) -> None:
        """Move the calling process here. ``alone``: it has a single thread."""

    @property
    @abc.abstractmethod
    def thread_file(self) -> str:
        """The name of the file to which a thread writes ``0`` to enter."""

    def entry_directory(self) -> str:
        """Return the directory that processes of this cgroup enter."""
        return self.directory

    def exists(self) -> bool:
        """Return whether the directory exists."""
        return files.is_directory(self.directory)

    def attach(self, pid: int) -> None:
        """Move a process with all its threads here. Takes milliseconds: do not use it on a hot path."""
        files.write(self.entry_directory(), "cgroup.procs", str(pid))

    def ids(self, name: str, *, subtree: bool = False) -> set[int]:
        """Return the numbers in the file ``name`` of this cgroup; with ``subtree`` also of all cgroups below it.

        0 stands for a process of a PID namespace that cannot be seen from here.
        """
        found: set[int] = set()
        for directory in files.subtree(self.directory) if subtree else [self.directory]:
            try:
                text = files.read_if_there(directory, name)
            except KernelError as error:
                # cgroup.procs of a threaded cgroup: only the domain lists its processes.
                if error.errno != errno.EOPNOTSUPP:
                    raise
                continue
            found.update(int(line) for line in (text or "").split())
        return found

    def has_processes(self) -> bool:
        """Return whether a process is in this cgroup or in one below it. A threaded one lists none."""
        for directory in files.subtree(self.directory):
            try:
                if not files.are_empty(directory, ("cgroup.procs",)):
                    return True
            except KernelError as error:
                if error.errno != errno.EOPNOTSUPP:  # a threaded one below
                    raise
        return False

    def remove(self) -> bool:
        """Remove the directory; return False if it is busy."""
        return files.remove_directory(self.directory)

    def delegate(self, uid: int, gid: int, *, shut: bool = False) -> None:
        """Give another user the directory and the files that move processes. ``shut``: see `Cgroup.delegate`."""
        files.change_owner(self.directory, None, uid, gid)
        for name in self.shut_files if shut else self.delegated_files:
            files.change_owner(self.directory, name, uid, gid)


def create_levels(branch: Branch) -> Iterable[tuple[str, str]]:
    """Return the (parent, child) directories on the way down to ``branch``."""
    directories = [branch.mount.directory(path) for path in levels(branch.path)]
    return itertools.pairwise(directories)


def lower_burst(directory: str, name: str, quota: str) -> None:
    """Lower the CPU burst to a new ``quota`` in microseconds: the kernel refuses a quota below the burst (EINVAL)."""
    if quota.isdigit() and int(files.read_if_there(directory, name) or 0) > int(quota):
        files.write(directory, name, quota)
