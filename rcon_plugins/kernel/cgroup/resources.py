"""Represent limits as pure data, in the kernel's own terms.

``None`` means not set: leave the limit as it is. :data:`MAX` is the kernel's "max": no limit. :mod:`.v1` and
:mod:`.v2` convert limits to and from the files of their version.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

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

#: The kernel's default period in ``cpu.max`` and ``cpu.cfs_period_us``.
CPU_PERIOD_MICROSECONDS = 100_000
#: The kernel accepts no quota below 1 ms (``min_cfs_quota_period`` in kernel/sched/core.c).
SMALLEST_CPU_QUOTA = 1_000 / CPU_PERIOD_MICROSECONDS


class IoMax(NamedTuple):
    """The throttling of one block device: bytes per second and operations per second, for reads and writes."""

    rbps: int | Max | None = None
    wbps: int | Max | None = None
    riops: int | Max | None = None
    wiops: int | Max | None = None


class _Limits(NamedTuple):
    cpu_quota: float | Max | None = None
    cpu_burst: float | None = None
    cpu_weight: int | None = None
    cpus: str | None = None
    memory_max: int | Max | None = None
    memory_high: int | Max | None = None
    swap_max: int | Max | None = None
    oom_group: bool = False
    pids_max: int | Max | None = None
    io: Mapping[Device, IoMax] = MappingProxyType({})
    files: Mapping[str, str] = MappingProxyType({})


class Resources(_Limits):
    """The limits of a cgroup. Raises ValueError for a value that no kernel accepts.

    - ``cpu_quota``: CPUs (0.3 is 30 % of one, 1.5 is one and a half), over periods of 100 ms.
    - ``cpu_burst``: seconds of CPU time that an idle cgroup may save up beyond the quota (kernel 5.14). At most the
      quota's share of a period; 0 is none.
    - ``cpu_weight``: 1..10000 relative to siblings. The kernel's default is 100.
    - ``cpus``: a list such as ``"0-1,3"``.
    - ``memory_max``, ``memory_high``, ``swap_max``: bytes. Without ``swap_max``, a limit of memory allows no swap where
      swap is accounted: it would bound nothing otherwise. On v1 this needs swap on the machine when it is written,
      because a limit on memory and swap together hides the limit hits of memory.
    - ``oom_group``: an OOM kill ends the whole cgroup (v2, kernel 4.19; no effect on v1).
    - ``pids_max``: processes and threads.
    - ``io``: rates by block device.
    - ``files``: texts by name of controller files that no other field sets, such as ``{"hugetlb.2MB.max": "0"}``.
      Written last.

    Source: Documentation/admin-guide/cgroup-v2.rst.
    """

    __slots__ = ()

    # Not a dataclass: importing dataclasses takes as long as starting Python, and would delay `rcon run`.
    if not TYPE_CHECKING:  # type checkers take the signature from the fields above

        def __new__(cls, **limits: Any) -> Self:
            """Check the limits."""
            mappings = {name: dict(limits.get(name) or {}) for name in ("io", "files")}
            made = super().__new__(cls, **{**limits, **mappings})
            made._check()
            return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), self._asdict()

    def replaced(self, **news: Any) -> Self:
        """Return these limits with some changed. Raises ValueError for a value that no kernel accepts."""
        return type(self)(**{**self._asdict(), **news})

    def _check(self) -> None:
        quota = self.cpu_quota
        if quota is not None and quota is not MAX and not SMALLEST_CPU_QUOTA <= quota <= 1_000_000:
            raise ValueError(f"cpu_quota {quota!r} is not between {SMALLEST_CPU_QUOTA} and 1000000 CPUs")
        if self.cpu_burst is not None and not 0 <= self.cpu_burst <= 1_000_000:
            raise ValueError(f"cpu_burst {self.cpu_burst!r} is not between 0 and 1000000 seconds")
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
        for name, text in self.files.items():
            _check_file(name, text)

    def controllers(self) -> frozenset[str]:
        """Return the controllers, of `CONTROLLERS`, that these limits need. A limit that is ``None`` needs none."""
        fields = {controller_of(name) for name in self.written() if name != "files"}
        return frozenset(fields | {controller_of_file(name) for name in self.files}) & CONTROLLERS

    @classmethod
    def merged(cls, several: Iterable[Resources]) -> Resources:
        """Merge several into one. The first that sets a field, a rate of a device, or a file decides."""
        found: dict[str, Any] = {"io": {}, "files": {}}
        for one in several:
            for name in one.written():
                if name == "io":
                    for device, rates in one.io.items():
                        known = found["io"].get(device, IoMax())
                        found["io"][device] = IoMax(*map(_first, known, rates))
                elif name == "files":
                    found["files"] = {**one.files, **found["files"]}
                else:
                    found.setdefault(name, getattr(one, name))
        return cls(**found)

    def written(self) -> tuple[str, ...]:
        """Return the names of the fields that are set."""
        values = zip(self._fields, self, strict=True)
        return tuple(
            [name for name, value in values if value is not None and value is not False and value != {}]
        )


#: The controllers of this project, by their v2 names.
CONTROLLERS = frozenset({"cpu", "cpuset", "memory", "io", "pids"})
#: The controllers of fields whose name does not begin with that of their controller.
_CONTROLLERS = {"cpus": "cpuset", "swap_max": "memory", "oom_group": "memory"}


def controller_of(field: str) -> str:
    """Return the controller of a field of `Resources`: the first word of its name, with the exceptions above."""
    return _CONTROLLERS.get(field) or field.partition("_")[0]


def controller_of_file(name: str) -> str:
    """Return the controller of a file, by its v2 name: ``hugetlb`` for ``hugetlb.2MB.max``."""
    controller = name.partition(".")[0]
    return "io" if controller == "blkio" else controller


def _first(one: int | Max | None, other: int | Max | None) -> int | Max | None:
    return other if one is None else one


class LimitFile(NamedTuple):
    """The file of one field of `Resources` in one version of the interface, and functions that convert its value."""

    field: str
    file: str
    write: Callable[[Any], str]
    read: Callable[[str], Any]


def pairs_of(rows: Iterable[LimitFile], resources: Resources) -> list[tuple[str, str]]:
    """Return the limits that are set as (file, value), in the order of the rows."""
    written = resources.written()
    return [(row.file, row.write(getattr(resources, row.field))) for row in rows if row.field in written]


#: Return the text of a file of one cgroup; None if there is no such file.
Read = Callable[[str], str | None]


def read_back(rows: Iterable[LimitFile], read: Read) -> dict[str, Any]:
    """Return the fields whose files exist and are not empty. The inverse of `pairs_of`."""
    found = {row.field: row.read(text) for row in rows if (text := read(row.file))}
    return {name: value for name, value in found.items() if value is not False}


def _check_count(name: str, value: int | Max | None, least: int) -> None:
    if value is None or value is MAX:
        return
    if not least <= value < 2**63:
        raise ValueError(f"{name} {value!r} is not between {least} and 2**63 - 1")


def _check_file(name: str, text: str) -> None:
    controller, _, rest = name.partition(".")
    if not rest or not controller.isidentifier() or controller == "cgroup" or "/" in name or "\0" in name:
        raise ValueError(f"files: {name!r} is not the name of a controller's file, such as hugetlb.2MB.max")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"files: the value of {name} is {text!r}, and has to be text")


def parse_list(text: str) -> frozenset[int]:
    """Return the numbers of a kernel list such as ``"0-1,3"`` (``cpuset(7)``, list format). Raises ValueError."""
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


def number_or_max(text: str) -> int | Max:
    """Parse a count as the kernel writes it: a number or ``max``."""
    return MAX if text == "max" else int(text)


def in_microseconds(seconds: float) -> str:
    """Return a duration as the kernel writes it: in whole microseconds."""
    return str(round(seconds * 1_000_000))


def in_seconds(microseconds: str) -> float:
    """Return a duration in seconds. The inverse of `in_microseconds`."""
    return int(microseconds) / 1_000_000


def cpus_of(quota: int, period: int) -> float:
    """Return a CPU quota in CPUs, at least `SMALLEST_CPU_QUOTA`.

    Another program may have set a longer period, and a smaller share of it than can be set here.
    """
    return max(quota / period, SMALLEST_CPU_QUOTA)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def format_list(numbers: Iterable[int]) -> str:
    """Return a set of numbers as the kernel writes it. The inverse of :func:`parse_list`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
