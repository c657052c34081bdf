"""Other limits for a cgroup that is in use: all of them, or none."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import v1
from rcon_plugins.kernel.cgroup.read_limits import read_limits
from rcon_plugins.kernel.cgroup.resources import MAX, IoMax, Resources

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup
    from rcon_plugins.kernel.cgroup.mounts import Mount


def change_limits(cgroup: Cgroup, wanted: Resources, *, gather: bool = False) -> None:
    """Write limits to a cgroup in use; what is ``None`` stays as it is.

    All are in force afterwards, or, if one cannot be written, those of before.

    A limit below what is in use: processes beyond ``pids_max`` stay, and no more can be started. Beyond
    ``memory_max`` the kernel takes back what it can; what does not fit then, it kills (v2), or it refuses the limit
    (v1, EBUSY).

    ``gather``: for first limits of IO on v1, which hold for the processes of the cgroup itself alone, those of its
    leaves are moved up into it, in that hierarchy; else such limits are refused. Not where somebody keeps the leaves'
    files of IO open: they go. Raises KernelError.
    """
    before = read_limits(cgroup)
    wanted = _with_swap(wanted, before)
    io = [
        directory
        for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True)
        if _is_flat(mount)
    ]
    leaves = cgroup.children()
    try:
        if gather and wanted.io:
            for directory in io:
                v1.gather_io(directory)
        cgroup.configure(wanted)
    except KernelError as error:
        # What cannot be put back either is the lesser evil: the first error is the one to tell.
        with contextlib.suppress(KernelError):
            cgroup.configure(_undoing(cgroup, wanted, before))
        raise _told_better(error) from None
    finally:
        for directory in io if gather and wanted.io else ():
            if not v1.io_is_limited(directory):
                # A leaf has its place in each hierarchy where nothing above it needs it.
                for name in leaves:
                    files.make_directory(f"{directory}/{name}")


def _is_flat(mount: Mount) -> bool:
    return mount.version == 1 and mount.controllers == {"blkio"}


def _with_swap(wanted: Resources, before: Resources) -> Resources:
    """v1 limits memory and swap together: more memory needs a larger sum, and swap alone a sum to be part of."""
    if wanted.memory_max is not None and wanted.swap_max is None and isinstance(before.swap_max, int):
        return wanted.replaced(swap_max=before.swap_max)
    if wanted.swap_max is not None and wanted.memory_max is None:
        return wanted.replaced(memory_max=before.memory_max)
    return wanted


def _undoing(cgroup: Cgroup, wanted: Resources, before: Resources) -> Resources:
    """Of ``before``, what ``wanted`` may have changed."""
    kept: dict[str, Any] = {
        name: getattr(before, name)
        for name in Resources._fields
        if name not in ("io", "oom_group") and getattr(wanted, name) is not None
    }
    if wanted.cpus is not None and before.cpus is None:
        kept["cpus"] = _cpus_above(cgroup)
    kept["io"] = {device: before.io.get(device, IoMax(MAX, MAX, MAX, MAX)) for device in wanted.io}
    return Resources(**kept)


def _cpus_above(cgroup: Cgroup) -> str | None:
    for directory in map(os.path.dirname, cgroup.directories):
        for name in ("cpuset.cpus.effective", "cpuset.cpus"):
            if text := files.read_if_there(directory, name):
                return text
    return None


def _told_better(error: KernelError) -> KernelError:
    if error.errno == errno.EBUSY and str(error.path).endswith(("limit_in_bytes", "memory.max")):
        return KernelError(
            "more memory is in use than that, and the kernel could not take it back: all limits stay as they were",
            errno=errno.EBUSY,
            path=error.path,
            value=error.value,
            hint="end some of the processes first, or set a limit above what is in use",
        )
    return error
