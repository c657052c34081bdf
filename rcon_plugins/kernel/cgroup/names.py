"""Names of cgroups: what may be one component of a path, and what may not."""

from __future__ import annotations

import re

#: A server's own tree: the pid and the start time of its owner. A second one of the same process has a number.
INSTANCE_NAME = re.compile(r"rcon-([1-9][0-9]{0,9})-([0-9]{1,20})(?:-[0-9]{1,4})?")

#: Of a file name, in bytes (NAME_MAX).
LONGEST_NAME = 255

_RESERVED = frozenset({"tasks", "notify_on_release", "release_agent"})
#: What the kernel's own files begin with; a later kernel may add files of these names.
_RESERVED_PREFIXES = (
    "cgroup.", "cpu.", "cpuacct.", "cpuset.", "memory.", "io.", "blkio.", "pids.", "freezer.", "devices.",
    "hugetlb.", "rdma.", "misc.",
)  # fmt: skip


def check_name(name: str) -> str:
    """``name``, if it can be the name of a cgroup; else ValueError, before any system call."""
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
    """``path`` of a cgroup below a mount: ``/`` or ``/a/b``, each component checked. ValueError."""
    if path == "/":
        return path
    if not path.startswith("/"):
        raise ValueError(f"the path of a cgroup begins with a slash: {path!r}")
    for name in path[1:].split("/"):
        # Others' cgroups may carry any name; only what leads elsewhere is refused here.
        if not name or name in (".", "..") or "\0" in name or "\n" in name:
            raise ValueError(f"not the path of a cgroup: {path!r}")
    return path
