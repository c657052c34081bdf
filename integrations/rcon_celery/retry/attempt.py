"""Retry with more memory: run a task that died at its memory limit again with a higher limit, a few times.

The headers of the message hold the count of deaths, so any worker and any broker can continue it. A worker that dies
with its task writes no headers. So a task that is acknowledged late holds a lease in the result backend while it runs
(`rcon_celery.retry.lease`). Its next run finds the lease and counts a death. A backend without keys and values
(``rpc``, a database) cannot hold a lease. Then the broker's redelivered flag counts as a death, and the message is sent
again with that death in its headers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
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

#: ``max_deaths`` if neither the task nor its policy sets it.
_DEFAULT_MAX_DEATHS: Final = 3
#: How many times to send a task without a retry policy again after its process was lost.
_MAX_LOST: Final = 10


class ProcessLost(Exception):
    """Raised when the process of a task that is acknowledged late ended, and the task is to run again.

    Its fork server ended, so the task may not be the cause, or the task has ``reject_on_worker_lost``.
    """


def after_lost_process(task: Any, error: Killed, *, with_fork_server: bool) -> Exception:
    """Return the exception to raise after the process of a task ended, and no limit was the cause.

    That is `Retry` for a task with ``retry_on_worker_lost``, as long as it has retries left, and `ProcessLost` for one
    that is acknowledged late and has ``reject_on_worker_lost``, or whose fork server ended (``with_fork_server``): the
    task may not be the cause of that. Otherwise it is the error itself.
    """
    if task.retry_on_worker_lost:
        most = task.max_retries
        if most is not None and task.request.retries >= most:
            return error
        pause = task.default_retry_delay
        try:
            redelivery.retry(task, pause)
        except OperationalError as problem:
            _log.warning("rcon: %s[%s] could not be retried: %s", task.name, task.request.id, problem)
        else:
            retry: Exception = Retry(exc=error, when=pause)
            return retry
    if task.acks_late and (with_fork_server or task.reject_on_worker_lost):
        return ProcessLost(str(error))
    return error


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What happens after a task died: the keys ``on_memory``, ``max_deaths`` and ``dead_letter`` of a policy.

    Keywords of `confined` override the keys of the policy.
    """

    on_memory: OnMemory | None = None
    max_deaths: Annotated[int, Meta(ge=1)] | None = None
    dead_letter: Annotated[str, Meta(min_length=1)] | None = None

    @classmethod
    def make(cls, keywords: Mapping[str, Any]) -> RetryPolicy | None:
        """Return the retry policy from keywords of `confined`; None without any. Raises `SettingsError`."""
        return convert(dict(keywords), cls, "@confined") if keywords else None

    @classmethod
    def of(cls, policy: Policy | None, own: RetryPolicy | None) -> RetryPolicy | None:
        """Return the retry policy of a policy, overridden by the keys of the task; None if neither has such keys."""
        if policy is None or not policy.retry_keys:
            return own
        keys = {name: getattr(policy, name) for name in cls.__struct_fields__}
        return cls(**keys) if own is None else cls(**{**keys, **own.keys()})

    def keys(self) -> dict[str, Any]:
        """Return the keys that are set."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}

    @property
    def most_deaths(self) -> int:
        """The number of deaths after which the task fails and is not retried."""
        return self.max_deaths or _DEFAULT_MAX_DEATHS

    def memory(self, policy: Policy, deaths: int) -> int | None:
        """Return the memory limit, in bytes, after so many deaths; None to keep the policy's limit."""
        limit = policy.each.memory
        if self.on_memory is None or limit is None or not deaths:
            return None
        return self.on_memory.after(limit.limit, deaths)


def expand(factor: str, *, up_to: str | int) -> Mapping[str, Any]:
    """Return the value of ``on_memory`` for `confined`: ``on_memory=expand("2x", up_to="2G")``.

    A policy file writes a table: ``on_memory = { expand = "2x", up_to = "2G" }``.
    """
    return {"expand": factor, "up_to": up_to}


class Attempt:
    """One delivery of a task: its deaths so far, and the reaction to another death."""

    def __init__(self, task: Any, retry_policy: RetryPolicy | None) -> None:
        self._task = task
        self._retry_policy = retry_policy
        #: How often the task died at its memory limit; how often the process that ran it ended; the broker's flag.
        self.deaths, self.lost, self.redelivered = redelivery.history_of(task)
        self._policy: Policy | None = None

    def memory(self, policy: Policy) -> int | None:
        """Return the memory limit of this attempt, in bytes; None to keep the policy's limit."""
        self._policy = policy
        return self._retry_policy.memory(policy, self.deaths) if self._retry_policy is not None else None

    @contextlib.contextmanager
    def leased(self, heartbeat: Heartbeat) -> Iterator[None]:
        """Hold the lease of a task that is acknowledged late while the ``with`` block runs it.

        Raises `Ignore` or `Reject` if the task must not run now, `Killed` if it died too often.
        """
        lease = Lease(
            self._task,
            heartbeat,
            counts_deaths=self._retry_policy is not None,
            redelivered=self.redelivered,
        )
        self.lost += lease.lost
        if self._retry_policy is not None and self.deaths + self.lost >= self._retry_policy.most_deaths:
            lease.delete()
            raise self._died_too_often()
        if lease.lost and not lease.is_stored:
            # Only a message can keep the count, so send a new one.
            raise self._resend("the broker delivered it again")
        with lease.held():
            try:
                yield
            except ProcessLost as error:
                raise self._after_lost_process(str(error)) from None

    def back_to_queue(self, error: ConcurrencyLimitExceeded) -> Exception | None:
        """Send a task that did not begin back to its queue. Return the exception to raise; None if sending failed.

        Send a new message. A rejected message would come back with the redelivered flag and count as a death; after an
        early acknowledgement the broker no longer has the message.
        """
        _log.warning("rcon: %s: %s; sent back to its queue", self._task.name, error)
        return self._retry(error, error.retry_after, countdown=error.retry_after)

    def after_memory_death(self, error: MemoryLimitExceeded) -> Exception:
        """Return the exception to raise after the task died at its memory limit: `Retry`, or the error itself."""
        rules, policy, deaths = self._retry_policy, self._policy, self.deaths + 1
        if rules is None or rules.on_memory is None or policy is None:
            return error
        limit = policy.each.memory
        before = rules.memory(policy, self.deaths) or (limit.limit if limit is not None else None)
        after = rules.memory(policy, deaths)
        if before is None or after is None or after <= before or deaths + self.lost >= rules.most_deaths:
            self._send_to_dead_letters(error, deaths)
            return error
        _log.warning("rcon: %s; retried with a limit of %.1f MiB", error, after / 2**20)
        self.deaths = deaths
        return self._retry(error, 0) or error

    def _retry(self, error: Exception, pause: float, **options: Any) -> Exception | None:
        """Send the message again. Return the exception to raise; None if sending failed."""
        try:
            signature = redelivery.resend(self._task, self.deaths, self.lost, **options)
        except OperationalError as problem:
            return self._sending_failed(problem)
        retry: Exception = Retry(exc=error, when=pause, sig=signature)
        return retry

    def _sending_failed(self, problem: Exception) -> Exception | None:
        """Return the exception to raise while the broker is unreachable. It still has a message acknowledged late."""
        _log.warning(
            "rcon: %s[%s] could not be sent to the broker: %s",
            self._task.name,
            self._task.request.id,
            problem,
        )
        if not self._task.acks_late:
            return None
        reject: Exception = Reject(str(problem), requeue=True)
        return reject

    def _after_lost_process(self, detail: str) -> Exception:
        """Return the exception to raise after the process of the task was lost."""
        self.lost += 1
        most = _MAX_LOST if self._retry_policy is None else self._retry_policy.most_deaths
        if self.deaths + self.lost >= most:
            return self._died_too_often()
        return self._resend(detail)

    def _died_too_often(self) -> Exception:
        times = "once" if self.lost == 1 else f"{self.lost} times"
        error = Killed(
            f"{self._task.name}: the process that ran it ended {times}; not retried. "
            "Look into the logs of the worker and of the kernel for the cause, then send it again"
        )
        self._send_to_dead_letters(error, self.deaths)
        return error.plain()

    def _resend(self, why: str) -> Exception:
        """Send the message again with the deaths known so far. Return the exception to raise for this attempt."""
        try:
            redelivery.resend(self._task, self.deaths, self.lost)
        except OperationalError as problem:
            return self._sending_failed(problem) or problem
        _log.warning("rcon: %s: %s; retried", self._task.name, why)
        ignore: Exception = Ignore(why)
        return ignore

    def _send_to_dead_letters(self, error: Exception, deaths: int) -> None:
        """Send the task to its dead-letter queue, unless it has none or came from there."""
        if self._retry_policy is None or self._retry_policy.dead_letter is None:
            return
        if redelivery.was_dead_letter(self._task):
            _log.error("rcon: %s; it came from a dead-letter queue and is not sent there again", error)
            return
        try:
            redelivery.resend(self._task, deaths, self.lost, str(error), queue=self._retry_policy.dead_letter)
        except OperationalError as problem:
            self._sending_failed(problem)
