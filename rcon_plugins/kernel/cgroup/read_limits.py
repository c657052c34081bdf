"""The limits in force, read back from the kernel: the inverse of the ``pairs`` of both versions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.device import Device
from rcon_plugins.kernel.cgroup.resources import (
    CPU_PERIOD_MICROSECONDS,
    MAX,
    SMALLEST_CPU_QUOTA,
    IoMax,
    Max,
    Resources,
)
from rcon_plugins.kernel.cgroup.v1 import IO_FILES

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup

#: The text of a file of one cgroup; None where there is no such file.
Read = Callable[[str], str | None]

#: What v1 says where memory has no limit is just below this, by the size of a page.
_UNLIMITED_BYTES = 2**63 - 2**20


def read_limits(cgroup: Cgroup) -> Resources:
    """What was written to an existing cgroup: :data:`MAX` is no limit, ``None`` what cannot be limited there.

    Its own limits alone: those of the cgroups around it may be tighter. ``cpus`` is None where it has those of the
    cgroup above. Raises KernelError.
    """
    found: dict[str, Any] = {}
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        read = partial(files.read_if_there, directory)
        if mount.version == 2:
            found |= of_v2(read)
        else:
            found |= of_v1(read)
            above = files.read_if_there(os.path.dirname(directory), "cpuset.cpus")
            if "cpus" in found and found["cpus"] == above:
                del found["cpus"]  # a new v1 cpuset is given those of the one above
    return Resources(**found)


def of_v2(read: Read) -> dict[str, Any]:
    """The fields of :class:`Resources` that a v2 directory has files for."""
    found: dict[str, Any] = {}
    if (text := read("cpu.max")) is not None:
        quota, _, period = text.partition(" ")
        found["cpu_quota"] = MAX if quota == "max" else _quota(int(quota), int(period))
    if text := read("cpu.weight"):
        found["cpu_weight"] = int(text)
    if text := read("cpuset.cpus"):
        found["cpus"] = text
    for name, file in (
        ("memory_max", "memory.max"),
        ("memory_high", "memory.high"),
        ("swap_max", "memory.swap.max"),
        ("pids_max", "pids.max"),
    ):
        if (text := read(file)) is not None:
            found[name] = _number(text)
    if read("memory.oom.group") == "1":
        found["oom_group"] = True
    if text := read("io.max"):
        found["io"] = _io_max(text)
    return found


def of_v1(read: Read) -> dict[str, Any]:
    """The fields of :class:`Resources` that the directory of a v1 hierarchy has files for."""
    found: dict[str, Any] = {}
    if (text := read("cpu.cfs_quota_us")) is not None:
        period = int(read("cpu.cfs_period_us") or CPU_PERIOD_MICROSECONDS)
        found["cpu_quota"] = MAX if int(text) < 0 else _quota(int(text), period)
    if text := read("cpu.shares"):
        found["cpu_weight"] = weight_of(int(text))
    if text := read("cpuset.cpus"):
        found["cpus"] = text
    if (text := read("memory.limit_in_bytes")) is not None:
        memory = found["memory_max"] = _bytes(text)
        if (both := read("memory.memsw.limit_in_bytes")) is not None:
            total = _bytes(both)
            unlimited = total is MAX or memory is MAX
            found["swap_max"] = MAX if unlimited else max(0, int(both) - int(text))
    if (text := read("pids.max")) is not None:
        found["pids_max"] = _number(text)
    if devices := _throttled({key: read(file) or "" for key, file in IO_FILES.items()}):
        found["io"] = devices
    return found


def weight_of(shares: int) -> int:
    """The v2 weight of ``cpu.shares``: the inverse of :func:`~rcon_plugins.kernel.cgroup.v1.shares_of`."""
    return max(1, min(10_000, round(shares * 100 / 1024)))


def _quota(quota: int, period: int) -> float:
    # Somebody else may have chosen a longer period, and so less of it than can be asked for here.
    return max(quota / period, SMALLEST_CPU_QUOTA)


def _number(text: str) -> int | Max:
    return MAX if text == "max" else int(text)


def _bytes(text: str) -> int | Max:
    return MAX if int(text) >= _UNLIMITED_BYTES else int(text)


def _io_max(text: str) -> dict[Device, IoMax]:
    found = {}
    for line in text.splitlines():
        device, *limits = line.split()
        named = dict(limit.split("=", 1) for limit in limits)
        found[_device(device)] = IoMax(**{key: _number(named.get(key, "max")) for key in IoMax._fields})
    return found


def _throttled(texts: Mapping[str, str]) -> dict[Device, IoMax]:
    found: dict[Device, IoMax] = {}
    for key, text in texts.items():
        for line in text.splitlines():
            device, value = line.split()
            known = found.get(_device(device), IoMax(MAX, MAX, MAX, MAX))
            found[_device(device)] = known._replace(**{key: int(value)})
    return found


def _device(text: str) -> Device:
    major, _, minor = text.partition(":")
    return Device(int(major), int(minor))
