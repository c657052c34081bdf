"""The outcome of work: how it ended, and what it used."""

from __future__ import annotations

import msgspec

from rcon_plugins import errors
from rcon_plugins.ending import Ending
from rcon_plugins.work import Usage


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one unit of work ended.

    ``limit`` is the limit that ended it, as the policy spells it (``each.memory``), and ``detail`` one sentence for
    people. ``signal`` is set where a signal ended its process. ``needed_kill``: at its wall time limit it got SIGTERM,
    and after its grace SIGKILL had to end some of it (True) or not (False). None: it got no SIGTERM. ``left_behind`` is
    the number of processes that the work left behind and that were ended after it; threads that it left in its own
    process count as one.
    """

    ending: Ending
    usage: Usage = Usage()
    policy: str = ""
    key: str | None = None
    limit: str | None = None
    signal: int | None = None
    detail: str = ""
    needed_kill: bool | None = None
    left_behind: int = 0

    @property
    def ran_into_limit(self) -> bool:
        """Whether a limit of the policy ended the work."""
        return self.ending in _EXCEEDED

    def error(self) -> errors.RconError | None:
        """Return the exception for this outcome; None where the work returned or raised by itself."""
        exceeded = _EXCEEDED.get(self.ending)
        if exceeded is not None:
            return exceeded(
                self.detail, policy=self.policy, key=self.key, limit=self.limit or "", usage=self.usage
            )
        if self.ending == "killed":
            return errors.Killed(self.detail, self.signal, self.usage)
        if self.ending == "forbidden":
            return errors.IdentityRefused(self.detail)
        if self.ending == "unroutable":
            return errors.Unroutable(self.detail)
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
