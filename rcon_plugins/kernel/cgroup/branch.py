"""A branch: the directory of one cgroup in one hierarchy. Also the names and paths that a cgroup can have.

On v2 a cgroup has one branch. On v1 it has one in each hierarchy that it uses, on hybrid also one on the v2 side.
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

#: Of a file name, in bytes (NAME_MAX).
LONGEST_NAME = 255

_RESERVED = frozenset({"tasks", "notify_on_release", "release_agent"})
#: What the kernel's own files begin with; a later kernel may add files of these names.
_RESERVED_PREFIXES = (
    "cgroup.", "cpu.", "cpuacct.", "cpuset.", "memory.", "io.", "blkio.", "pids.", "freezer.", "devices.",
    "hugetlb.", "rdma.", "misc.",
)  # fmt: skip


def check_name(name: str) -> str:
    """Return ``name`` if it can be the name of a cgroup; else raise ValueError, before any system call."""
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
    """Return ``path`` if it can be the path of a cgroup below a mount, ``/`` or ``/a/b``; else raise ValueError."""
    if path == "/":
        return path
    if not path.startswith("/"):
        raise ValueError(f"the path of a cgroup begins with a slash: {path!r}")
    for name in path[1:].split("/"):
        # Cgroups of other programs may have any name; refuse only what leads elsewhere.
        if not name or name in (".", "..") or "\0" in name or "\n" in name:
            raise ValueError(f"not the path of a cgroup: {path!r}")
    return path


def levels(path: str) -> list[str]:
    """``/a/b`` gives ``["/", "/a", "/a/b"]``."""
    found = ["/"]
    for name in path.strip("/").split("/"):
        if name:
            found.append(f"{found[-1].rstrip('/')}/{name}")
    return found


class Branch(abc.ABC):
    """One directory of a cgroup, in one version of the interface."""

    #: The files that change hands with the directory when a cgroup is delegated.
    delegated_files: tuple[str, ...] = ()
    #: Those of them that do not let processes of other cgroups in.
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
        """Make the directory and those above it. Raises KernelError, ENOENT: another process removed one meanwhile."""

    def create_alone(self) -> bool:
        """Make the directory, and none above it; return whether processes can enter it now."""
        try:
            return files.make_directory(self.directory) and self.complete()
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return False

    @abc.abstractmethod
    def complete(self) -> bool:
        """Prepare the new directory; return False if those above it must be prepared first."""

    @abc.abstractmethod
    def configure(self, resources: Resources) -> None:
        """Write the limits whose controllers are in this branch."""

    @abc.abstractmethod
    def carries(self, controller: str) -> bool:
        """Whether files of this controller, by the kernel's name, can be here."""

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
        """Move the calling process in. ``alone``: it has a single thread."""

    @property
    @abc.abstractmethod
    def thread_file(self) -> str:
        """The name of the file to which a thread writes ``0``."""

    def entry_directory(self) -> str:
        """Return the directory that processes of this cgroup enter."""
        return self.directory

    def exists(self) -> bool:
        """Return whether the directory exists."""
        return files.is_directory(self.directory)

    def attach(self, pid: int) -> None:
        """Move a process with all its threads here. Takes milliseconds: never on a hot path."""
        files.write(self.entry_directory(), "cgroup.procs", str(pid))

    def ids(self, name: str, *, subtree: bool = False) -> set[int]:
        """Return the numbers in the file ``name`` of this cgroup, or also of all below it.

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

    def remove(self) -> bool:
        """Remove the directory; return False if it is busy."""
        return files.remove_directory(self.directory)

    def delegate(self, uid: int, gid: int, *, shut: bool = False) -> None:
        """Give the directory, and the files that processes are moved with, to another user."""
        files.change_owner(self.directory, None, uid, gid)
        for name in self.shut_files if shut else self.delegated_files:
            files.change_owner(self.directory, name, uid, gid)


def create_levels(branch: Branch) -> Iterable[tuple[str, str]]:
    """Return the (parent, child) directories on the way down to ``branch``."""
    directories = [branch.mount.directory(path) for path in levels(branch.path)]
    return itertools.pairwise(directories)


def lower_burst(directory: str, name: str, quota: str) -> None:
    """Make a CPU burst in force fit under a new quota, in microseconds, or the kernel would refuse that (EINVAL)."""
    if quota.isdigit() and int(files.read_if_there(directory, name) or 0) > int(quota):
        files.write(directory, name, quota)
