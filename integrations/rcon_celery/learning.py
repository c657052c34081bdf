"""Retry that learns: a task that died of memory is tried again with more, and not for ever.

How often it died is in the headers of its message, so that any worker and any broker carries it on. A worker that dies
under a task writes no headers: so a task that is acknowledged late is counted in the result backend while it runs, and
what is found there by its next run are deaths too; kept as long as results are (``result_expires``). With a backend
that keeps no keys and values (``rpc``, a database) all that is known is that a message was delivered again: one death.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import Retry

from rcon_plugins.conversion import convert
from rcon_plugins.errors import ConcurrencyLimitExceeded, Killed, MemoryLimitExceeded, SettingsError
from rcon_plugins.memory import Factor
from rcon_plugins.policy import Policy
from rcon_plugins.units import Size

_log = logging.getLogger("rcon")

#: The header, and the attribute of a request, that says how often the task died.
DEATHS: Final = "rcon_deaths"
#: The header of a message in a dead-letter queue that says why it is there.
REASON: Final = "rcon_reason"
_DEFAULT_DEATHS: Final = 3


class OnMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a task that died of memory gets: so many times as much, and at most this. See `expand`."""

    expand: Factor
    up_to: Size


class Learning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `confined` says of deaths: its keywords ``on_memory``, ``max_deaths`` and ``dead_letter``."""

    on_memory: OnMemory | None = None
    max_deaths: int = _DEFAULT_DEATHS
    dead_letter: str | None = None

    @classmethod
    def make(cls, keywords: Mapping[str, Any]) -> Learning | None:
        """From those keywords of `confined` that are its own; None without any. Raises `SettingsError`."""
        given = {name: value for name, value in keywords.items() if name in cls.__struct_fields__}
        if not given:
            return None
        expansion = given.get("on_memory")
        if isinstance(expansion, Mapping) and not {*OnMemory.__struct_fields__} <= {*expansion}:
            raise SettingsError(
                "says too little", key="@confined: on_memory", hint='on_memory=expand("2x", up_to="2G")'
            )
        learning = convert(given, cls, "@confined")
        if learning.max_deaths < 1:
            raise SettingsError(
                f"{learning.max_deaths} deaths are none", key="@confined: max_deaths", hint="at least 1"
            )
        return learning

    def memory(self, policy: Policy, deaths: int) -> int | None:
        """The memory, in bytes, that a task gets after so many deaths of it; None for what its policy says."""
        limit = policy.each.memory
        if self.on_memory is None or limit is None or not deaths:
            return None
        return min(int(limit * self.on_memory.expand**deaths), max(self.on_memory.up_to, limit))


def expand(factor: str, *, up_to: str | int) -> Mapping[str, Any]:
    """For `confined`: ``on_memory=expand("2x", up_to="2G")``; a policy file would write a table of the two."""
    return {"expand": factor, "up_to": up_to}


class Lesson:
    """One delivery of a task that learns."""

    def __init__(self, task: Any, learning: Learning) -> None:
        self._task = task
        self._learning = learning
        #: Those that its message tells of: each was one of memory.
        self.deaths = int(getattr(task.request, DEATHS, None) or 0)
        self._policy: Policy | None = None

    def memory(self, policy: Policy) -> int | None:
        """The memory of this run under its policy, in bytes; None for what that says."""
        self._policy = policy
        return self._learning.memory(policy, self.deaths)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count this run, as long as it is under way, where its message is not acknowledged before.

        Raises `Killed` where it has died often enough.
        """
        if not self._task.acks_late:
            yield
            return
        backend = self._task.backend
        # Of this message: what a try sends off, to be tried again, may begin before that try has ended here.
        request = self._task.request
        key = f"rcon-runs-{request.id}-{request.retries or 0}-{self.deaths}"
        lost = self._lost(backend, key)
        try:
            if self.deaths + lost >= self._learning.max_deaths:
                error = Killed(
                    f"{self._task.name}: {lost} times the process that ran it ended, and it is not run again"
                )
                self._bury(error)
                raise error.plain()
            yield
        finally:
            if isinstance(backend, BaseKeyValueStoreBackend):
                backend.delete(key)

    def _lost(self, backend: Any, key: str) -> int:
        """How many runs of this task never came to an end of any kind."""
        if not isinstance(backend, BaseKeyValueStoreBackend):
            return int(bool((self._task.request.delivery_info or {}).get("redelivered")))
        lost = int(backend.get(key) or 0)  # by now there is no other run of it
        backend.set(key, str(lost + 1))
        return lost

    def after(self, error: MemoryLimitExceeded) -> Exception:
        """What to raise for a task that died of memory: `Retry` where it is tried again, else the error."""
        policy, deaths = self._policy, self.deaths + 1
        if self._learning.on_memory is None or policy is None:
            return error
        more = self._learning.memory(policy, deaths)
        had = self._learning.memory(policy, self.deaths) or policy.each.memory
        if more is None or had is None or more <= had or deaths >= self._learning.max_deaths:
            self._bury(error)
            return error
        _log.warning("rcon: %s; it is tried again with %.1f MiB", error, more / 2**20)
        retry: Exception = Retry(exc=error, when=0, sig=send_again(self._task, {DEATHS: deaths}))
        return retry

    def _bury(self, error: Exception) -> None:
        """Send the task to its dead-letter queue, if it has one."""
        if self._learning.dead_letter is not None:
            send_again(
                self._task, {DEATHS: self.deaths + 1, REASON: str(error)}, queue=self._learning.dead_letter
            )


def send_again(task: Any, headers: Mapping[str, Any], **options: Any) -> Any:
    """Send the message of a task that runs once more, with more headers; it is no try of the task's own."""
    request = task.request
    carried = {**(request.headers or {}), **headers}
    signature = task.signature_from_request(request, retries=request.retries, headers=carried, **options)
    signature.apply_async()
    return signature


def back_to_the_queue(task: Any, error: ConcurrencyLimitExceeded) -> Exception:
    """Send a task that was not begun to its queue, and what to raise for this run of it.

    As a new message, and not by rejecting the old one: that would come back as one under which a worker died, and is
    there no more where it was acknowledged early.
    """
    deaths = getattr(task.request, DEATHS, None)
    headers = {} if deaths is None else {DEATHS: deaths}
    pause = error.retry_after
    _log.warning("rcon: %s: %s; it goes back to its queue", task.name, error)
    retry: Exception = Retry(exc=error, when=pause, sig=send_again(task, headers, countdown=pause))
    return retry


def run(task: Any, learning: Learning, confine: Callable[[Lesson], Any]) -> Any:
    """Have a task run by ``confine``, with what its deaths so far have taught, and act on the next one."""
    lesson = Lesson(task, learning)
    with lesson.counted():
        try:
            return confine(lesson)
        except MemoryLimitExceeded as error:
            raise lesson.after(error) from None
