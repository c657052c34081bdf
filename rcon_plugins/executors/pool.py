"""A pool of waiting executor processes: some are spawned before they are needed; the least recently used end first."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import ConcurrencyLimitExceeded, RconError
from rcon_plugins.executors.executor import USABLE, Executor, Key, State
from rcon_plugins.executors.kept_memory import KeptMemory
from rcon_plugins.executors.process import DEATH_SECONDS, LOGGER, Monitor, ProcessExecutors

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

#: How long a request waits for an executor process that has just served another request, seconds.
SOON_SECONDS = 0.25
#: After so many seconds, kill an executor that did not report READY again: code of its last work keeps it busy.
LATE_SECONDS = 2.0
#: The most spare executors, of one use each, that may wait for one confinement.
MAX_SPARES = 3
#: After so many seconds without work, all spares except one end.
IDLE_SECONDS = 5.0
#: The least bound on executors that are ending. A killed process takes some milliseconds to end.
_FEWEST_ENDING = 16


class ExecutorPool:
    """At most ``most`` executor processes for all confinements, not counting those that are ending. Thread-safe.

    An executor serves one confinement as one identity until it ends, so a request can only take a waiting executor of
    the same confinement and identity. When the bound is reached, the least recently used waiting process is ended.
    ``is_kept`` returns whether the confinement of a name may still be used. When an executor is gone, ``on_end`` is
    called with the name of its confinement. ``on_spawn`` is called with the name of the confinement and its policy for
    each executor that is made, ``on_evict`` for each that ends to make room for another, and ``on_too_much_memory`` for
    each that `kept_memory` finds to keep too much.
    """

    def __init__(
        self,
        instance: Instance,
        hook: pluggy.HookRelay,
        most: int,
        *,
        monitor: Monitor,
        is_kept: Callable[[str], bool],
        on_end: Callable[[str], object],
        on_spawn: Callable[[str, Policy], object] = lambda *_: None,
        on_evict: Callable[[str, Policy], object] = lambda *_: None,
        on_too_much_memory: Callable[[str, Policy], object] = lambda *_: None,
        on_lost: Callable[[], object] | None = None,
        current: Callable[[Policy], Policy] = lambda policy: policy,
        key_of: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self.processes = ProcessExecutors(
            instance,
            hook,
            monitor=monitor,
            on_end=self._ended,
            on_lost=on_lost,
            current=current,
            key_of=key_of,
        )
        self.kept_memory = KeptMemory(on_too_much_memory)
        self._most = most
        self._is_kept = is_kept
        self._on_end = on_end
        self._on_spawn = on_spawn
        self._on_evict = on_evict
        self._lock = threading.Lock()
        #: The number of executors being spawned that are not yet registered in `ProcessExecutors`.
        self._spawning = 0
        #: Waiting executors by confinement and identity, the least recently used key first.
        self._waiting: OrderedDict[Key, list[Executor]] = OrderedDict()
        #: The number of spares wanted for a key whose executors serve one request each. It grows while spares are late.
        self._spares_wanted: dict[Key, int] = {}
        #: When an executor was last taken for each of these keys, the longest ago first. At most ``most`` keys.
        self._last_taken: OrderedDict[Key, float] = OrderedDict()
        self._overdue_check_scheduled = False

    def take(self, name: str, policy: Policy, identity: Identity | None = None) -> Executor:
        """Return a confined, waiting executor process of this confinement and identity. Spawn one if none waits.

        Raises `ConcurrencyLimitExceeded` if every executor process is busy; `PidsLimitExceeded`,
        `ConfinementError` or `KernelError` if none can be made.
        """
        executor = self._take_waiting((name, identity))
        if executor is None:
            self._make_room()
            executor = self._spawn(name, policy, identity)
        if executor.uses + 1 >= policy.max_uses and not _is_shared(policy):
            self._order_spares(executor)
        if not executor.pid:
            try:
                self.processes.wait_ready(executor)
            except BaseException:
                self.discard(executor, "it was not ready")
                executor.channel.close()
                raise
        return executor

    def try_one(self, name: str, policy: Policy, identity: Identity | None) -> None:
        """Make an executor process, end it, and wait a short time until it is gone. Raises as `take`."""
        executor = self.processes.spawn(name, policy, identity)
        try:
            self.processes.wait_ready(executor)
        finally:
            self.discard(executor, "it was made as a trial")
            executor.channel.close()
            executor.ended.wait(DEATH_SECONDS)

    def give_back(self, executor: Executor) -> None:
        """Return an executor whose work is over to the pool, where it waits for more work."""
        if self._put_back(executor) and not self._overdue_check_scheduled:
            self._overdue_check_scheduled = True
            self.processes.submit(self._end_overdue, time.monotonic() + LATE_SECONDS)

    def discard(self, executor: Executor, reason: str) -> None:
        """Kill an executor that must not be used again. Does not wait; the caller closes its channel."""
        self.processes.kill(executor, reason)

    def leave(self, executor: Executor) -> None:
        """End an executor process, and let processes that it started go on in its cgroup. Does not wait."""
        executor.leave_children()
        executor.channel.close()  # the executor process ends when its channel is closed
        self.processes.submit(partial(self._spawn_replacement, executor))

    def replace(self, executor: Executor, reason: str, *, in_order: bool = False) -> None:
        """Kill an executor that must not be used again, and have its replacement spawned. Does not wait.

        ``in_order``: it has no work and no other processes, and may end by itself.
        """
        (self.processes.end if in_order else self.discard)(executor, reason)
        self.processes.submit(partial(self._spawn_replacement, executor))

    def forget(self, name: str) -> None:
        """End the waiting executors of a confinement that is no longer kept. Does not wait."""
        with self._lock:
            keys = [key for key in self._waiting if key[0] == name]
            waiting = [executor for key in keys for executor in self._waiting.pop(key)]
            for key in [key for key in self._last_taken if key[0] == name]:
                del self._last_taken[key], self._spares_wanted[key]
        for executor in waiting:
            self._end_waiting(executor)

    def change(self, policies: Mapping[str, Policy]) -> None:
        """Apply changed policies. End waiting executors created under the old versions."""
        outdated = self.processes.change(policies)
        with self._lock:
            waiting = [one for one in outdated if one in self._waiting.get(one.key, ())]
            for executor in waiting:
                self._remove(executor)
        for executor in waiting:
            self._end_waiting(executor)

    def close(self) -> None:
        """End all executor processes. All are gone when it returns."""
        with self._lock:
            waiting = [executor for some in self._waiting.values() for executor in some]
            self._waiting.clear()
        try:
            self.processes.close()
        finally:
            for executor in waiting:
                executor.channel.close()

    # -- waiting executors ------------------------------------------------------------------------

    def _take_waiting(self, key: Key) -> Executor | None:
        late: list[Executor] = []
        try:
            while (executor := self._pop_waiting(key)) is not None and executor.pid:
                is_back = executor.is_back(0.0 if late else SOON_SECONDS)
                if is_back:
                    break
                if is_back is None and time.monotonic() < executor.since + LATE_SECONDS:
                    late.append(executor)
                else:
                    # It died, or code of an earlier request still sends or keeps it busy: no other request may use it.
                    self.discard(executor, "it is no longer needed")
                    executor.channel.close()
            return executor
        finally:
            for one in reversed(late):
                self._put_back(one)

    def _pop_waiting(self, key: Key) -> Executor | None:
        with self._lock:
            waiting = self._waiting.get(key)
            if not waiting:
                return None
            # Take the executor that served last; among spares, which have not served, the oldest.
            executor = waiting.pop() if waiting[-1].pid else waiting.pop(0)
            if not waiting:
                del self._waiting[key]  # the number of identities over time is not bounded
            return executor

    def _put_back(self, executor: Executor) -> bool:
        with self._lock:
            if executor.state in USABLE:
                self._waiting.setdefault(executor.key, []).append(executor)
                self._waiting.move_to_end(executor.key)
                return True
        executor.channel.close()  # it has just been killed, or has died
        return False

    def _end_overdue(self) -> None:
        """Kill executors that do not report READY after their work. Called in the supervisor's thread."""
        self._overdue_check_scheduled = False
        latest = time.monotonic() - LATE_SECONDS
        with self._lock:
            returning = [
                one
                for some in self._waiting.values()
                for one in some
                if one.state is State.RETURNING and one.channel.quiet
            ]
            overdue = [one for one in returning if one.since <= latest]
            for executor in overdue:
                self._remove(executor)
        for executor in overdue:
            LOGGER.warning(
                "%s: code of the last request or task still runs; its process is killed", executor.name
            )
            self.replace(executor, "code of its last request or task still runs")
            executor.channel.close()
        if len(returning) > len(overdue):
            self._overdue_check_scheduled = True
            self.processes.submit(self._end_overdue, time.monotonic() + LATE_SECONDS)

    def _remove(self, executor: Executor) -> Executor:
        """Remove a waiting executor from the pool. Call it with the lock held."""
        waiting = self._waiting[executor.key]
        waiting.remove(executor)
        if not waiting:
            del self._waiting[executor.key]
        return executor

    def _end_waiting(self, executor: Executor) -> None:
        self.processes.end(executor, "it is no longer needed")
        executor.channel.close()

    # -- new executors ----------------------------------------------------------------------------

    def _order_spares(self, executor: Executor) -> None:
        """Have replacements spawned while the executor serves its last request.

        Until they serve, they use what they would use later too: CPU time of their confinement, and what the
        application opens in each (`rcon_executor_started`). If they would use memory or pids that the request under
        way may need, `take` does not call this: they are spawned later.
        """
        key = executor.key
        late = not executor.pid and executor.channel.quiet
        with self._lock:
            waiting = self._waiting.get(key, [])
            wanted = self._spares_wanted.get(key, 1)
            if late and key in self._spares_wanted:  # no spare can be ready for the first request
                wanted = min(wanted + 1, MAX_SPARES)
            elif waiting and not waiting[0].channel.quiet:
                wanted = max(wanted - 1, 1)
            trim_scheduled = bool(self._spares_wanted)
            self._spares_wanted[key] = wanted
            self._last_taken[key] = time.monotonic()
            self._last_taken.move_to_end(key)
            while len(self._last_taken) > self._most:
                del self._spares_wanted[self._last_taken.popitem(last=False)[0]]
            lacking = wanted - len(waiting)
        for _ in range(lacking):
            self.processes.submit(partial(self._spawn_replacement, executor))
        if not trim_scheduled:
            self.processes.submit(self._trim, time.monotonic() + IDLE_SECONDS)

    def _trim(self) -> None:
        """Keep only one spare for each key without a recent request. Called in the supervisor's thread."""
        long_ago = time.monotonic() - IDLE_SECONDS
        superfluous: list[Executor] = []
        with self._lock:
            for key in [key for key, when in self._last_taken.items() if when <= long_ago]:
                del self._last_taken[key], self._spares_wanted[key]
                superfluous += [self._remove(executor) for executor in self._waiting.get(key, [])[1:]]
            goes_on = bool(self._spares_wanted)
        for executor in superfluous:
            self._end_waiting(executor)
        if goes_on:
            self.processes.submit(self._trim, time.monotonic() + IDLE_SECONDS)

    def _make_room(self) -> None:
        """Count one more executor process. If the bound is reached, end a waiting one.

        As many may be ending: each of them still has its processes, its cgroup and its open files.
        """
        ending = self.processes.let_some_end(most_ending(self._most))
        if ending > most_ending(self._most):
            raise ConcurrencyLimitExceeded(
                f"{ending} executor processes of this server process were killed and have not ended yet",
                limit="processes",
            )
        spare: Executor | None = None
        with self._lock:
            if self._is_full():
                spare = next((self._remove(some[0]) for some in self._waiting.values()), None)
                if spare is None:
                    raise ConcurrencyLimitExceeded(
                        f"all {self._most} executor processes of this server process are busy; "
                        "raise the setting `processes` to allow more",
                        limit="processes",
                    )
            self._spawning += 1
        if spare is not None:
            self._on_evict(spare.name, spare.policy)
            self._end_waiting(spare)

    def _is_full(self) -> bool:
        """Return whether the bound on executor processes is reached. Call it with the lock held."""
        return self.processes.count_usable() + self._spawning >= self._most

    def _spawn(self, name: str, policy: Policy, identity: Identity | None) -> Executor:
        """Spawn an executor that ``_spawning`` counts already."""
        try:
            executor = self.processes.spawn(name, policy, identity)
            self._on_spawn(name, policy)
            return executor
        finally:
            with self._lock:
                self._spawning -= 1

    def _spawn_replacement(self, executor: Executor) -> None:
        """Spawn the replacement of an executor, if there is room and not enough spares wait already."""
        with self._lock:
            wanted = self._spares_wanted.get(executor.key, 1)
            superfluous = self._is_full() or len(self._waiting.get(executor.key, ())) >= wanted
            if superfluous or not self.processes.usable or not self._is_kept(executor.name):
                return
            self._spawning += 1
        try:
            self._put_back(self._spawn(executor.name, executor.policy, executor.identity))
            if not self._is_kept(executor.name):  # dropped meanwhile
                self.forget(executor.name)
        except (RconError, OSError) as error:
            LOGGER.error("no spare executor process could be made for %s: %s", executor.name, error)

    def _ended(self, executor: Executor) -> None:
        """Forget an executor that is gone, for whatever reason. Called in the supervisor's thread."""
        with self._lock:
            was_waiting = executor in self._waiting.get(executor.key, ())
            if was_waiting:
                self._remove(executor)
        if was_waiting:
            executor.channel.close()
        self._on_end(executor.name)


def most_ending(most: int) -> int:
    """Return how many executor processes may be ending beside ``most`` usable ones."""
    return max(most, _FEWEST_ENDING)


def _is_shared(policy: Policy) -> bool:
    """Return whether a spare process would use memory or pids that the work under way may need."""
    return policy.pids is not None or policy.memory is not None or policy.rlimits.nproc is not None
