"""What the worker holds for the processes of its pool: the settings in force, and this worker's cgroups."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Mapping, Sequence

from rcon_celery.ending_counters import EndingCounters
from rcon_celery.pools import Pool
from rcon_plugins.confinement.budget import machine_ledger
from rcon_plugins.confinement.live_policies import Change, PolicyChangeLog, change
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import ConfinementError, RconError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.file import Settings
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.units import Size
from rcon_plugins.tree.instance import Instance
from rcon_plugins.work import Work

_log = logging.getLogger("rcon")


class Node:
    """The state of one worker. Made in its main process, and inherited by the processes of its pool."""

    def __init__(
        self, settings: Settings, pool: Pool, plugins: Sequence[object], instance: Instance, hostname: str
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.plugins = plugins
        self.instance = instance
        self.hostname = hostname
        #: The policies in force, those of decorators too.
        self.policies: Mapping[str, Policy] = settings.policies
        self.tally = EndingCounters()
        #: Limits that were changed since, for every process of the pool.
        self.changes = PolicyChangeLog()
        self._plan: Plan | None = None
        #: Whether the worker sends events.
        self.events = False
        self._pid = os.getpid()

    @classmethod
    def start(
        cls,
        settings: Settings,
        names: Mapping[str, str],
        policies: Sequence[Policy],
        pool: Pool,
        hostname: str,
        most: Mapping[str, Size],
    ) -> Node:
        """Make sure that this machine can enforce the settings, and make the cgroups.

        ``names`` and ``policies`` are those of tasks with `confined`, ``most`` by key what such tasks may be given when
        they are tried again. Raises `RconError` with what is wrong and what to
        do.
        """
        plugins = [MarkedTasks(names, policies)]
        plan = Plan.make(settings, pool.server, plugins)
        for key, memory in most.items():
            plan.check_fits(memory, key)
        plan.check()
        if settings.budget is not None:
            machine_ledger()
        instance = Instance.create(plan.hierarchy, base=settings.cgroup)
        node = cls(settings, pool, plugins, instance, hostname)
        node.policies = plan.settings.policies
        atexit.register(node.close)
        plan = plan.within(instance.hierarchy)
        plan.check()
        node._plan = plan
        if plan.wants_adoption(instance):
            instance.adopt()
        _log.info("rcon: tasks are confined, cgroups are in %s", instance.path)
        for warning in plan.warnings():
            _log.warning("rcon: %s", warning)
        return node

    def close_first(self) -> None:
        """Let `close` come before all else that is put off until the exit.

        After a SIGHUP Celery starts itself anew there, in the same process: what it leaves then has a living owner.
        """
        if os.getpid() == self._pid:
            atexit.unregister(self.close)
            atexit.register(self.close)

    def change(self, policy: str, key: str, value: str) -> Change:
        """Change one limit of a policy, here and in every process of the pool. Raises `RconError`.

        Call it in the worker's main process, one at a time.
        """
        if self._plan is None:
            raise ConfinementError("the worker has not started yet")
        made = change(self._plan, self.policies, self.instance, self.changes, policy, key, value)
        self.policies = {**self.policies, policy: made.policy}
        return made

    def close(self) -> None:
        """End all tasks and remove the cgroups. Does nothing in a process that is not the worker's main one."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        with contextlib.suppress(RconError, OSError, ValueError):  # a later start removes it
            self.instance.close()


class MarkedTasks:
    """A plugin: the policies of tasks with `confined`, and which task has which."""

    def __init__(self, names: Mapping[str, str], policies: Sequence[Policy]) -> None:
        self._names = names
        self._policies = policies

    @hookimpl
    def rcon_policies(self) -> Sequence[Policy]:
        """The policies that the decorators made."""
        return self._policies

    @hookimpl
    def rcon_select_policy(self, work: Work) -> str | None:
        """The policy that a task's own code names."""
        return self._names.get(work.attributes.get("task", ""))
