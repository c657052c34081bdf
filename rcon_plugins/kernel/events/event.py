"""Represent an event of a cgroup as plain data, and define the kinds of events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import capability

Kind = Literal[
    "memory_high",  # usage went above memory.high, and the kernel throttles allocation (v2)
    "memory_limit",  # usage reached the limit; on v1 only if reclaim did not suffice
    "oom_kill",  # the OOM killer ended a process
    "memory_usage",  # usage rose to a threshold of the caller
    "pids_limit",  # a fork failed at the limit of processes
    "cpu_throttled",  # the CPU quota throttled threads
    "pressure",  # threads waited for CPU, memory or IO longer than the trigger allows (PSI)
    "empty",  # the last process left or ended
]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: The interval at which the thread polls events that the kernel does not notify of, seconds.
POLLED_SECONDS = 0.25

#: The step of a PSI trigger's window without CAP_SYS_RESOURCE (Documentation/accounting/psi.rst; Linux 6.4).
_WINDOW_STEP = 2.0
_WINDOW = (0.5, 10.0)


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a cgroup.

    ``count`` counts the occurrences since the last event of this kind, ``total`` those since the cgroup was made (None
    if not counted). ``when`` is `time.monotonic`.

    ``limit`` and ``usage`` are the values just after the event: bytes of memory, or a number of processes and threads.
    For ``cpu_throttled`` they are CPUs, and the seconds for which threads were throttled. For ``pressure`` they are the
    seconds of the trigger, and the share of the last ten seconds (0 to 1). None means no limit, or not known.
    """

    kind: Kind
    cgroup: str
    when: float
    count: int = 1
    total: int | None = None
    limit: float | None = None
    usage: float | None = None
    #: For ``pressure``: the resource, and whether some or all threads waited for it.
    resource: Literal["cpu", "memory", "io"] | None = None
    share: Literal["some", "full"] | None = None


@dataclass(frozen=True, slots=True)
class Pressure:
    """A pressure trigger: report when threads waited ``stall`` seconds within a ``window`` of seconds.

    ``some``: at least one thread waited. ``full``: all threads waited at once. The window is 0.5 to 10 s; without
    CAP_SYS_RESOURCE it must be a multiple of 2 s. Raises ValueError for values that no kernel accepts. Source:
    Documentation/accounting/psi.rst.
    """

    resource: Literal["cpu", "memory", "io"]
    stall: float = 0.2
    window: float = 2.0
    share: Literal["some", "full"] = "some"

    def __post_init__(self) -> None:
        if self.resource not in ("cpu", "memory", "io"):
            raise ValueError(f"pressure is measured for cpu, memory and io, not for {self.resource!r}")
        if self.share not in ("some", "full"):
            raise ValueError(f'{self.share!r} is not "some" or "full"')
        least, most = _WINDOW
        if not least <= self.window <= most:
            raise ValueError(f"a window of {self.window:g} s is not between {least:g} s and {most:g} s")
        if not 0.000001 <= self.stall <= self.window:
            raise ValueError(f"{self.stall:g} s is not within a window of {self.window:g} s")

    def check(self) -> None:
        """Raise `KernelError` if the calling thread may not use a window of that length."""
        if _microseconds(self.window) % _microseconds(_WINDOW_STEP) == 0:
            return
        if capability.CAP_SYS_RESOURCE not in capability.read_state().effective:
            raise KernelError(
                f"a pressure window of {self.window:g} s needs CAP_SYS_RESOURCE",
                path=f"{self.resource}.pressure",
                value=self.trigger,
                hint="choose a multiple of 2 s: 2, 4, 6, 8 or 10",
            )

    @property
    def trigger(self) -> str:
        """The trigger in the kernel's format."""
        return f"{self.share} {_microseconds(self.stall)} {_microseconds(self.window)}"


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
