"""Read the limits of an existing cgroup, and change them while it is in use."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import v1, v2
from rcon_plugins.kernel.cgroup.resources import MAX, IoMax, Resources

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup
    from rcon_plugins.kernel.cgroup.mounts import Mount


def read_limits(cgroup: Cgroup) -> Resources:
    """Return the current limits of ``cgroup``. :data:`MAX` means no limit, ``None`` that the kernel has no such limit.

    The limits of the cgroups above may be tighter. ``cpus`` is None if the cgroup has the CPUs of the one above. Raises
    KernelError.
    """
    found: dict[str, Any] = {}
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        read = partial(files.read_if_there, directory)
        if mount.version == 2:
            found |= v2.limits_of(read)
        else:
            found |= v1.limits_of(read)
            above = files.read_if_there(os.path.dirname(directory), "cpuset.cpus")
            if "cpus" in found and found["cpus"] == above:
                del found["cpus"]  # a new v1 cpuset gets the CPUs of the one above
    return Resources(**found)


def change_limits(cgroup: Cgroup, wanted: Resources, *, gather: bool = False) -> None:
    """Write limits to a cgroup in use; fields that are ``None`` stay as they are. Raises KernelError.

    If one limit cannot be written, restore all the limits before.

    A limit may be below the current usage. Processes beyond ``pids_max`` stay, but no more can start. For
    ``memory_max`` the kernel first reclaims memory. Then it kills processes (v2) or refuses the limit (v1, EBUSY).

    ``gather`` is for the first IO limits of a cgroup on v1. IO limits there hold only for the processes of the cgroup
    itself, so this moves the processes of its leaves up into it, in the blkio hierarchy. Without ``gather`` such limits
    are refused. The blkio directories of the leaves are removed: do not use ``gather`` while their files are open.
    """
    before = read_limits(cgroup).replaced(files=_texts_of(cgroup, wanted.files))
    wanted = keep_swap(wanted, before)
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
        # Restore as many limits as possible; report the first error.
        with contextlib.suppress(KernelError):
            cgroup.configure(_undoing(cgroup, wanted, before))
        raise _explained(error) from None
    finally:
        for directory in io if gather and wanted.io else ():
            if not v1.io_is_limited(directory):
                # Without IO limits above, the leaves need their own blkio directories again.
                for name in leaves:
                    files.make_directory(f"{directory}/{name}")


def _is_flat(mount: Mount) -> bool:
    return mount.version == 1 and mount.controllers == {"blkio"}


def keep_swap(wanted: Resources, before: Resources) -> Resources:
    """Return ``wanted`` with the limit of swap that goes with its limit of memory, and the other way round.

    A new limit of memory keeps the swap that was allowed. Without a limit of memory there is none of swap. v1 limits
    the sum of both, so it needs both to write one.
    """
    if wanted.memory_max is None:
        return wanted if wanted.swap_max is None else wanted.replaced(memory_max=before.memory_max)
    if wanted.swap_max is not None or before.swap_max is None:
        return wanted
    if wanted.memory_max is MAX:
        return wanted.replaced(swap_max=MAX)
    if isinstance(before.memory_max, int) or isinstance(before.swap_max, int):
        return wanted.replaced(swap_max=before.swap_max)
    return wanted


def _undoing(cgroup: Cgroup, wanted: Resources, before: Resources) -> Resources:
    """Return the limits of ``before`` that writing ``wanted`` may have changed."""
    kept = {
        name: getattr(before, name) for name in wanted.written() if name not in ("io", "oom_group", "files")
    }
    if wanted.memory_max is not None:
        kept["swap_max"] = before.swap_max  # a limit of memory alone also limits swap
    if wanted.cpus is not None and before.cpus is None:
        kept["cpus"] = _cpus_above(cgroup)
    kept["io"] = {device: before.io.get(device, IoMax(MAX, MAX, MAX, MAX)) for device in wanted.io}
    return Resources(**kept, files=before.files)


def _texts_of(cgroup: Cgroup, names: Iterable[str]) -> dict[str, str]:
    """Return the texts of files that no field of Resources sets. Leaves out missing and empty files."""
    found = (
        (name, files.read_if_there(directory, name)) for directory in cgroup.directories for name in names
    )
    return {name: text for name, text in found if text}


def _cpus_above(cgroup: Cgroup) -> str | None:
    for directory in map(os.path.dirname, cgroup.directories):
        for name in ("cpuset.cpus.effective", "cpuset.cpus"):
            if text := files.read_if_there(directory, name):
                return text
    return None


def _explained(error: KernelError) -> KernelError:
    if error.errno == errno.EBUSY and str(error.path).endswith(("limit_in_bytes", "memory.max")):
        return KernelError(
            "more memory is in use, and the kernel could not reclaim it: all limits stay as they were",
            errno=errno.EBUSY,
            path=error.path,
            value=error.value,
            hint="end some of the processes first, or set a limit above the memory in use",
        )
    return error
