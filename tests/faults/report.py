"""What a process or thread says of its own confinement: from the kernel's files, and by trying.

`rcon run` starts this module as a program of its own (`PROGRAM`), so it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
from pathlib import Path
from typing import Any

_ID = re.compile(r"(?<=~~)[0-9a-f]+|(?<=/map_files/)[0-9a-f]+-[0-9a-f]+|\d+")
#: The base of a worker, or a folder of a scenario.
_OWN = re.compile(r"rcon-faults-\w+")
_LIMIT_FILES = (
    "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes",
    "pids.max", "cpuset.cpus", "cpu.max", "cpu.weight", "memory.max", "memory.high", "memory.swap.max",
    "memory.oom.group",
)  # fmt: skip
_HOST_NAMESPACES = {name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "ipc")}
_STATUS = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapInh", "CapPrm", "CapEff", "CapBnd",
           "CapAmb")  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def report() -> dict[str, Any]:
    """Return how the calling thread is confined, as the kernel says."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/thread-self/status").read_text().splitlines()
        if ":" in line
    )
    cgroups, limits, ways = {}, {}, {}
    for line in Path("/proc/thread-self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        cgroups[controllers] = simplify(path)
        mount = f"/sys/fs/cgroup/{controllers.replace('name=', '')}" if controllers else _unified()
        for level in (path, str(Path(path).parent)):
            for name in _LIMIT_FILES:
                with contextlib.suppress(OSError):
                    limits[simplify(f"{controllers} {level}/{name}")] = Path(
                        f"{mount}{level}/{name}"
                    ).read_text()
        for name in ("cgroup.procs", "memory.limit_in_bytes", "memory.max", "pids.max"):
            ways[f"{controllers}: {name}"] = _opens(f"{mount}{path}/{name}")
    parent_signal = ctypes.c_int(-1)
    _libc.prctl(2, ctypes.byref(parent_signal), 0, 0, 0)
    return {
        **{name: status.get(name, "").split() for name in _STATUS},
        "cgroups": cgroups,
        "limits": limits,
        "ways": ways,
        "umask": status.get("Umask", "").strip(),
        "namespaces": {
            name: str(Path(f"/proc/thread-self/ns/{name}").readlink()) != own
            for name, own in _HOST_NAMESPACES.items()
        },
        "clone3": _clone3(),
        "parent_signal": parent_signal.value,
        "nofile": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
        "core": list(resource.getrlimit(resource.RLIMIT_CORE)),
    }


def report_of_process() -> dict[str, Any]:
    """Return the same of a process of its own, with what it has open."""
    return {**report(), "open": open_kinds(), "leads": os.getsid(0) == os.getpid()}


def open_kinds() -> dict[str, int]:
    """Return how many descriptors of each kind this process has open."""
    found: dict[str, int] = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            target = simplify(str(entry.readlink()))
            if not target.startswith("/proc/#/fd"):
                found[target] = found.get(target, 0) + 1
    return found


def _unified() -> str:
    return (
        "/sys/fs/cgroup" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "/sys/fs/cgroup/unified"
    )


def _opens(path: str) -> str:
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "opens"


def _clone3() -> str:
    # Too small a structure: EINVAL where the call exists.
    _libc.syscall(ctypes.c_long(435), None, ctypes.c_long(0))
    return errno.errorcode[ctypes.get_errno()]


def simplify(path: str) -> str:
    """Return a path with its numbers replaced, so that two runs name the same."""
    return _ID.sub("#", _OWN.sub("rcon-faults-#", path))
