"""What happens to the cgroups of a server's work: told to `rcon_event`, and memory that expands."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import msgspec

from rcon_plugins.confinement.expansion import Expansion, expand
from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.groups.events import Event
from rcon_plugins.kernel.events import Pressure, Watch, Watcher, watcher_of_process
from rcon_plugins.settings.limits import Limits

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event as KernelEvent
    from rcon_plugins.settings.memory import Memory
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

LOGGER = logging.getLogger("rcon")

#: Of a memory limit, what has to be in use for plugins to be told, so that they can act before it is reached.
_NEARLY = 0.9
#: What plugins are told of the pressure on all the work of a confinement: a tenth of two seconds, all of it waiting.
_PRESSURE = (Pressure("memory", 0.2, 2.0, "full"), Pressure("io", 0.2, 2.0, "full"))


class GroupMonitor:
    """The events of the work of one server process, and the growth of the memory limits of it. Thread-safe.

    ``key_of`` tells the key of a confinement by its name. Use it only where `is_wanted`.
    """

    def __init__(
        self, instance: Instance, hook: pluggy.HookRelay, key_of: Callable[[str], str | None]
    ) -> None:
        self._instance = instance
        self._hook = hook
        self._key_of = key_of
        self._watcher = watcher_of_process()
        self._lock = threading.Lock()
        self._confinements: dict[str, MonitoredGroup] = {}

    @staticmethod
    def is_wanted(policies: Mapping[str, Policy], hook: pluggy.HookRelay) -> bool:
        """Whether a plugin wants to be told, or memory expands."""
        return listens(hook) or any(
            memory is not None and memory.expands
            for policy in policies.values()
            for memory in (policy.memory, policy.each.memory)
        )

    def limits(self, name: str, policy: Policy) -> Limits:
        """Of a confinement, for all of its work together: the policy's, unless a plugin changed them."""
        with self._lock:
            found = self._confinements.get(name)
        return policy if found is None or not found.is_current else found.limits

    def attend(self, executor: Executor) -> MonitoredGroup:
        """Begin to watch an executor and, where that is not done yet, its confinement. Raises KernelError."""
        name, policy = executor.name, executor.policy
        together = self._together(name, policy)
        about = Event.of_group(
            executor.leaf, group=name, policy=policy.name, key=self._key_of(name), limit="each."
        )
        return MonitoredGroup(executor.leaf, policy, policy.each, about, self._hook, self._watcher, together)

    def attend_threads(self, cgroup: Cgroup, policy: Policy, key: str | None) -> None:
        """Begin to watch the cgroup of a confinement of threads, which was just made. Raises KernelError."""
        if not listens(self._hook):
            return
        about = Event.of_group(cgroup, policy=policy.name, key=key)
        made = MonitoredGroup(cgroup, policy, policy, about, self._hook, self._watcher, None)
        with self._lock:
            former = self._confinements.get(cgroup.name)
            self._confinements[cgroup.name] = made
        if former is not None:
            former.close()

    def forget(self, name: str) -> None:
        """A confinement is no longer kept, and its cgroup about to be removed: what happened last is still told."""
        with self._lock:
            found = self._confinements.pop(name, None)
        if found is not None:
            found.part()

    def change(self, policies: Mapping[str, Policy]) -> None:
        """These policies are otherwise now. But for memory that goes on expanding, they are watched anew, with the next
        executor.
        """
        with self._lock:
            of_before = [name for name, one in self._confinements.items() if one.change(policies)]
            unwatched = [self._confinements.pop(name) for name in of_before]
        for one in unwatched:
            one.lift()
            one.close()

    def rest(self, name: str) -> None:
        """No work of a confinement is under way: what it was given beyond its limit is taken back, soon."""
        with self._lock:
            found = self._confinements.get(name)
        if found is not None and found.expansion is not None and found.expansion.grew:
            self._watcher.submit(found.rest)

    def close(self) -> None:
        """Watch nothing any more."""
        with self._lock:
            attended = list(self._confinements.values())
            self._confinements.clear()
        for one in attended:
            one.close()

    def _together(self, name: str, policy: Policy) -> MonitoredGroup:
        with self._lock:
            found = self._confinements.get(name)
            if found is not None and found.is_current:
                return found
            cgroup = self._instance.policy_cgroup(name)
            about = Event.of_group(cgroup, group=name, policy=policy.name, key=self._key_of(name))
            made = MonitoredGroup(cgroup, policy, policy, about, self._hook, self._watcher, None)
            self._confinements[name] = made
        if found is not None:
            found.close()
        return made


class MonitoredGroup:
    """One cgroup that is attended to: that of a confinement, or of one executor process in it (``above`` is the other
    then).
    """

    def __init__(
        self,
        cgroup: Cgroup,
        policy: Policy,
        limits: Limits,
        about: Event,
        hook: pluggy.HookRelay,
        watcher: Watcher,
        above: MonitoredGroup | None,
    ) -> None:
        self.cgroup = cgroup
        #: As they are now.
        self.limits = limits
        self.changed_by_plugin = False
        self.expansion: Expansion | None = None
        self._policy = policy
        self._about = about
        self._hook = hook
        self._above = above
        self._watch: Watch | None = None
        told = listens(hook)
        try:
            if limits.memory is not None and limits.memory.expands:
                ask = self._ask if told else None
                self.expansion = expand(cgroup, limits.memory, about=about, on_event=ask, watcher=watcher)
            if told:
                self._watch = self._listen(watcher)
        except BaseException:
            self.close()
            raise

    @property
    def is_current(self) -> bool:
        """Whether the cgroup is still the one that is attended to; true where nothing of it is watched."""
        expansion, watch = self.expansion, self._watch
        return (expansion is None or not expansion.memory.expands or expansion.is_current) and (
            watch is None or watch.is_current
        )

    @property
    def changed(self) -> bool:
        """Whether its limits are not the policy's any more."""
        return self.changed_by_plugin or (self.expansion is not None and self.expansion.grew)

    def memory(self, limit: str) -> Memory | None:
        """The limit of memory in force, of the executor (``each.memory``) or of its confinement."""
        of = self._above if limit == "memory" and self._above is not None else self
        return of.limits.memory

    def change(self, policies: Mapping[str, Policy]) -> bool:
        """These policies are otherwise now; whether its own is among them, and is to be watched anew."""
        policy = policies.get(self._policy.name)
        if policy is None:
            return False
        before = self.limits.memory
        self._policy = policy
        self.limits = policy if self._above is None else policy.each
        return self.expansion is None or self.limits.memory != before

    def part(self) -> None:
        """The cgroup is about to be removed: what happened last is still told."""
        if self._watch is not None:
            self._watch.finish()
        self.close()

    def rest(self) -> None:
        """Take back what was given beyond the limit, if it is not needed any more."""
        if self.expansion is not None:
            self._or_say(self.expansion.reset, "the memory limit of %s could not be taken back: %s")

    def lift(self) -> None:
        """Take away what slows it down at a limit that expands; the bound stays."""
        if self.expansion is not None:
            self._or_say(self.expansion.lift, "%s stays slowed down at its limit of before: %s")

    def _or_say(self, act: Callable[[], object], problem: str) -> None:
        try:
            act()
        except KernelError as error:
            if self.cgroup.exists():
                LOGGER.error(problem, self.cgroup.path, error)

    def close(self) -> None:
        """Watch it no more. Again is harmless."""
        if self.expansion is not None:
            self.expansion.close()
        if self._watch is not None:
            self._watch.close()

    def _listen(self, watcher: Watcher) -> Watch | None:
        """Watch what plugins are told of."""
        limits = self.limits
        kinds: list[str] = []
        if limits.memory is not None:
            kinds.append("memory_limit")
        if limits.memory_high is not None:
            kinds.append("memory_high")
        if self._above is not None and (limits.memory is not None or self._above.limits.memory is not None):
            kinds.append("oom_kill")  # where the victim is, and so only once
        if limits.pids is not None:
            kinds.append("pids_limit")
        if limits.cpu is not None:
            kinds.append("cpu_throttled")
        nearly = [] if limits.memory is None or limits.memory.expands else [int(limits.memory * _NEARLY)]
        pressure = () if self._above is not None else _PRESSURE
        try:
            return self._add(watcher, kinds, nearly, pressure)
        except ControllerUnavailable:
            # Who has no pressure to tell of does without.
            return self._add(watcher, kinds, nearly, ())

    def _add(
        self,
        watcher: Watcher,
        kinds: Collection[str],
        nearly: Collection[int],
        pressure: Collection[Pressure],
    ) -> Watch | None:
        if not kinds and not nearly and not pressure:
            return None
        return watcher.add(self.cgroup, self._hear, kinds=kinds, thresholds=nearly, pressure=pressure)

    def _hear(self, event: KernelEvent) -> None:
        """In the watcher's thread."""
        own = self._about.replaced(event)
        if event.kind == "oom_kill" and self.limits.memory is None:
            own = msgspec.structs.replace(own, limit="memory")
        answer = self._ask(own)
        if answer is not None and answer.memory is not None and self.expansion is not None:
            self.expansion.take(answer.memory)

    def _ask(self, event: Event) -> Limits | None:
        """Tell plugins, and apply what they answer at once."""
        answer: Limits | None = self._hook.rcon_event(event=event)
        if answer is None:
            return None
        try:
            self._hook.rcon_configure_cgroup(
                cgroup=self.cgroup, limits=self._with_swap(answer), policy=self._policy
            )
        except KernelError:
            if self.cgroup.exists():
                raise
            return None  # its last event: it is gone, and so is who would have had more
        news = {name: getattr(answer, name) for name in answer.asks()}
        old = {name: getattr(self.limits, name) for name in Limits.__struct_fields__}
        self.limits = Limits(**{**old, **news})
        self.changed_by_plugin = True
        return answer

    def _with_swap(self, answer: Limits) -> Limits:
        """Memory and swap are written together: v1 limits their sum."""
        if answer.memory is not None and answer.swap is None:
            return msgspec.structs.replace(answer, swap=self.limits.swap)
        if answer.swap is not None and answer.memory is None:
            return msgspec.structs.replace(answer, memory=self.limits.memory)
        return answer


def listens(hook: pluggy.HookRelay) -> bool:
    """Whether a plugin has the hook `rcon_event`."""
    return bool(hook.rcon_event.get_hookimpls())
