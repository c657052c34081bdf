"""Tell the memory that a cgroup needs from the page cache that the kernel drops by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.meter import value_of

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup


def need_of(cgroup: Cgroup, usage: int) -> int:
    """Return what `need` returns for an existing cgroup. Raises KernelError."""
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        if "memory" in mount.controllers:
            return need(directory, usage)
    return usage


def need(directory: str, usage: int) -> int:
    """Return ``usage`` without unmapped page cache (``memory.stat``), in bytes.

    Mapped files, such as programs and libraries, count: if dropped, they would only be read again.
    """
    data = (files.read_if_there(directory, "memory.stat") or "").encode()

    def count(*names: bytes) -> int:
        # v1 names file_mapped differently, and prefixes sums that include the cgroups below.
        values = (value_of(data, prefix + name) for prefix in (b"total_", b"") for name in names)
        return next((value for value in values if value is not None), 0)

    # Shared memory also counts as mapped, but is no page cache.
    mapped = max(0, count(b"file_mapped", b"mapped_file") - count(b"shmem"))
    cache = count(b"active_file") + count(b"inactive_file")
    return max(0, usage - max(0, cache - mapped))
