"""Retry that learns: a task that died of memory is tried again with more, and not for ever.

How often it died is in the headers of its message, so that any worker and any broker carries it on. A worker that dies
under a task writes no headers: so a task that is acknowledged late is noted in the result backend while it runs (see
`rcon_celery.retry.lease`), and what is found there by its next run are deaths too. With a backend that keeps no keys
and values (``rpc``, a database), or none, all that is known is that a message was delivered again: it is sent once
more, with that as a death in its headers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec
from celery.exceptions import Ignore, Reject, Retry
from kombu.exceptions import OperationalError
from msgspec import Meta

from rcon_celery.retry import redelivery
from rcon_celery.retry.lease import Heartbeat, Lease
from rcon_plugins.errors import ConcurrencyLimitExceeded, Killed, MemoryLimitExceeded
from rcon_plugins.settings.conversion import convert
from rcon_plugins.settings.memory import OnMemory
from rcon_plugins.settings.policy import Policy

_log = logging.getLogger("rcon")

#: Where nothing else is said.
_DEFAULT_DEATHS: Final = 3
#: How often a task may be sent once more whose fork server was ended under it, where nobody counts its deaths.
_MOST_LOST: Final = 10


class ServerLost(Exception):
    """Raised where the fork server ended under a task that is acknowledged late: by no fault of its own, may be."""


class Learning(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a task that died: the keys ``on_memory``, ``max_deaths`` and ``dead_letter`` of its policy.

    Those that `confined` says beside the name of a policy go before the policy's.
    """

    on_memory: OnMemory | None = None
    max_deaths: Annotated[int, Meta(ge=1)] | None = None
    dead_letter: Annotated[str, Meta(min_length=1)] | None = None

    @classmethod
    def make(cls, keywords: Mapping[str, Any]) -> Learning | None:
        """From the keywords of `confined` that are its own; None without any. Raises `SettingsError`."""
        return convert(dict(keywords), cls, "@confined") if keywords else None

    @classmethod
    def of(cls, policy: Policy | None, own: Learning | None) -> Learning | None:
        """What a policy says, and before it what a task says itself; None where nobody says anything."""
        if policy is None or not policy.wants_tries:
            return own
        said = {name: getattr(policy, name) for name in cls.__struct_fields__}
        return cls(**said) if own is None else cls(**{**said, **own.said()})

    def said(self) -> dict[str, Any]:
        """What is said, by its key."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}

    @property
    def most_deaths(self) -> int:
        """After how many deaths the task is not tried again."""
        return self.max_deaths or _DEFAULT_DEATHS

    def memory(self, policy: Policy, deaths: int) -> int | None:
        """The memory, in bytes, that a task gets after so many deaths of it; None for what its policy says."""
        limit = policy.each.memory
        if self.on_memory is None or limit is None or not deaths:
            return None
        return self.on_memory.after(limit, deaths)


def expand(factor: str, *, up_to: str | int) -> Mapping[str, Any]:
    """For `confined`: ``on_memory=expand("2x", up_to="2G")``; a policy file writes a table of the two."""
    return {"expand": factor, "up_to": up_to}


class Attempt:
    """One delivery of a task: how often it died so far, and what that comes to."""

    def __init__(self, task: Any, learning: Learning | None) -> None:
        self._task = task
        self._learning = learning
        #: Those that its message tells of: each was one of memory.
        self.deaths = redelivery.count(task, redelivery.DEATHS)
        #: How often the process that ran it ended.
        self.lost = redelivery.count(task, redelivery.LOST)
        self._policy: Policy | None = None

    def memory(self, policy: Policy) -> int | None:
        """The memory of this run under its policy, in bytes; None for what that says."""
        self._policy = policy
        return self._learning.memory(policy, self.deaths) if self._learning is not None else None

    def run(self, pulse: Heartbeat, confine: Callable[[Attempt], Any]) -> Any:
        """Run the task by ``confine``, if it did not die too often, and act on its death."""
        if not self._task.acks_late:
            return self._try(confine)
        delivery = Lease(self._task, pulse, counts=self._learning is not None)
        self.lost += delivery.lost
        if self._learning is not None and self.deaths + self.lost >= self._learning.most_deaths:
            delivery.forget()
            raise self._too_often()
        if delivery.lost and not delivery.is_noted:
            # The message alone can keep the count, so that another one has to.
            raise self._once_more("it was delivered again")
        with delivery.under_way():
            try:
                return self._try(confine)
            except ServerLost as error:
                raise self._after_loss(str(error)) from None

    def back_to_the_queue(self, error: ConcurrencyLimitExceeded) -> Exception | None:
        """Send a task that was not begun to its queue, and what to raise for this run of it; None if it cannot be sent.

        As a new message, and not by rejecting the old one: that would come back as one under which a worker died, and
        is there no more where it was acknowledged early.
        """
        pause = error.retry_after
        _log.warning("rcon: %s: %s; it goes back to its queue", self._task.name, error)
        return self._retry(error, pause, countdown=pause)

    def _retry(self, error: Exception, pause: float, **options: Any) -> Exception | None:
        """Send its message once more, and what to raise for this run of it; None if it cannot be sent."""
        try:
            retry: Exception = Retry(exc=error, when=pause, sig=self._sent(**options))
        except OperationalError as problem:
            return self._not_sent(problem)
        return retry

    def _sent(self, **options: Any) -> Any:
        """Its message, sent once more, with what is known."""
        return redelivery.send_again(self._task, self.deaths, self.lost, **options)

    def _not_sent(self, problem: Exception) -> Exception | None:
        """What to raise where the broker cannot be reached, which still has the message of a late acknowledgement."""
        _log.warning("rcon: %s[%s] cannot be sent: %s", self._task.name, self._task.request.id, problem)
        if not self._task.acks_late:
            return None
        reject: Exception = Reject(str(problem), requeue=True)
        return reject

    def _try(self, confine: Callable[[Attempt], Any]) -> Any:
        try:
            return confine(self)
        except MemoryLimitExceeded as error:
            raise self._after(error) from None

    def _after(self, error: MemoryLimitExceeded) -> Exception:
        """What to raise for a task that died of memory: `Retry` where it is tried again, else the error."""
        learning, policy, deaths = self._learning, self._policy, self.deaths + 1
        if learning is None or learning.on_memory is None or policy is None:
            return error
        more = learning.memory(policy, deaths)
        had = learning.memory(policy, self.deaths) or policy.each.memory
        if more is None or had is None or more <= had or deaths + self.lost >= learning.most_deaths:
            self._reap(error, deaths)
            return error
        _log.warning("rcon: %s; it is tried again with %.1f MiB", error, more / 2**20)
        self.deaths = deaths
        return self._retry(error, 0) or error

    def _after_loss(self, detail: str) -> Exception:
        """What to raise for a task whose fork server ended."""
        self.lost += 1
        most = _MOST_LOST if self._learning is None else self._learning.most_deaths
        if self.deaths + self.lost >= most:
            return self._too_often()
        return self._once_more(detail)

    def _too_often(self) -> Exception:
        error = Killed(
            f"{self._task.name}: {self.lost} times the process that ran it ended, and it is not run again"
        )
        self._reap(error, self.deaths)
        return error.plain()

    def _once_more(self, why: str) -> Exception:
        """Send the message again, with what is known, and what to raise for this run."""
        try:
            self._sent()
        except OperationalError as problem:
            return self._not_sent(problem) or problem
        _log.warning("rcon: %s: %s; it is tried again", self._task.name, why)
        ignore: Exception = Ignore(why)
        return ignore

    def _reap(self, error: Exception, deaths: int) -> None:
        """Send the task to its dead-letter queue, if it has one and does not come from there."""
        if self._learning is None or self._learning.dead_letter is None:
            return
        if redelivery.was_buried(self._task):
            _log.error("rcon: %s; it has been in a dead-letter queue, and does not go there again", error)
            return
        try:
            redelivery.send_again(self._task, deaths, self.lost, str(error), queue=self._learning.dead_letter)
        except OperationalError as problem:
            self._not_sent(problem)
