"""The base of every admission: a unit of work, its host, and exactly one outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from rcon_plugins.ending import Ending
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.work import Work

_Result = TypeVar("_Result")

#: The endings that the service itself reports: done, raised, or returned a result above ``max_result``.
Finished = Literal["ok", "error", "result"]


class Host(Protocol):
    """The attributes of a confinement that its admissions use."""

    policy: Policy
    #: The key of the confinement; None if the policy has none.
    key: str | None
    #: The name of the confinement, which is also the name of its cgroup.
    name: str
    #: The number of admissions under way. Its manager counts them.
    users: int
    #: The number of forks that the kernel has refused in the confinement's cgroup, when last read; None if never read.
    pids_limit_hits: int | None

    def conclude(self, admission: Admission, /) -> None:
        """Release what the admission holds and report ``admission.outcome``. Called once for each admission."""


class Admission:
    """One unit of work that may run. The first call of `finish`, `abort` or `ProcessAdmission.died` ends it.

    Later calls change nothing and return the same outcome.
    """

    #: How the work ended; None while it is under way.
    outcome: Outcome | None = None

    def __init__(self, host: Host, work: Work, reservation: Reservation) -> None:
        self.host = host
        self.work = work
        self.reservation = reservation
        self.policy = host.policy
        self.key = host.key
        self._started = time.monotonic()

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        """Conclude work that ran to its end (``"ok"``), raised (``"error"``), or whose result is too large."""
        raise NotImplementedError

    def abort(self, detail: str) -> Outcome:
        """Stop the work, and conclude it as ``"aborted"``."""
        raise NotImplementedError

    def _conclude(
        self,
        ending: Ending,
        usage: Usage,
        *,
        limit: str | None = None,
        signal_number: int | None = None,
        detail: str = "",
        needed_kill: bool | None = None,
        left_behind: int = 0,
    ) -> Outcome:
        self.outcome = outcome = Outcome(
            ending=ending,
            usage=usage,
            policy=self.policy.name,
            key=self.key,
            limit=limit,
            signal=signal_number,
            detail=detail,
            needed_kill=needed_kill,
            left_behind=left_behind,
        )
        self.host.conclude(self)
        return outcome


class LocalAdmission(Admission):
    """Admission of work that runs in a thread of this process: each function that is passed to `call`."""

    #: Whether any of the work ran.
    ran = False

    def refuse(self, detail: str) -> Outcome:
        """Conclude work that did not run, because its thread could not be confined, as ``"refused"``."""
        raise NotImplementedError

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Call ``function`` confined. Return its result, or raise what it raises. Set ``ran`` once it is called."""
        raise NotImplementedError
