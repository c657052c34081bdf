"""Notices of cgroup v1's memory controller: an eventfd that the kernel rings.

Source: Documentation/admin-guide/cgroup-v1/memory.rst, chapters 9 and 10.
"""

from __future__ import annotations

import errno
import os
import posix
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup


def open_notice(directory: str, name: str, argument: str = "") -> int:
    """A new eventfd, rung when what the file ``name`` is about happens, and by the removal of the cgroup. KernelError.

    It is not inherited by a program that is executed, and not waited for when it is read.
    """
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        about = files.open_file(directory, name)
        try:
            files.write(directory, "cgroup.event_control", f"{descriptor} {about} {argument}".strip())
        finally:
            posix.close(about)
    except BaseException:
        posix.close(descriptor)
        raise
    return descriptor


def rings_of(descriptor: int) -> int:
    """How often it was rung since the last call."""
    try:
        return os.eventfd_read(descriptor)
    except BlockingIOError:
        return 0


def notice_of_want(cgroup: Cgroup) -> int | None:
    """A notice, rung when the kernel looks for somebody to kill at the limit of this cgroup or one above it.

    None where the kernel has none, or memory is not in a v1 hierarchy: v2 counts in all cgroups above who was killed,
    v1 in that of the killed alone, which may be gone when somebody asks. Raises KernelError.
    """
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        if mount.version == 1 and "memory" in mount.controllers:
            try:
                return open_notice(directory, "memory.oom_control")
            except KernelError as error:
                if error.errno in (
                    errno.EOPNOTSUPP,
                    errno.ENOENT,
                ):  # a kernel for real time (since 5.18) has none
                    return None
                raise
    return None
