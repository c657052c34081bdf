"""One work that may run, from its start to its one outcome: what both kinds have in common."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal, Protocol

from rcon_plugins.outcome import Ending, Outcome
from rcon_plugins.usage import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.confinement import Confinement
    from rcon_plugins.confinement.isolation import Isolation
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.work import Work


#: How work ends that its service is done with.
Finished = Literal["ok", "error", "result"]


class Host(Protocol):
    """What an admission needs of the manager that made it."""

    #: Settles the few races between a work's own thread and the supervisor. Held for moments.
    lock: threading.Lock

    def policy_cgroup(self, confinement: Confinement) -> Cgroup:
        """The cgroup that holds all the work of a confinement that runs in processes."""

    def concluded(
        self, work: Work, confinement: Confinement, reservation: Reservation, outcome: Outcome
    ) -> None:
        """Take note of a work's outcome, once."""


class Admission:
    """One work that may run. Exactly one of `finish`, `died` and `abort` ends it; more calls change nothing."""

    isolation: Isolation

    def __init__(self, host: Host, work: Work, confinement: Confinement, reservation: Reservation) -> None:
        self.work = work
        self.confinement = confinement
        self._host = host
        self._reservation = reservation
        self._started = time.monotonic()
        self._outcome: Outcome | None = None

    @property
    def outcome(self) -> Outcome | None:
        """How the work ended; None while it is under way."""
        return self._outcome

    @property
    def policy(self) -> Policy:
        """The policy the work runs under."""
        return self.confinement.policy

    @property
    def key(self) -> str | None:
        """The key of its confinement, where the policy has one for each."""
        return self.confinement.key

    @property
    def name(self) -> str:
        """The name of its confinement, which is that of its cgroup."""
        return self.confinement.name

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        """The work ran to its end, or its own code raised; ``"result"``: it did, and says more than is taken."""
        raise NotImplementedError

    def died(self) -> Outcome:
        """The channel to the work's executor is closed: find out how it ended."""
        raise NotImplementedError

    def abort(self, detail: str) -> Outcome:
        """Stop the work, which nobody waits for any more."""
        raise NotImplementedError

    def _conclude(
        self,
        ending: Ending,
        usage: Usage,
        *,
        limit: str | None = None,
        signal_number: int | None = None,
        detail: str = "",
    ) -> Outcome:
        outcome = Outcome(
            ending=ending,
            usage=usage,
            policy=self.policy.name,
            key=self.key,
            limit=limit,
            signal=signal_number,
            detail=detail,
        )
        self._outcome = outcome
        self._host.concluded(self.work, self.confinement, self._reservation, outcome)
        return outcome
