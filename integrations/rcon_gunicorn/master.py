"""What the gunicorn master holds for its workers: the settings in force, and this server's cgroups."""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import Any, Protocol

from rcon_gunicorn.workers import server_traits
from rcon_plugins.errors import ConfinementError, RconError
from rcon_plugins.instance import Instance
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.manager import Manager
from rcon_plugins.settings import Settings, load


class _Arbiter(Protocol):
    cfg: Any
    log: Any
    worker_class: type


class Master:
    """The state of one gunicorn master. Made there, and inherited by the workers it forks."""

    def __init__(self, settings: Settings, hierarchy: Hierarchy, instance: Instance) -> None:
        self.settings = settings
        self.instance = instance
        self._hierarchy = hierarchy
        self._pid = os.getpid()

    @classmethod
    def start(cls, path: str, server: _Arbiter) -> Master:
        """Load the settings, make sure that this machine can enforce them, and make the cgroups.

        Raises `RconError` with what is wrong and what to do.
        """
        settings = load(path)
        hierarchy = Hierarchy.discover()
        _check(settings, hierarchy, server)
        instance = Instance.create(hierarchy, base=settings.cgroup, owner=_owner(server.cfg))
        master = cls(settings, hierarchy, instance)
        atexit.register(master.close)  # gunicorn calls no hook when it ends before it serves
        if instance.needs_adoption:
            instance.adopt()
        server.log.info("rcon: %s confines requests, cgroups are in %s", path, instance.path)
        _warn_of_what_stays_outside(server)
        return master

    def reload(self, path: str, server: _Arbiter) -> None:
        """Take the settings of the file as it is now.

        Raises `RconError`, and changes nothing, if they are wrong or cannot be enforced here.
        """
        settings = load(path)
        _check(settings, self._hierarchy, server)
        if settings.cgroup != self.settings.cgroup:
            server.log.warning("rcon: a new cgroup base is taken at the next start, not at a reload")
        self.settings = settings
        _warn_of_what_stays_outside(server)

    def sweep(self, worker: int, server: _Arbiter) -> None:
        """End and remove whatever a worker that is gone left behind."""
        try:
            self.instance.sweep(f"{worker}-")
        except RconError as error:
            server.log.warning("rcon: left for the next start: %s", error)

    def leave(self) -> None:
        """In a fork of the master that is about to execute another: go back to where gunicorn was started."""
        self.instance.release()

    def close(self) -> None:
        """End all work and remove the cgroups. Does nothing in a process that is not the master."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        with contextlib.suppress(RconError):  # a later start removes it
            self.instance.close()


def _check(settings: Settings, hierarchy: Hierarchy, server: _Arbiter) -> None:
    traits = server_traits(server.worker_class)
    if traits is None:
        raise ConfinementError("this worker class cannot be confined")
    Manager.check(settings, server=traits, hierarchy=hierarchy)


def _owner(cfg: Any) -> tuple[int, int] | None:
    """Who the workers will be, where that is not who the master is."""
    workers = (int(cfg.uid), int(cfg.gid))
    return None if workers == (os.geteuid(), os.getegid()) else workers


def _warn_of_what_stays_outside(server: _Arbiter) -> None:
    if server.cfg.dirty_workers > 0 and server.cfg.dirty_apps:
        server.log.warning("rcon: gunicorn's dirty workers run outside any confinement")
