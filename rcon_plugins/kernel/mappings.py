"""Files that a process has mapped shared: find them, and make the mappings private. Source: mmap(2), proc(5)."""

from __future__ import annotations

import contextlib
import os
import posix  # gevent replaces `os.close`
import re
import stat
from pathlib import Path
from typing import NamedTuple

from rcon_plugins.kernel.syscalls import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    map_memory,
    read_memory,
    write_memory,
)

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])s ([0-9a-f]+) (\S+) (\d+) +(/.*)")
#: Shared memory without a file: mmap(2) with MAP_ANONYMOUS, shmget(2).
_NO_FILES = ("/dev/zero", "/anon_hugepage", "/SYSV")


class SharedMapping(NamedTuple):
    """A file that is mapped shared and may be written through the mapping. ``device`` is ``major:minor``, in hex."""

    start: int
    length: int
    protection: int
    offset: int
    path: str
    device: str
    inode: int


def shared_mappings() -> list[SharedMapping]:
    """Return the writable, shared mappings of regular files of this process. Leaves no file open."""
    found: list[SharedMapping] = []
    header: re.Match[str] | None = None
    for line in Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines():
        if line.startswith("VmFlags:"):
            if header is not None and " mw " in f"{line} ":
                found += _of(header)
            header = None
        else:
            header = _HEADER.fullmatch(line) or header
    return found


def make_private(mapping: SharedMapping) -> None:
    """Replace a mapping of this process by a private one with the same content. Raises `KernelError`.

    What is written there then stays in this process.
    """
    start, length = mapping.start, mapping.length
    descriptor = _open(mapping)
    if descriptor is not None:
        try:
            map_memory(start, length, mapping.protection, MAP_PRIVATE | MAP_FIXED, descriptor, mapping.offset)
        finally:
            posix.close(descriptor)
        return
    content = read_memory(start, length)
    map_memory(start, length, 3, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0)
    write_memory(start, content)


def _of(header: re.Match[str]) -> list[SharedMapping]:
    start, end, *allowed, offset, device, inode, path = header.groups()
    if path.startswith(_NO_FILES):
        return []
    protection = sum(1 << bit for bit, letter in enumerate(allowed) if letter != "-")
    first = int(start, 16)
    length = int(end, 16) - first
    mapping = SharedMapping(first, length, protection, int(offset, 16), path, device, int(inode))
    descriptor = _open(mapping)
    if descriptor is None:
        return [mapping]
    try:
        return [mapping] if stat.S_ISREG(os.fstat(descriptor).st_mode) else []
    finally:
        posix.close(descriptor)


def _open(mapping: SharedMapping) -> int | None:
    """Open a mapped file to read it. Without CAP_SYS_ADMIN only by its path, if that still leads to it."""
    link = f"/proc/self/map_files/{mapping.start:x}-{mapping.start + mapping.length:x}"
    for name in (link, mapping.path):
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            is_it = False
            try:
                found = os.fstat(descriptor)
                its_device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
                is_it = name == link or (its_device, found.st_ino) == (mapping.device, mapping.inode)
            finally:
                if not is_it:
                    posix.close(descriptor)
            if is_it:
                return descriptor
    return None
