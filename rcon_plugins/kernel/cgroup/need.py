"""Tell the memory that a cgroup needs from the page cache that the kernel drops by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.meter import value_of

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup


class Need(NamedTuple):
    """The memory that a cgroup and all below it need, in bytes. ``shared``: tmpfs files, memfds, shared memory."""

    whole: int
    shared: int = 0


def need_of(cgroup: Cgroup, usage: int) -> Need:
    """Return what an existing cgroup needs of its ``usage``. See `need`. Raises KernelError."""
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        if "memory" in mount.controllers:
            return _read(directory, usage)
    return Need(usage)


def need(directory: str, usage: int) -> int:
    """Return ``usage`` without unmapped page cache (``memory.stat``), in bytes.

    Mapped files, such as programs and libraries, count: if dropped, they would only be read again.
    """
    return _read(directory, usage).whole


def _read(directory: str, usage: int) -> Need:
    data = (files.read_if_there(directory, "memory.stat") or "").encode()

    def count(*names: bytes) -> int:
        # v1 names file_mapped differently, and prefixes sums that include the cgroups below.
        values = (value_of(data, prefix + name) for prefix in (b"total_", b"") for name in names)
        return next((value for value in values if value is not None), 0)

    # Shared memory also counts as mapped, but is no page cache.
    shared = count(b"shmem")
    mapped = max(0, count(b"file_mapped", b"mapped_file") - shared)
    cache = count(b"active_file") + count(b"inactive_file")
    return Need(max(0, usage - max(0, cache - mapped)), shared)
