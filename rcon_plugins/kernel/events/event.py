"""An event of a cgroup, as plain data, and what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import capability

Kind = Literal[
    "memory_high",  # usage went above memory.high, and is slowed down (v2)
    "memory_limit",  # usage ran into the limit; on v1, and what is reclaimed does not suffice
    "oom_kill",  # a process was killed for want of memory
    "memory_usage",  # usage went up to a threshold that was asked for
    "pids_limit",  # a fork failed at the limit of processes
    "cpu_throttled",  # threads were held back by the CPU quota
    "pressure",  # work was held up for want of CPU, memory or IO for as long as was asked for (PSI)
    "empty",  # the last process left or ended
]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: How often the thread looks at what the kernel does not tell of by itself, seconds.
POLLED_SECONDS = 0.25

#: Of a PSI trigger's window, without CAP_SYS_RESOURCE (Documentation/accounting/psi.rst; Linux 6.4).
_WINDOW_STEP = 2.0
_WINDOW = (0.5, 10.0)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a cgroup.

    ``count`` is how often it happened since it was last told, ``total`` since the cgroup was made (None where that is
    not counted). ``limit`` and ``usage`` as they were just after: bytes of memory, processes and threads,
    CPUs (``cpu_throttled``, whose ``usage`` is the seconds for which threads were held back), for ``pressure`` the
    seconds of the trigger and the share of the last ten seconds (0 to 1); None is "none, or not known".
    ``when`` is `time.monotonic` of the moment it was noticed.
    """

    kind: Kind
    cgroup: str
    when: float
    count: int = 1
    total: int | None = None
    limit: float | None = None
    usage: float | None = None
    #: Of ``pressure``: what is short, and of whom it is said.
    resource: Literal["cpu", "memory", "io"] | None = None
    share: Literal["some", "full"] | None = None


@dataclass(frozen=True, slots=True)
class Pressure:
    """A pressure trigger: tell when work was held up for ``stall`` seconds within a ``window`` of seconds.

    ``some``: at least one thread waited; ``full``: all of them did, at once. The window is 0.5 to 10 s; without
    CAP_SYS_RESOURCE a multiple of 2 s. Raises ValueError for what no kernel takes.
    Source: Documentation/accounting/psi.rst.
    """

    resource: Literal["cpu", "memory", "io"]
    stall: float = 0.2
    window: float = 2.0
    share: Literal["some", "full"] = "some"

    def __post_init__(self) -> None:
        if self.resource not in ("cpu", "memory", "io"):
            raise ValueError(f"there is pressure of cpu, memory and io, not of {self.resource!r}")
        if self.share not in ("some", "full"):
            raise ValueError(f'{self.share!r} is not "some" or "full"')
        least, most = _WINDOW
        if not least <= self.window <= most:
            raise ValueError(f"a window of {self.window:g} s is not between {least:g} s and {most:g} s")
        if not 0.000001 <= self.stall <= self.window:
            raise ValueError(f"{self.stall:g} s is not within a window of {self.window:g} s")

    def check(self) -> None:
        """Raise `KernelError` where the calling thread may not ask for a window of that length."""
        if _microseconds(self.window) % _microseconds(_WINDOW_STEP) == 0:
            return
        if capability.CAP_SYS_RESOURCE not in capability.read_state().effective:
            raise KernelError(
                f"a pressure window of {self.window:g} s takes CAP_SYS_RESOURCE",
                path=f"{self.resource}.pressure",
                value=self.trigger,
                hint="choose a multiple of 2 s: 2, 4, 6, 8 or 10",
            )

    @property
    def trigger(self) -> str:
        """As the kernel reads it."""
        return f"{self.share} {_microseconds(self.stall)} {_microseconds(self.window)}"


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
