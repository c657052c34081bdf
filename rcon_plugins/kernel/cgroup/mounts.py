"""Parse ``/proc/self/mountinfo`` and ``/proc/PID/cgroup`` (``proc(5)``, ``cgroups(7)``)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rcon_plugins.kernel import files

_BOOTED = "/run/systemd/system"
_ESCAPE = re.compile(r"\\([0-7]{3})")

#: The v1 controllers that this project uses, in the order in which directories are made and removed.
V1_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "pids", "blkio", "memory", "freezer")


class MountEntry(NamedTuple):
    """One line of mountinfo."""

    device: str
    root: str
    path: str
    read_only: bool
    filesystem: str
    source: str
    options: Mapping[str, str]


class Mount(NamedTuple):
    """A mounted cgroup hierarchy.

    ``path`` is the mount point. ``root`` is the cgroup visible there (``/`` except in some containers).
    ``controllers`` holds the kernel's names: on v1 the controllers bound to the hierarchy (``cpu``, ``cpuacct``,
    ``blkio`` ...), on v2 the controllers that the visible root offers.
    """

    version: int
    path: str
    root: str = "/"
    controllers: frozenset[str] = frozenset()
    read_only: bool = False

    def directory(self, path: str) -> str:
        """Return the directory of the cgroup ``path`` (``/`` is the root of the mount)."""
        return self.path if path == "/" else f"{self.path}{path}"


def switched_off() -> frozenset[str]:
    """Return the controllers, by the kernel's names on v1, that were switched off at boot.

    ``/proc/cgroups`` says so (cgroups(7)). Kernels without cgroup v1 leave controllers out there, but not the option
    ``cgroup_disable`` in ``/proc/cmdline`` (kernel-parameters.rst).
    """
    off: set[str] = set()
    listed: set[str] = set()
    for line in (files.read_if_there("/proc", "cgroups") or "").splitlines():
        fields = line.split()
        if len(fields) == 4 and fields[3] == "0":
            off.add(fields[0])
        elif len(fields) == 4 and fields[3] == "1":
            listed.add(fields[0])
    for word in (files.read_if_there("/proc", "cmdline") or "").split():
        option, _, names = word.partition("=")
        if option == "cgroup_disable":
            off |= {"blkio" if name == "io" else name for name in names.split(",")} - listed
    return frozenset(off)


def refusal_of_boot(controller: str) -> tuple[str, str]:
    """Return why a controller that is `switched_off` cannot be used, and the remedy."""
    return (
        f"the kernel was booted with the {controller} controller switched off",
        f"boot without cgroup_disable={controller}, or with cgroup_enable={controller} where the firmware adds that",
    )


def parse_mountinfo(text: str) -> list[MountEntry]:
    """Return all lines of a mountinfo file, with octal escapes decoded."""
    entries = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            continue
        options = {}
        for option in rest[2].split(","):
            key, _, value = option.partition("=")
            options[_unescape(key)] = _unescape(value)
        entries.append(
            MountEntry(
                device=fields[2],
                root=_unescape(fields[3]),
                path=_unescape(fields[4]),
                read_only="ro" in fields[5].split(",") or "ro" in options,
                filesystem=rest[0],
                source=_unescape(rest[1]),
                options=options,
            )
        )
    return entries


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def cgroup_mounts(entries: list[MountEntry]) -> list[Mount]:
    """Return the cgroup hierarchies among ``entries``, each once, v1 in the order of use, v2 last.

    Of several mounts of one hierarchy, take the one with the shortest root, then a writable one, then the latest, which
    hides earlier ones at the same path.
    """
    best: dict[tuple[int, frozenset[str]], MountEntry] = {}
    for entry in entries:
        if entry.filesystem == "cgroup2":
            key = (2, frozenset[str]())
        elif entry.filesystem == "cgroup":
            key = (1, frozenset(V1_CONTROLLERS) & frozenset(entry.options))
            if not key[1]:
                continue
        else:
            continue
        known = best.get(key)
        if known is None or _merit(entry) >= _merit(known):
            best[key] = entry
    found = [
        Mount(version, entry.path, entry.root, names, entry.read_only)
        for (version, names), entry in best.items()
    ]
    return sorted(found, key=_order)


def _merit(entry: MountEntry) -> tuple[int, bool]:
    return (-len(entry.root), not entry.read_only)


def _order(mount: Mount) -> tuple[int, int]:
    positions = [V1_CONTROLLERS.index(name) for name in mount.controllers if name in V1_CONTROLLERS]
    return (mount.version, min(positions, default=0))


def is_systemds() -> bool:
    """Return whether systemd is the init of this machine and manages its cgroups, as sd_booted(3) does."""
    return os.path.isdir(_BOOTED)


def parse_membership(text: str) -> dict[frozenset[str], str]:
    """Parse a ``/proc/PID/cgroup`` file. Return the path of the cgroup by set of v1 controllers (empty for v2)."""
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            found[frozenset[str]()] = path
        elif names:
            found[frozenset(names.split(","))] = path
    return found


def membership(mount: Mount, by_controllers: Mapping[frozenset[str], str]) -> str | None:
    """Return the cgroup of a process as a path below ``mount``; None if it cannot be seen there."""
    for names, path in by_controllers.items():
        if mount.version == 2 and not names:
            return _below(mount.root, path)
        if mount.version == 1 and names & mount.controllers:
            return _below(mount.root, path)
    return None


def _below(root: str, path: str) -> str | None:
    if root == "/":
        # A process outside of our cgroup namespace shows as /../something.
        return None if path.startswith("/..") else path
    if path == root:
        return "/"
    return path[len(root) :] if path.startswith(f"{root}/") else None


def mount_table() -> str:
    """Return ``/proc/self/mountinfo``: the mounts that this process sees. Any change of them changes the text."""
    return files.read_own("mountinfo")


def mount_points(table: str) -> list[str]:
    """Return the mount points of all cgroup file systems in a `mount_table`, including named hierarchies."""
    entries = parse_mountinfo(table)
    return sorted({entry.path for entry in entries if entry.filesystem in ("cgroup", "cgroup2")})


def mount_of(major: int, minor: int) -> MountEntry | None:
    """Return the mount with this device number, from ``/proc/self/mountinfo``."""
    wanted = f"{major}:{minor}"
    for entry in parse_mountinfo(files.read_own("mountinfo")):
        if entry.device == wanted:
            return entry
    return None


def writable_remedy(mounts: Iterable[Mount]) -> str:
    """Return the steps that make read-only hierarchies writable, separated by ``; ``."""
    return (
        "in a container, start it with a writable cgroup of its own: "
        "docker run --cgroupns=private --security-opt writable-cgroups=true ...; "
        "or podman run --cgroupns=private --security-opt unmask=/sys/fs/cgroup ...; "
        "or, where neither is known, docker run --privileged --cgroupns=private ...; outside of one: "
        + "; ".join(f"mount -o remount,rw {mount.path}" for mount in mounts)
    )
