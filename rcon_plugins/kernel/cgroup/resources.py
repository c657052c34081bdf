"""Limits as pure data, in the kernel's own terms.

``None`` is "not set: leave as it is", :data:`MAX` is the kernel's "max": no limit. What a version of the
interface writes for them is in :mod:`.v1` and :mod:`.v2`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, Self

from rcon_plugins.kernel.cgroup.device import Device


class _Max(enum.Enum):
    MAX = "max"

    def __str__(self) -> str:
        return self.value

    def __repr__(self) -> str:
        return "MAX"


#: No limit; the kernel's ``max``.
MAX: Final = _Max.MAX
Max = Literal[_Max.MAX]

#: Of ``cpu.max`` and ``cpu.cfs_period_us``: the default of the kernel.
CPU_PERIOD_MICROSECONDS = 100_000
#: The kernel accepts no quota below 1 ms (``min_cfs_quota_period`` in kernel/sched/core.c).
SMALLEST_CPU_QUOTA = 1_000 / CPU_PERIOD_MICROSECONDS


class IoMax(NamedTuple):
    """Throttling of one block device: bytes per second and operations per second, read and written."""

    rbps: int | Max | None = None
    wbps: int | Max | None = None
    riops: int | Max | None = None
    wiops: int | Max | None = None


class _Limits(NamedTuple):
    cpu_quota: float | Max | None = None
    cpu_weight: int | None = None
    cpus: str | None = None
    memory_max: int | Max | None = None
    memory_high: int | Max | None = None
    swap_max: int | Max | None = None
    oom_group: bool = False
    io: Mapping[Device, IoMax] = MappingProxyType({})
    pids_max: int | Max | None = None


class Resources(_Limits):
    """What a cgroup may use. Raises ValueError for a value no kernel takes.

    ``cpu_quota`` in CPUs (0.3 is 30 % of one, 1.5 one and a half), held over periods of 100 ms;
    ``cpu_weight`` 1..10000 relative to siblings (default of the kernel: 100); ``cpus`` a list such as
    ``"0-1,3"``; ``memory_max``, ``memory_high``, ``swap_max`` in bytes; ``oom_group``: an OOM kill takes
    the whole cgroup (v2, kernel 4.19; without effect on v1); ``io`` per block device; ``pids_max`` in
    processes and threads. Source: Documentation/admin-guide/cgroup-v2.rst.
    """

    __slots__ = ()

    # No dataclass: to load that module takes as long as starting Python, and a command is to begin soon.
    def __new__(
        cls,
        *,
        cpu_quota: float | Max | None = None,
        cpu_weight: int | None = None,
        cpus: str | None = None,
        memory_max: int | Max | None = None,
        memory_high: int | Max | None = None,
        swap_max: int | Max | None = None,
        oom_group: bool = False,
        io: Mapping[Device, IoMax] | None = None,
        pids_max: int | Max | None = None,
    ) -> Self:
        made = super().__new__(
            cls, cpu_quota, cpu_weight, cpus, memory_max, memory_high, swap_max, oom_group, io or {}, pids_max
        )
        made._check()
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), self._asdict()

    def replaced(self, **news: Any) -> Self:
        """The same with some limits changed. Raises ValueError for a value no kernel takes."""
        return type(self)(**{**self._asdict(), **news})

    def _check(self) -> None:
        quota = self.cpu_quota
        if quota is not None and quota is not MAX and not SMALLEST_CPU_QUOTA <= quota <= 1_000_000:
            raise ValueError(f"cpu_quota {quota!r} is not between {SMALLEST_CPU_QUOTA} and 1000000 CPUs")
        if self.cpu_weight is not None and not 1 <= self.cpu_weight <= 10_000:
            raise ValueError(f"cpu_weight {self.cpu_weight!r} is not between 1 and 10000")
        if self.cpus is not None:
            parse_list(self.cpus)
        for name in ("memory_max", "memory_high", "swap_max", "pids_max"):
            _check_count(name, getattr(self, name), 0)
        for device, limits in self.io.items():
            for name, value in zip(limits._fields, limits, strict=True):
                # 0 would remove the limit on v1 and is refused by v2.
                _check_count(f"io[{device}].{name}", value, 1)

    def controllers(self) -> frozenset[str]:
        """The controllers these limits need; a limit that is ``None`` needs none."""
        wanted = {
            "cpu": self.cpu_quota is not None or self.cpu_weight is not None,
            "cpuset": self.cpus is not None,
            "memory": self.memory_max is not None
            or self.memory_high is not None
            or self.swap_max is not None
            or self.oom_group,
            "io": bool(self.io),
            "pids": self.pids_max is not None,
        }
        return frozenset(name for name, wants in wanted.items() if wants)


def _check_count(name: str, value: int | Max | None, least: int) -> None:
    if value is None or value is MAX:
        return
    if not least <= value < 2**63:
        raise ValueError(f"{name} {value!r} is not between {least} and 2**63 - 1")


def parse_list(text: str) -> frozenset[int]:
    """The numbers of a kernel list such as ``"0-1,3"`` (``cpuset(7)``, list format).

    Raises ValueError.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ValueError(f"not a list of CPUs: {text!r} (write it like 0-1,3)")
        low, high = int(first), int(last or first)
        if high < low or high > 65_535:
            raise ValueError(f"not a list of CPUs: {text!r} (a range runs upwards, to 65535 at most)")
        numbers.update(range(low, high + 1))
    return frozenset(numbers)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def format_list(numbers: Iterable[int]) -> str:
    """The kernel's spelling of a set of numbers, the inverse of :func:`parse_list`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
