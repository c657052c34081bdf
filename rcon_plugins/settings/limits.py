"""Limits: how much of the machine may be used. Immutable data that does not depend on the kernel.

`Limits` hold for everything under a policy together, `Each` for each request, task or command.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import CpuList, Cpus, CpuTime, Duration, MemorySize, Size, dotted
from rcon_plugins.settings.limit_table import BY_KEY
from rcon_plugins.settings.memory import Memory, check_a_page
from rcon_plugins.settings.units import (
    cpu_numbers,
    format_cpus,
    format_duration,
    format_size,
    format_value,
    show,
)

#: The length of the period of a CPU quota, seconds.
_CPU_PERIOD = 0.1


def _about(key: str) -> Meta:
    """Return the description and example of a row of the table."""
    row = BY_KEY[key]
    return Meta(description=row.description, examples=[row.example])


def _range(key: str) -> Meta:
    """Return the range of a row of the table."""
    row = BY_KEY[key]
    return Meta(ge=row.least, le=row.most)


class IoLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be read from and written to one device. ``None`` is "not set"."""

    read: Annotated[Size | None, _about("read")] = None
    write: Annotated[Size | None, _about("write")] = None
    read_iops: Annotated[Annotated[int, _range("read_iops")] | None, _about("read_iops")] = None
    write_iops: Annotated[Annotated[int, _range("write_iops")] | None, _about("write_iops")] = None

    def __post_init__(self) -> None:
        for name in ("read", "write"):
            if getattr(self, name) == 0:
                raise SettingsError(
                    "0 bytes per second would block for ever", key=name, value=0, hint='write at least "1"'
                )
        if all(getattr(self, name) is None for name in self.__struct_fields__):
            raise SettingsError("sets no limit", hint=f"one of: {', '.join(self.__struct_fields__)}")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that hold for all the processes and threads under them together. ``None`` is "not set".

    The fields are rows of `rcon_plugins.settings.limit_table`.
    """

    cpu: Annotated[Cpus | None, _about("cpu")] = None
    cpu_burst: Annotated[CpuTime | None, _about("cpu_burst")] = None
    cpu_weight: Annotated[Annotated[int, _range("cpu_weight")] | None, _about("cpu_weight")] = None
    cpus: Annotated[CpuList | None, _about("cpus")] = None
    memory: Annotated[Memory | None, _about("memory")] = None
    memory_high: Annotated[MemorySize | None, _about("memory_high")] = None
    swap: Annotated[Size | None, _about("swap")] = None
    io: Annotated[
        Mapping[str, IoLimits],
        Meta(
            description="Limits per device: by a path on it, or MAJOR:MINOR.",
            examples=[{"/srv": {"read": "10M", "write": "5M"}}],
        ),
    ] = {}
    pids: Annotated[Annotated[int, _range("pids")] | None, _about("pids")] = None

    #: The remedy, in error messages, for keys that belong to another table.
    belongs: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if self.memory is not None and not isinstance(self.memory, Memory):
            # a plain number of bytes, from a direct call of the constructor
            msgspec.structs.force_setattr(self, "memory", Memory.parse(self.memory))
        check_a_page(None if self.memory is None else self.memory.limit, "memory")
        check_a_page(self.memory_high, "memory_high")
        if self.memory_high is not None:
            self._check_memory_high(self.memory_high)
        if self.cpu_burst:
            self._check_cpu_burst(self.cpu_burst)
        for device in self.io:
            _check_device(device)

    def _check_cpu_burst(self, burst: float) -> None:
        if self.cpu is None:
            raise SettingsError(
                "without cpu there is no quota to exceed",
                key="cpu_burst",
                value=burst,
                hint='set cpu too, such as "30%", or leave it out',
            )
        most = round(self.cpu * _CPU_PERIOD, 6)
        if burst > most:
            raise SettingsError(
                f"{format_duration(burst)} is more than cpu = {format_cpus(self.cpu)} allows in a period of 100 ms",
                key="cpu_burst",
                value=burst,
                hint=f'at most "{format_duration(most)}", or raise cpu',
            )

    def _check_memory_high(self, high: int) -> None:
        if self.memory is not None and self.memory.expands:
            raise SettingsError(
                "memory that expands already slows processes down at its limit until that is raised",
                key="memory_high",
                value=high,
                hint="leave it out",
            )
        if self.memory is None:
            raise SettingsError(
                "without memory, the kernel can slow processes above memory_high down for ever",
                key="memory_high",
                value=high,
                hint=f'set memory too, above "{format_size(high)}"',
            )
        if high >= self.memory.limit:
            raise SettingsError(
                f"{format_size(high)} is never reached under memory = {format_size(self.memory.limit)}",
                key="memory_high",
                value=high,
                hint="set it below memory, or leave it out",
            )

    def limits_set(self) -> tuple[str, ...]:
        """Return the keys of the limits that are set, as in a settings file: ``("cpu", "memory")``."""
        return tuple(name for name in self.__struct_fields__ if name in _LIMITS and _is_set(self, name))


class Each(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of each request, task or command."""

    timeout: Annotated[Duration | None, _about("timeout")] = None
    grace: Annotated[Duration | None, _about("grace")] = None
    timeout_soft: Annotated[Duration | None, _about("timeout_soft")] = None
    memory_soft: Annotated[MemorySize | None, _about("memory_soft")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grace is not None and self.timeout is None:
            raise SettingsError(
                "a grace begins at the timeout, and there is none",
                key="grace",
                value=self.grace,
                hint='set timeout too, such as "20s", or leave it out',
            )
        _check_soft("timeout", self.timeout_soft, self.timeout)
        _check_soft("memory", self.memory_soft, None if self.memory is None else self.memory.limit)

    belongs: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "per",
            "isolation",
            "concurrency",
            "max_uses",
            "leave_children",
            "oom",
            "on_memory",
            "max_deaths",
            "dead_letter",
        ),
        "it belongs to the policy, not under each",
    )

    def check_within(self, whole: Limits) -> None:
        """Raise `SettingsError` for a limit of ``each`` above that of the whole policy, which is never reached."""
        _check_each(self, whole, "each")
        for device, limits in self.io.items():
            if device in whole.io:
                _check_each(limits, whole.io[device], dotted("each.io", device))
        if self.cpus and whole.cpus and not cpu_numbers(self.cpus) <= cpu_numbers(whole.cpus):
            raise SettingsError(
                f"{self.cpus} is not within cpus = {whole.cpus} of the whole policy",
                key="each.cpus",
                value=self.cpus,
                hint="name only CPUs that the policy has",
            )


_LIMITS = frozenset(Each.__struct_fields__)
#: Limits of ``each`` that are never reached if they are above the same limit of the whole policy.
_COMPARED = ("cpu", "memory", "swap", "pids", "read", "write", "read_iops", "write_iops")


def _is_set(limits: Limits, name: str) -> bool:
    return bool(limits.io) if name == "io" else getattr(limits, name) is not None


def _check_device(device: str) -> None:
    path = device.startswith("/") and "\0" not in device
    if not path and not re.fullmatch(r"\d{1,10}:\d{1,10}", device, re.ASCII):
        raise SettingsError(
            f"{show(device)} is not a device",
            key=dotted("io", device),
            value=device,
            hint='an absolute path on it, such as "/srv", or "254:0"',
        )


def _check_soft(hard: str, soft: float | None, bound: float | None) -> None:
    """Raise `SettingsError` for a soft limit that is not below the limit ``hard``."""
    if soft is not None and bound is not None and soft >= bound:
        unit = BY_KEY[hard].unit
        raise SettingsError(
            f"{format_value(unit, soft)} is never reached before {hard} = {format_value(unit, bound)}",
            key=f"{hard}_soft",
            value=soft,
            hint=f"set it below {hard}, or leave it out",
        )


def _check_each(each: msgspec.Struct, whole: msgspec.Struct, key: str) -> None:
    for name in _COMPARED:
        own, bound = getattr(each, name, None), getattr(whole, name, None)
        if own is None or bound is None:
            continue
        where = f"{key}.{name}"
        if isinstance(own, Memory):
            bound = bound.most
            if own.limit <= bound and own.expands:
                where = f"{where}.up_to"
                own = own.most
            else:
                own = own.limit
        if own > bound:
            text = format_value(BY_KEY[name].unit, bound)
            raise SettingsError(
                f"{format_value(BY_KEY[name].unit, own)} is never reached: the whole policy is limited to {text}",
                key=where,
                value=own,
                hint=f"at most {text}, or leave it out",
            )
