"""What the running kernel has, by what it brings; and what this process runs in."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, landlock


class Feature(NamedTuple):
    """One feature: a file or call of the kernel, the version of Linux ``since`` which it is, and what it ``brings``."""

    name: str
    since: str
    brings: str
    there: bool


#: Files of a v2 cgroup that is not the root: version, what they bring, the controller they need ("" for none).
_V2_FILES = (
    (
        "cgroup.freeze",
        "5.2",
        "freezing a group, and an end without a race on kernels without cgroup.kill",
        "",
    ),
    (
        "cgroup.kill",
        "5.14",
        "the end of a whole group in one write; without it: a walk until none is left",
        "",
    ),
    ("memory.events.local", "5.2", "the limit hits of a group told apart from those below it", "memory"),
    ("memory.oom.group", "4.19", "an OOM kill that takes all of a work", "memory"),
    ("memory.peak", "5.19", "the peak of a group's memory", "memory"),
    ("pids.events.local", "6.11", "refused forks told by the group whose limit it was", "pids"),
    ("cpu.pressure", "4.20", "pressure (PSI) of each group", ""),
)
_LANDLOCK = ((1, "5.13", "files"), (2, "5.19", "moving files"), (3, "6.2", "truncating"), (4, "6.7", "TCP ports"),
             (5, "6.10", "devices"), (6, "6.12", "signals and abstract sockets"))  # fmt: skip


def release() -> tuple[int, int]:
    """The version of the running kernel: ``(6, 1)``."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def features_of(directory: str) -> list[Feature]:
    """What the kernel brings to the v2 cgroup ``directory``, which is not the root of the tree.

    Of a controller that the cgroup does not have, nothing is told.
    """
    controllers = (files.read_if_there(directory, "cgroup.controllers") or "").split()
    found = [
        Feature(name, since, brings, os.path.exists(f"{directory}/{name}"))
        for name, since, brings, controller in _V2_FILES
        if not controller or controller in controllers
    ]
    if "memory" in controllers:
        # The file can be written since it can be reset.
        writable = _mode(f"{directory}/memory.peak") & stat.S_IWUSR
        found.append(Feature("memory.peak, reset", "6.12", "a peak of memory for each work", bool(writable)))
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
    """Whether the kernel measures pressure at all (``/proc/pressure``); it may be switched off at boot."""
    try:
        there = bool(files.read("/proc/pressure", "cpu"))
    except KernelError:
        there = False
    return Feature("PSI", "4.20", "pressure: how long work waits for cpu, memory and io", there)


def has_pidfds() -> bool:
    """Whether a process can be signalled without the risk of another with its number (pidfd_open(2))."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def landlock_brings() -> tuple[int, list[tuple[str, str]]]:
    """The ABI of Landlock (0: none), and of each that it lacks the version of Linux and what it would bring."""
    abi = landlock.abi()
    return abi, [(since, brings) for number, since, brings in _LANDLOCK if number > abi]


def switched_off() -> frozenset[str]:
    """The controllers, by the kernel's names, that are compiled in and switched off at boot (``/proc/cgroups``)."""
    lines = (files.read_if_there("/proc", "cgroups") or "").splitlines()
    rows = (line.split() for line in lines if not line.startswith("#"))
    return frozenset(row[0] for row in rows if len(row) == 4 and row[3] == "0")


def container(
    paths: Iterable[tuple[str, str]] = (("/run/.containerenv", "podman"), ("/.dockerenv", "docker")),
) -> str | None:
    """What kind of container this process is in, as far as it can be told; None: in none that is known.

    By the files that engines leave, systemd's ``/run/systemd/container``, and the variable ``container`` of process 1,
    which only root can read.
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
