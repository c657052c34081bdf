"""Detect features of the running kernel, with their use, and the container that this process runs in."""

from __future__ import annotations

import errno
import os
import posix
import re
import stat
from collections.abc import Iterable
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, landlock


class Feature(NamedTuple):
    """A file or call of the kernel, the Linux version that brought it (``since``), and its use (``brings``)."""

    name: str
    since: str
    brings: str
    there: bool


#: Files of a v2 cgroup that is not the root: version, use, and the controller that they need ("" for none).
_V2_FILES = (
    (
        "cgroup.freeze",
        "5.2",
        "freezing a group, and ending it without a race on kernels without cgroup.kill",
        "",
    ),
    (
        "cgroup.kill",
        "5.14",
        "killing a whole group in one write; without it: repeated signals until no process is left",
        "",
    ),
    ("memory.events.local", "5.2", "limit hits of a group apart from those below it", "memory"),
    ("memory.oom.group", "4.19", "an OOM kill that ends all processes of a group", "memory"),
    ("memory.peak", "5.19", "peak memory of a group", "memory"),
    ("pids.events.local", "6.11", "refused forks counted in the group whose limit it was", "pids"),
    ("cpu.pressure", "4.20", "pressure (PSI) of each group", ""),
)
_LANDLOCK = ((1, "5.13", "files"), (2, "5.19", "moving files"), (3, "6.2", "truncating"), (4, "6.7", "TCP ports"),
             (5, "6.10", "devices"), (6, "6.12", "signals and abstract sockets"))  # fmt: skip


def release() -> tuple[int, int]:
    """Return the version of the running kernel: ``(6, 1)``."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def features_of(directory: str) -> list[Feature]:
    """Return the features that the v2 cgroup ``directory`` has or lacks. It must not be the root of the tree.

    Leaves out the features of a controller that the cgroup does not have.
    """
    controllers = (files.read_if_there(directory, "cgroup.controllers") or "").split()
    found = [
        Feature(name, since, brings, os.path.exists(f"{directory}/{name}"))
        for name, since, brings, controller in _V2_FILES
        if not controller or controller in controllers
    ]
    if "memory" in controllers:
        # The file is writable if the kernel can reset the peak.
        writable = _mode(f"{directory}/memory.peak") & stat.S_IWUSR
        found.append(
            Feature("memory.peak, reset", "6.12", "peak memory of each request or task", bool(writable))
        )
    found.append(
        Feature("clone3(CLONE_INTO_CGROUP)", "5.7", "processes born in their cgroup", release() >= (5, 7))
    )
    return found


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def pressure() -> Feature:
    """Return whether the kernel measures pressure (``/proc/pressure``). It may be switched off at boot."""
    try:
        there = bool(files.read("/proc/pressure", "cpu"))
    except KernelError:
        there = False
    return Feature("PSI", "4.20", "pressure: how long processes wait for cpu, memory and io", there)


def has_pidfds() -> bool:
    """Return whether a process can be signalled without the risk that its pid was reused (pidfd_open(2))."""
    try:
        posix.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def landlock_brings() -> tuple[int, list[tuple[str, str]]]:
    """Return the ABI of Landlock (0: none), and for each later ABI the Linux version and its use."""
    abi = landlock.abi()
    return abi, [(since, brings) for number, since, brings in _LANDLOCK if number > abi]


def container(
    paths: Iterable[tuple[str, str]] = (("/run/.containerenv", "podman"), ("/.dockerenv", "docker")),
) -> str | None:
    """Return the kind of container that this process is in; None if no known one is detected.

    Detected by the files of container engines, systemd's ``/run/systemd/container``, and the variable ``container`` of
    process 1, which only root can read.
    """
    for path, name in paths:
        if os.path.exists(path):
            return name
    named = files.read_if_there("/run/systemd", "container")
    if named:
        return named.strip()
    try:
        text = files.read("/proc/1", "environ")
    except KernelError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT):
            raise
        text = ""
    for variable in text.split("\0"):
        name, _, value = variable.partition("=")
        if name == "container" and value:
            return value
    return "kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else None
