"""Waiting executor processes, made ahead of need and kept: least recently used out first."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import ConcurrencyLimitExceeded, RconError
from rcon_plugins.executors.channel import ChannelClosed, ChannelTimeout
from rcon_plugins.executors.executor import Executor, Key
from rcon_plugins.executors.fork_server import READY
from rcon_plugins.executors.process import LOGGER, ProcessExecutors

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.executors.monitor import Monitor
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

#: How long the next work waits for an executor process that has just served another, seconds.
SOON_SECONDS = 0.25
#: After how long one that does not wait for work again is ended: something of its last work holds it up.
LATE_SECONDS = 2.0
#: How many executors may wait that serve one work each, beyond those at work, while that many are needed.
MOST_AHEAD = 3
#: After how long without work all but one of them end, seconds.
IDLE_SECONDS = 5.0


class ExecutorPool:
    """At most ``most`` executor processes of all confinements together, not counting those that are dying. Thread-safe.

    An executor serves one confinement, as one identity, for life, so a waiting one can only be taken for its own.
    Where the bound is reached, a waiting process of those that were used longest ago makes room. ``is_kept`` says if a
    confinement, by name, may still be used; ``on_end`` is called with its name when an executor is gone.
    """

    def __init__(
        self,
        instance: Instance,
        hook: pluggy.HookRelay,
        most: int,
        *,
        is_kept: Callable[[str], bool],
        on_end: Callable[[str], object],
        on_lost: Callable[[], object] | None = None,
        monitor: Monitor,
        current: Callable[[Policy], Policy] = lambda policy: policy,
    ) -> None:
        self.processes = ProcessExecutors(
            instance, hook, on_end=self._ended, on_lost=on_lost, monitor=monitor, current=current
        )
        self._most = most
        self._is_kept = is_kept
        self._on_end = on_end
        self._count = 0
        self._lock = threading.Lock()
        #: Waiting executors, those of the confinement and identity used longest ago first.
        self._waiting: OrderedDict[Key, list[Executor]] = OrderedDict()
        #: How many are to wait where each serves one work only: more than one, while they are not ready in time.
        self._spares_wanted: dict[Key, int] = {}
        self._last_taken: dict[Key, float] = {}
        #: Whether it will be looked whether those that were given back wait again.
        self._overdue_check_scheduled = False

    def take(self, name: str, policy: Policy, identity: Identity | None = None) -> Executor:
        """A confined, waiting executor process of this confinement and identity; makes one where none waits.

        Raises `ConcurrencyLimitExceeded` when every executor process is at work; `PidsLimitExceeded`,
        `ConfinementError` or `KernelError` when none can be made.
        """
        executor = self._take_waiting((name, identity))
        if executor is None:
            self._make_room()
            executor = self._birth(name, policy, identity)
        if executor.works + 1 >= policy.max_uses and not _is_shared(policy):
            self._look_ahead(executor)
        if executor.pid == 0:
            try:
                self.processes.wait_ready(executor)
            except BaseException:
                self.discard(executor, "not ready")
                executor.channel.close()
                raise
        return executor

    def give_back(self, executor: Executor) -> None:
        """Put an executor that finished its work back to wait for the next."""
        executor.given_back = now = time.monotonic()
        if self._put_back(executor) and executor.away and not self._overdue_check_scheduled:
            self._overdue_check_scheduled = True
            self.processes.submit(self._end_those_that_are_late, now + LATE_SECONDS)

    def discard(self, executor: Executor, fate: str) -> None:
        """End an executor that must not be used again. Does not wait; the caller closes its channel."""
        self._uncount(executor)
        self.processes.kill(executor, fate)

    def leave(self, executor: Executor) -> None:
        """End an executor process, and let what it started go on in its cgroup. Does not wait."""
        self._uncount(executor)
        executor.spared = True
        executor.channel.close()  # which ends it
        self.processes.submit(partial(self._spawn_replacement, executor))

    def replace(self, executor: Executor, fate: str) -> None:
        """End an executor that must not be used again, and make its successor ahead of need. Does not wait."""
        self.discard(executor, fate)
        self.processes.submit(partial(self._spawn_replacement, executor))

    def forget(self, name: str) -> None:
        """End the waiting executors of a confinement that is no longer kept. Does not wait."""
        with self._lock:
            keys = [key for key in self._waiting if key[0] == name]
            waiting = [executor for key in keys for executor in self._waiting.pop(key)]
        for executor in waiting:
            self._end_waiting(executor)

    def change(self, policies: Mapping[str, Policy]) -> None:
        """These policies are otherwise now: no executor that was made by one of before serves another work."""
        old = self.processes.change(policies)
        with self._lock:
            waiting = [one for one in old if one in self._waiting.get(one.key, ())]
            for executor in waiting:
                self._remove(executor)
        for executor in waiting:
            self._end_waiting(executor)

    def close(self) -> None:
        """End everything. Nothing is left when it returns."""
        with self._lock:
            waiting = [executor for some in self._waiting.values() for executor in some]
            self._waiting.clear()
        try:
            self.processes.close()
        finally:
            for executor in waiting:
                executor.channel.close()

    def _look_ahead(self, executor: Executor) -> None:
        """Have successors made while the executor serves its last work.

        They count as none: nothing of their confinement's is spent on them but the CPU time that they take in any case.
        Where they would take up memory or a place that the work under way may need, they are made after it instead.
        """
        key = executor.key
        late = executor.pid == 0 and executor.channel.quiet
        with self._lock:
            waiting = self._waiting.get(key, [])
            wanted = self._spares_wanted.get(key, 1)
            if late and key in self._spares_wanted:  # the first of all cannot have been made ahead
                wanted = min(wanted + 1, MOST_AHEAD)
            elif waiting and not waiting[0].channel.quiet:
                wanted = max(wanted - 1, 1)
            trims = bool(self._spares_wanted)  # as long as there is something to forget
            self._spares_wanted[key] = wanted
            self._last_taken[key] = time.monotonic()
            lacking = wanted - len(waiting)
        for _ in range(lacking):
            self.processes.submit(partial(self._spawn_replacement, executor))
        if not trims:
            self.processes.submit(self._trim, time.monotonic() + IDLE_SECONDS)

    def _trim(self) -> None:
        """Let no more than one wait where nobody has come for a while. In the supervisor."""
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

    def _take_waiting(self, key: Key) -> Executor | None:
        late: list[Executor] = []
        try:
            while (executor := self._pop_waiting(key)) is not None and executor.pid != 0:
                is_back = self._is_back(executor, 0.0 if late else SOON_SECONDS)
                if is_back:
                    break
                if is_back is None and time.monotonic() < executor.given_back + LATE_SECONDS:
                    late.append(executor)
                else:
                    # It died, or what an earlier work left in it still speaks or holds it up: not to the next client.
                    self._end_waiting(executor)
            return executor
        finally:
            for one in reversed(late):
                self._put_back(one)

    def _pop_waiting(self, key: Key) -> Executor | None:
        with self._lock:
            waiting = self._waiting.get(key)
            if not waiting:
                return None
            # The one that served last, or of those that never did the one made first.
            return self._remove(waiting[-1] if waiting[-1].pid else waiting[0])

    @staticmethod
    def _is_back(executor: Executor, seconds: float) -> bool | None:
        """Whether an executor waits for work, after so many seconds at most; None: not yet, False: it never will."""
        if executor.away:
            try:
                frame = executor.channel.receive_within(seconds)
            except ChannelTimeout:
                return None
            except ChannelClosed:
                return False
            if frame.kind != READY:
                return False
            executor.away = False
        return executor.channel.quiet

    def _put_back(self, executor: Executor) -> bool:
        with self._lock:
            if executor.counted:
                self._waiting.setdefault(executor.key, []).append(executor)
                self._waiting.move_to_end(executor.key)
                return True
        executor.channel.close()  # it died just now
        return False

    def _end_those_that_are_late(self) -> None:
        """In the supervisor: an executor that says nothing after its work uses the machine for nobody."""
        self._overdue_check_scheduled = False
        latest = time.monotonic() - LATE_SECONDS
        with self._lock:
            away = [one for some in self._waiting.values() for one in some if one.away and one.channel.quiet]
            late = [one for one in away if one.given_back <= latest]
            for executor in late:
                self._remove(executor)
        for executor in late:
            LOGGER.warning("%s: what a work left in its process holds it up; it is ended", executor.name)
            self.replace(executor, "held up")
            executor.channel.close()
        if len(away) > len(late):
            self._overdue_check_scheduled = True
            self.processes.submit(self._end_those_that_are_late, time.monotonic() + LATE_SECONDS)

    def _remove(self, executor: Executor) -> Executor:
        """Take one of those that wait out. With the lock held."""
        waiting = self._waiting[executor.key]
        waiting.remove(executor)
        if not waiting:
            del self._waiting[executor.key]  # there may be any number of identities over time
        return executor

    def _make_room(self) -> None:
        """Count one more executor process, at the expense of a waiting one if it must be."""
        spare: Executor | None = None
        with self._lock:
            if self._count >= self._most:
                spare = next((self._remove(some[0]) for some in self._waiting.values()), None)
                if spare is None:
                    raise ConcurrencyLimitExceeded(
                        f"all {self._most} executor processes of this server process are at work; "
                        "the setting `processes` says how many there may be",
                        limit="processes",
                    )
            self._count += 1
        if spare is not None:
            self._end_waiting(spare)

    def _birth(self, name: str, policy: Policy, identity: Identity | None) -> Executor:
        try:
            return self.processes.birth(name, policy, identity)
        except BaseException:
            with self._lock:
                self._count -= 1
            raise

    def _spawn_replacement(self, executor: Executor) -> None:
        """Make the successor of an executor, if there is room and nobody waits there already."""
        with self._lock:
            wanted = self._spares_wanted.get(executor.key, 1)
            superfluous = self._count >= self._most or len(self._waiting.get(executor.key, ())) >= wanted
            if superfluous or not self.processes.usable or not self._is_kept(executor.name):
                return
            self._count += 1
        try:
            self.give_back(self._birth(executor.name, executor.policy, executor.identity))
        except (RconError, OSError) as error:
            LOGGER.error("no executor process could be made ahead of need for %s: %s", executor.name, error)

    def _end_waiting(self, executor: Executor) -> None:
        self.discard(executor, "no longer needed")
        executor.channel.close()

    def _uncount(self, executor: Executor) -> None:
        with self._lock:
            if executor.counted:
                executor.counted = False
                self._count -= 1

    def _ended(self, executor: Executor) -> None:
        """Called for each executor that is gone, however it went."""
        self._uncount(executor)
        with self._lock:
            was_waiting = executor in self._waiting.get(executor.key, ())
            if was_waiting:
                self._remove(executor)
        if was_waiting:
            executor.channel.close()
        self._on_end(executor.name)


def _is_shared(policy: Policy) -> bool:
    """Whether a process that waits takes from the work under way what that may need."""
    return policy.pids is not None or policy.memory is not None or policy.rlimits.nproc is not None
