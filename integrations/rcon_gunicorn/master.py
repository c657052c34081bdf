"""What the gunicorn master holds for its workers: the settings in force, and this server's cgroups."""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import Any, Protocol

from rcon_gunicorn.workers import server_traits
from rcon_plugins.confinement.budget import machine_ledger
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import RconError
from rcon_plugins.identity.privileges import keep, needed, settle
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.tree.instance import Instance


class _Arbiter(Protocol):
    cfg: Any
    log: Any
    worker_class: type


class Master:
    """The state of one gunicorn master. Made there, and inherited by the workers it forks."""

    def __init__(self, plan: Plan, settings: Settings, instance: Instance) -> None:
        self.settings = settings
        self.instance = instance
        #: How often each policy was changed by a reload. A changed one gets cgroups of its own: workers that still
        #: finish their requests under the former would write its limits back.
        self.generations: dict[str, int] = {}
        self._policies = dict(plan.settings.policies)
        #: The capabilities that workers need to give work its identity, and those that this one kept.
        self._needed = needed(self._policies.values())
        self._kept = needed(())
        self._pid = os.getpid()

    @classmethod
    def start(cls, path: str, server: _Arbiter) -> Master:
        """Load the settings, make sure that this machine can enforce them, and make the cgroups.

        Raises `RconError` with what is wrong and what to do.
        """
        settings = load(path)
        plan = Plan.make(settings, server_traits(server.worker_class))
        plan.check()
        instance = Instance.create(plan.hierarchy, base=settings.cgroup, owner=_owner(server.cfg))
        master = cls(plan, settings, instance)
        atexit.register(master.close)  # gunicorn calls no hook when it ends before it serves
        plan.within(instance.hierarchy).check()
        if settings.budget is not None:
            machine_ledger()  # as the user that the master is: workers may be another
        master._adopt(plan)
        server.log.info("rcon: %s confines requests, cgroups are in %s", path, instance.path)
        for warning in plan.warnings(int(server.cfg.uid)):
            server.log.warning("rcon: %s", warning)
        _warn_of_what_stays_outside(server)
        return master

    def reload(self, path: str, server: _Arbiter) -> None:
        """Take the settings of the file as it is now.

        Raises `RconError`, and changes nothing, if they are wrong or cannot be enforced here.
        """
        settings = load(path)
        plan = Plan.make(settings, server_traits(server.worker_class), hierarchy=self.instance.hierarchy)
        plan.check()
        if settings.budget is not None:
            machine_ledger()
        self._adopt(plan)
        if settings.cgroup != self.settings.cgroup:
            server.log.warning("rcon: a new cgroup base is taken at the next start, not at a reload")
        self.settings = settings
        self._needed = needed(plan.settings.policies.values())
        for name, policy in plan.settings.policies.items():
            if self._policies.get(name, policy) != policy:
                self.generations[name] = self.generations.get(name, 0) + 1
            self._policies[name] = policy
        _warn_of_what_stays_outside(server)

    def _adopt(self, plan: Plan) -> None:
        """Move the master, and so the workers to come, into the instance, where that is needed."""
        if plan.wants_adoption(self.instance):
            self.instance.adopt()

    def keep_privileges(self, server: _Arbiter) -> None:
        """In a new worker that is not to be root: keep what its policies need to become others. `RconError`."""
        if int(server.cfg.uid) != 0:
            self._kept = self._needed
        if _owner(server.cfg) is not None:
            keep(self._kept)

    def settle_privileges(self) -> None:
        """In a worker that is not root by now: hold that and no more. Raises `RconError`."""
        settle(self._kept)

    def sweep(self, worker: int, server: _Arbiter) -> None:
        """End and remove whatever a worker that is gone left behind."""
        try:
            self.instance.sweep(f"{worker}-")
        except (RconError, OSError, ValueError) as error:  # gunicorn would end, and all its workers with it
            server.log.warning("rcon: left for the next start: %s", error)

    def leave(self) -> None:
        """In a fork of the master that is about to execute another: go back to where gunicorn was started."""
        # Where our own cgroup is the base there is nowhere to go back to; and gunicorn would end the workers of both.
        with contextlib.suppress(RconError, OSError):
            self.instance.release()

    def close(self) -> None:
        """End all work and remove the cgroups. Does nothing in a process that is not the master."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        with contextlib.suppress(RconError, OSError, ValueError):  # a later start removes it
            self.instance.close()


def _owner(cfg: Any) -> tuple[int, int] | None:
    """Who the workers will be, where that is not who the master is."""
    workers = (int(cfg.uid), int(cfg.gid))
    return None if workers == (os.geteuid(), os.getegid()) else workers


def _warn_of_what_stays_outside(server: _Arbiter) -> None:
    if server.cfg.dirty_workers > 0 and server.cfg.dirty_apps:
        server.log.warning("rcon: gunicorn's dirty workers run outside any confinement")
