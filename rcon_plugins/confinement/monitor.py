"""Watch the cgroups of a server's work: call `rcon_event`, and let memory limits expand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Self

import msgspec

from rcon_plugins.confinement.expansion import Expansion, expand
from rcon_plugins.confinement.isolation import resources_of
from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.groups.events import Event
from rcon_plugins.kernel.events import Pressure, Watch, Watcher, watcher_of_process
from rcon_plugins.kernel.files import gone
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

#: At this share of a memory limit, plugins get an event that memory is nearly used up, so that they can act in time.
_NEARLY = 0.9
#: Plugins get an event at this pressure on a confinement: all its work waited for 0.2 seconds of the last 2 seconds.
_PRESSURE = (Pressure("memory", 0.2, 2.0, "full"), Pressure("io", 0.2, 2.0, "full"))


class GroupMonitor:
    """Watches the cgroups of one server process: events for plugins, and memory limits that expand. Thread-safe.

    It watches nothing unless a plugin implements `rcon_event` or a memory limit expands. ``key_of`` returns the key of
    a confinement by its name.
    """

    def __init__(
        self,
        instance: Instance,
        hook: pluggy.HookRelay,
        key_of: Callable[[str], str | None],
        policies: Mapping[str, Policy],
    ) -> None:
        self._instance = instance
        self._hook = hook
        self._key_of = key_of
        self._policies = dict(policies)
        #: Whether a memory limit of any policy expands. If none does, `shrink` has no effect.
        self.expands = any(map(_expands, self._policies.values()))
        self._plugins_listen = plugins_listen(hook)
        self._watcher = watcher_of_process()
        self._lock = threading.Lock()
        self._confinements: dict[str, MonitoredGroup] = {}

    def limits(self, name: str, policy: Policy) -> Limits:
        """Return the limits in force for all work of a confinement: the policy's, unless a plugin changed them."""
        with self._lock:
            found = self._confinements.get(name)
        return policy if found is None or not found.is_current else found.limits

    def watch(self, executor: Executor) -> MonitoredGroup | None:
        """Start watching a new executor and, if nothing watches it yet, its confinement. Raises `KernelError`.

        Return None if there is nothing to watch in it.
        """
        name, policy = executor.name, executor.policy
        if not self._plugins_listen and not _expands(policy):
            return None
        above = self._watch_confinement(name, policy)
        about = Event.of_group(
            executor.leaf, group=name, policy=policy.name, key=self._key_of(name), limit="each."
        )
        return MonitoredGroup(
            executor.leaf, policy, policy.each, about, self._hook, self._watcher, above
        ).begin()

    def watch_threads(self, cgroup: Cgroup, policy: Policy, key: str | None) -> None:
        """Start watching the new cgroup of a confinement of threads. Raises `KernelError`."""
        if not self._plugins_listen:
            return
        about = Event.of_group(cgroup, policy=policy.name, key=key)
        made = MonitoredGroup(cgroup, policy, policy, about, self._hook, self._watcher, None).begin()
        with self._lock:
            former = self._confinements.get(cgroup.name)
            self._confinements[cgroup.name] = made
        if former is not None:
            former.close()

    def forget(self, name: str) -> None:
        """Report the last events of a confinement whose cgroup is about to be removed, and stop watching it."""
        with self._lock:
            found = self._confinements.pop(name, None)
        if found is not None:
            found.finish()

    def change(self, policies: Mapping[str, Policy]) -> None:
        """Apply changed policies.

        The watch of a confinement starts again with its next executor, unless its memory still expands as before.
        """
        with self._lock:
            self._policies.update(policies)
            self.expands = any(map(_expands, self._policies.values()))
            outdated = [name for name, one in self._confinements.items() if one.change(policies)]
            unwatched = [self._confinements.pop(name) for name in outdated]
        for one in unwatched:
            one.unthrottle()
            one.close()

    def shrink(self, name: str) -> None:
        """Have the expanded memory limit of an idle confinement reset soon."""
        with self._lock:
            found = self._confinements.get(name)
        if found is not None and found.expansion is not None and found.expansion.grew:
            self._watcher.submit(found.shrink)

    def close(self) -> None:
        """Stop watching."""
        with self._lock:
            watched = list(self._confinements.values())
            self._confinements.clear()
        for one in watched:
            one.close()

    def _watch_confinement(self, name: str, policy: Policy) -> MonitoredGroup:
        with self._lock:
            found = self._confinements.get(name)
            if found is not None and found.is_current:
                return found
            cgroup = self._instance.policy_cgroup(name)
            about = Event.of_group(cgroup, group=name, policy=policy.name, key=self._key_of(name))
            made = MonitoredGroup(cgroup, policy, policy, about, self._hook, self._watcher, None).begin()
            self._confinements[name] = made
        if found is not None:
            found.close()
        return made


class MonitoredGroup:
    """One watched cgroup: that of a confinement, or that of an executor process in it.

    ``above`` is the monitored confinement that contains the cgroup of an executor process; None for a confinement.
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
        #: The limits as they are now.
        self.limits = limits
        self.changed_by_plugin = False
        self.expansion: Expansion | None = None
        self._policy = policy
        self._about = about
        self._hook = hook
        self._watcher = watcher
        self._above = above
        self._watch: Watch | None = None

    def begin(self) -> Self:
        """Start watching; return self. Raises `KernelError`."""
        listening, memory = plugins_listen(self._hook), self.limits.memory
        try:
            if memory is not None and memory.expands:
                ask = self._ask if listening else None
                self.expansion = expand(
                    self.cgroup, memory, about=self._about, on_event=ask, watcher=self._watcher
                )
            if listening:
                self._watch = self._listen(self._watcher)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def is_current(self) -> bool:
        """Whether the watched cgroup still exists; true if nothing of it is watched."""
        expansion, watch = self.expansion, self._watch
        return (expansion is None or not expansion.memory.expands or expansion.is_current) and (
            watch is None or watch.is_current
        )

    @property
    def changed(self) -> bool:
        """Whether its limits differ from the policy's."""
        return self.changed_by_plugin or (self.expansion is not None and self.expansion.grew)

    def memory(self, limit: str) -> Memory | None:
        """Return the memory limit in force: ``each.memory`` of the executor, or ``memory`` of its confinement."""
        of = self._above if limit == "memory" and self._above is not None else self
        return of.limits.memory

    def change(self, policies: Mapping[str, Policy]) -> bool:
        """Apply changed policies. Return whether its own policy changed, so that its watch must be started again."""
        policy = policies.get(self._policy.name)
        if policy is None:
            return False
        before = self.limits.memory
        self._policy = policy
        self.limits = policy if self._above is None else policy.each
        return self.expansion is None or self.limits.memory != before

    def finish(self) -> None:
        """Report the last events of a cgroup that is about to be removed, and stop watching it."""
        if self._watch is not None:
            self._watch.finish()
        if self._above is not None:
            self._above.look()
        self.close()

    def look(self) -> None:
        """Report what was counted in the cgroup of an executor below, which is about to be removed."""
        if self._watch is not None:
            self._watch.look()

    def shrink(self) -> None:
        """Set the configured memory limit again, unless the cgroup still needs more."""
        if self.expansion is not None:
            self._or_log(self.expansion.reset, "rcon: the expanded memory limit of %s could not be reset: %s")

    def unthrottle(self) -> None:
        """Stop slowing work down at a limit that expands. The upper bound still holds."""
        if self.expansion is not None:
            self._or_log(self.expansion.unthrottle, "rcon: %s is still throttled at its old memory limit: %s")

    def _or_log(self, act: Callable[[], object], problem: str) -> None:
        try:
            act()
        except KernelError as error:
            if not gone(error) or self.cgroup.exists():
                LOGGER.error(problem, self.cgroup.path, error)

    def close(self) -> None:
        """Stop watching. Further calls do nothing."""
        if self.expansion is not None:
            self.expansion.close()
        if self._watch is not None:
            self._watch.close()

    def _listen(self, watcher: Watcher) -> Watch | None:
        """Watch for the events that plugins receive."""
        limits = self.limits
        kinds: list[str] = []
        if limits.memory is not None:
            kinds.append("memory_limit")
        if limits.memory_high is not None:
            kinds.append("memory_high")
        if self._above is not None and (limits.memory is not None or self._above.limits.memory is not None):
            kinds.append("oom_kill")  # only in the victim's own cgroup, so that one kill is one event
        if limits.pids is not None:
            kinds.append("pids_limit")
        if limits.cpu is not None:
            kinds.append("cpu_throttled")
        memory = limits.memory
        nearly = [] if memory is None or memory.expands else [int(memory.limit * _NEARLY)]
        pressure = () if self._above is not None else _PRESSURE
        try:
            return self._add(watcher, kinds, nearly, pressure)
        except ControllerUnavailable:
            # The kernel has no pressure information: watch without it.
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
        return watcher.add(self.cgroup, self._handle_event, kinds=kinds, thresholds=nearly, pressure=pressure)

    def _handle_event(self, event: KernelEvent) -> None:
        """Handle an event of the kernel. Called in the watcher's thread."""
        own = self._about.replaced(event)
        if event.kind == "oom_kill" and self.limits.memory is None:
            own = msgspec.structs.replace(own, limit="memory")
        answer = self._ask(own)
        if answer is not None and answer.memory is not None and self.expansion is not None:
            self.expansion.take(answer.memory)

    def _ask(self, event: Event) -> Limits | None:
        """Call the plugins, and apply the limits they return immediately."""
        answer: Limits | None = self._hook.rcon_event(event=event)
        if answer is None:
            return None
        try:
            self.cgroup.configure(resources_of(self._hook, self._with_swap(answer), self._policy))
        except KernelError as error:
            if not gone(error) or self.cgroup.exists():
                raise
            return None  # the cgroup is gone: this was its last event
        news = {name: getattr(answer, name) for name in answer.limits_set()}
        old = {name: getattr(self.limits, name) for name in Limits.__struct_fields__}
        self.limits = Limits(**{**old, **news})
        self.changed_by_plugin = True
        return answer

    def _with_swap(self, answer: Limits) -> Limits:
        """Add swap to memory, or memory to swap. Both are written together, because v1 limits their sum."""
        if answer.memory is not None and answer.swap is None:
            return msgspec.structs.replace(answer, swap=self.limits.swap)
        if answer.swap is not None and answer.memory is None:
            return msgspec.structs.replace(answer, memory=self.limits.memory)
        return answer


def plugins_listen(hook: pluggy.HookRelay) -> bool:
    """Return whether a plugin implements the hook `rcon_event`."""
    return bool(hook.rcon_event.get_hookimpls())


def _expands(policy: Policy) -> bool:
    return any(memory is not None and memory.expands for memory in (policy.memory, policy.each.memory))
