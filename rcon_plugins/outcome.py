"""How work ended."""

from __future__ import annotations

from typing import Literal

import msgspec

from rcon_plugins import errors
from rcon_plugins.usage import Usage

Ending = Literal[
    "ok",  # the work ran to its end
    "error",  # the work's own code raised
    "memory",  # killed at a memory limit
    "timeout",  # killed at the end of its wall time
    "pids",  # failed because it may start no more processes
    "result",  # what it returned, or raised, is longer than its policy allows
    "concurrency",  # never started: as much of this work is under way as the policy allows
    "killed",  # its process ended by a signal or by itself before the work was done
    "aborted",  # stopped by the host: its client went away, or the server stops
    "refused",  # never started: it could not be confined
    "forbidden",  # never started: the identity it would get is not allowed
]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one work ended.

    ``limit`` is the limit that ended it, as the policy spells it (``each.memory``), and ``detail`` one
    sentence for people. ``signal`` is set where its process was ended by one.
    """

    ending: Ending
    usage: Usage = Usage()
    policy: str = ""
    key: str | None = None
    limit: str | None = None
    signal: int | None = None
    detail: str = ""

    @property
    def ran_into_limit(self) -> bool:
        """Whether a limit of the policy ended the work."""
        return self.ending in _EXCEEDED

    def error(self) -> errors.RconError | None:
        """The exception that tells this outcome, or None where the work's own result does."""
        exceeded = _EXCEEDED.get(self.ending)
        if exceeded is not None:
            return exceeded(
                self.detail, policy=self.policy, key=self.key, limit=self.limit or "", usage=self.usage
            )
        if self.ending == "killed":
            return errors.Killed(self.detail, self.signal, self.usage)
        if self.ending == "forbidden":
            return errors.IdentityRefused(self.detail)
        if self.ending == "refused":
            return errors.ConfinementError(self.detail)
        return None


_EXCEEDED: dict[str, type[errors.LimitExceeded]] = {
    "memory": errors.MemoryLimitExceeded,
    "timeout": errors.TimeLimitExceeded,
    "pids": errors.PidsLimitExceeded,
    "result": errors.ResultTooLarge,
    "concurrency": errors.ConcurrencyLimitExceeded,
}
