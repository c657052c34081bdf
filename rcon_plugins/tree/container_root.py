"""The root of a container's cgroup namespace: empty it, so that cgroups can be made in it.

On cgroup v2 a cgroup with processes passes no controllers on (cgroup-v2.rst, "No Internal Process Constraint"). In a
container with a shell all processes are in the root of its cgroup namespace. `empty` moves them into the leaf ``/init``
of that root, as the script ``dind`` of Docker does: their limits stay those of the container. It does so only where
nobody else can be in charge of these processes:

- The root is that of a cgroup namespace, and not of the machine.
- Each process in it can be seen from here, and is in the same cgroup namespace.
- No systemd manages it.

`would_move` tells beforehand, for commands that only look. Elsewhere `commands` returns the commands by which a person
does the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, proc
from rcon_plugins.kernel.cgroup import mounts

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy
    from rcon_plugins.kernel.cgroup.mounts import Mount

#: The leaf for the processes of the container. It stays as long as the container.
LEAF = "init"
REASON = "a cgroup with processes passes no controllers on"
#: What `empty` would do.
ANNOUNCEMENT = f"a start first moves the processes of this container to the cgroup /{LEAF}, because {REASON}"
#: The most rounds of moving processes that were forked meanwhile.
_ROUNDS = 20


def empty(hierarchy: Hierarchy) -> list[int]:
    """Move all processes out of the root into `LEAF`. Return them; none where that is not needed, or not safe.

    The calling process is among them. If one cannot be moved, move all back. Raises `KernelError`.
    """
    mount = _mount(hierarchy)
    if mount is None or not would_move(hierarchy):
        return []
    moved: list[int] = []
    leaf = mount.directory(f"/{LEAF}")
    is_new = files.make_directory(leaf)
    try:
        for _ in range(_ROUNDS):
            inside = _processes(mount)
            if not inside:
                return moved
            for pid in inside:
                with contextlib.suppress(ProcessLookupError):
                    _move(pid, leaf)
                    moved.append(pid)
        raise KernelError(
            "its processes fork faster than they can be moved", errno=errno.EBUSY, path=mount.path
        )
    except BaseException:
        for pid in moved:
            with contextlib.suppress(KernelError, ProcessLookupError):
                _move(pid, mount.path)
        if is_new:
            with contextlib.suppress(KernelError):
                files.remove_directory(leaf)
        raise


def would_move(hierarchy: Hierarchy) -> bool:
    """Return whether `empty` would move processes."""
    return is_busy(hierarchy) and why_not(hierarchy) is None


def is_busy(hierarchy: Hierarchy) -> bool:
    """Return whether processes in the root of a cgroup namespace keep it from passing controllers on."""
    mount = _mount(hierarchy)
    return mount is not None and bool(_processes(mount))


def why_not(hierarchy: Hierarchy) -> str | None:
    """Return why the processes of the root must not be moved; None if they may, or if there is nothing to move."""
    mount = _mount(hierarchy)
    if mount is None:
        return None
    if os.geteuid() != 0:
        return "only root may move them"
    if mounts.is_systemds():
        return "systemd manages them"
    inside = _processes(mount)
    if 0 in inside:
        return "some of them are in a PID namespace that cannot be seen from here"
    own = proc.cgroup_namespace(os.getpid())
    for pid in inside:
        # A process that ends meanwhile has no namespace, and leaves by itself.
        if (own is None or proc.cgroup_namespace(pid) != own) and proc.start_time(pid) is not None:
            return f"process {pid} is not known to be in the cgroup namespace of this process"
    return None


def commands(hierarchy: Hierarchy) -> list[str]:
    """Return the commands by which root empties the root of the cgroup namespace; none where there is no such root."""
    mount = _mount(hierarchy)
    if mount is None:
        return []
    root, passed = mount.path, sorted(hierarchy.controllers & mount.controllers)
    return [
        f"mkdir -p {root}/{LEAF}",
        f"xargs -rn1 < {root}/cgroup.procs > {root}/{LEAF}/cgroup.procs",  # fails for its own pid, which has ended
        f"echo '{' '.join(f'+{name}' for name in passed)}' > {root}/cgroup.subtree_control",
    ]


def _mount(hierarchy: Hierarchy) -> Mount | None:
    """Return the mount of pure v2 whose root is that of a cgroup namespace; None without one."""
    mount = hierarchy.unified
    if mount is None or hierarchy.layout != "v2" or mount.read_only or mount.root != "/":
        return None
    # The root of a cgroup namespace has this file; that of the machine does not.
    return mount if files.read_if_there(mount.path, "cgroup.type") == "domain" else None


def _processes(mount: Mount) -> list[int]:
    return [int(pid) for pid in files.read(mount.path, "cgroup.procs").split()]


def _move(pid: int, directory: str) -> None:
    """Move a process. Raises ProcessLookupError where it has ended, and `KernelError`."""
    try:
        files.write_patiently(directory, "cgroup.procs", str(pid))
    except KernelError as error:
        if error.errno == errno.ESRCH:
            raise ProcessLookupError(pid) from None
        raise
