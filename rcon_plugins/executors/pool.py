"""Waiting executor processes, made ahead of need and kept: least recently used out first."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import ConcurrencyLimitExceeded, RconError
from rcon_plugins.executors.process import LOGGER, Executor, ProcessExecutors

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.instance import Instance
    from rcon_plugins.policy import Policy


class ExecutorPool:
    """At most ``most`` executor processes of all confinements together. Thread-safe.

    An executor serves one confinement for life, so a waiting one can only be taken for its own. Where the bound is
    reached, a waiting process of the confinement that was used longest ago makes room.
    """

    def __init__(
        self,
        instance: Instance,
        hook: pluggy.HookRelay,
        most: int,
        on_empty: Callable[[str], object],
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        self.processes = ProcessExecutors(instance, hook, on_end=self._ended, on_lost=on_lost)
        self._most = most
        #: Called with the name of a confinement, in the supervisor's thread, when none of its executors is left.
        self._on_empty = on_empty
        self._living: Counter[str] = Counter()
        self._lock = threading.Lock()
        #: Waiting executors by confinement, the confinement used longest ago first.
        self._waiting: OrderedDict[str, list[Executor]] = OrderedDict()

    def take(self, name: str, policy: Policy) -> Executor:
        """A confined, waiting executor process of this confinement; makes one where none waits.

        Raises `ConcurrencyLimitExceeded` when every executor process is at work, `ConfinementError` or `KernelError`
        when none can be made.
        """
        executor = self._take_waiting(name)
        if executor is None:
            self._make_room(name)
            executor = self._birth(name, policy)
        if executor.pid == 0:
            try:
                self.processes.wait_ready(executor)
            except BaseException:
                executor.channel.close()
                raise
        return executor

    def give_back(self, executor: Executor) -> None:
        """Put an executor that finished its work back to wait for the next."""
        with self._lock:
            if not executor.ended.is_set():
                self._waiting.setdefault(executor.name, []).append(executor)
                self._waiting.move_to_end(executor.name)
                return
        executor.channel.close()

    def replace(self, executor: Executor, fate: str) -> None:
        """End an executor that must not be used again, and make its successor ahead of need. Does not wait."""
        executor.channel.close()
        self.processes.submit(partial(self._replace, executor, fate))

    def forget(self, name: str) -> None:
        """End the waiting executors of a confinement that is no longer kept. Does not wait."""
        with self._lock:
            for executor in self._waiting.pop(name, ()):
                self.processes.submit(partial(self._end, executor))

    def close(self) -> None:
        """End everything. Nothing is left when it returns."""
        self.processes.close()

    def _take_waiting(self, name: str) -> Executor | None:
        with self._lock:
            waiting = self._waiting.get(name)
            if not waiting:
                return None
            self._waiting.move_to_end(name)
            return waiting.pop()

    def _make_room(self, name: str) -> None:
        """Count one more executor process, at the expense of a waiting one if it must be."""
        with self._lock:
            if self._living.total() >= self._most:
                for waiting in self._waiting.values():
                    if waiting:
                        self.processes.submit(partial(self._end, waiting.pop(0)))
                        break
                else:
                    raise ConcurrencyLimitExceeded(
                        f"all {self._most} executor processes of this server process are at work; "
                        "the setting `processes` says how many there may be",
                        limit="processes",
                    )
            self._living[name] += 1

    def _birth(self, name: str, policy: Policy) -> Executor:
        try:
            return self.processes.birth(name, policy)
        except BaseException:
            self._one_less(name)
            raise

    def _replace(self, executor: Executor, fate: str) -> None:
        self.processes.kill(executor, fate)
        with self._lock:
            superfluous = self._living.total() > self._most or self._waiting.get(executor.name)
            if superfluous or not self.processes.usable:
                return
            self._living[executor.name] += 1
        try:
            self.give_back(self._birth(executor.name, executor.policy))
        except RconError as error:
            LOGGER.error("no executor process could be made ahead of need for %s: %s", executor.name, error)

    def _end(self, executor: Executor) -> None:
        self.processes.kill(executor, "no longer needed")
        executor.channel.close()

    def _ended(self, executor: Executor) -> None:
        """Called for each executor that ended, however it did."""
        with self._lock:
            waiting = self._waiting.get(executor.name, [])
            was_waiting = executor in waiting
            if was_waiting:
                waiting.remove(executor)
            if not waiting:
                self._waiting.pop(executor.name, None)
        if was_waiting:
            executor.channel.close()
        self._one_less(executor.name)

    def _one_less(self, name: str) -> None:
        with self._lock:
            self._living[name] -= 1
            empty = self._living[name] == 0
            if empty:
                del self._living[name]
        if empty:
            self._on_empty(name)
