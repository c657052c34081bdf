"""The state that the gunicorn master makes for its workers: a deployment of the settings, and their privileges."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from typing import Any, Protocol

from rcon_gunicorn.workers import refusal, server_traits
from rcon_plugins.confinement.isolation import caveat
from rcon_plugins.confinement.manager import Deployment, Manager
from rcon_plugins.errors import ConfinementError, KernelError, RconError
from rcon_plugins.identity.privileges import keep, needed, settle
from rcon_plugins.settings.file import load

_log = logging.getLogger("rcon")

#: The pause before a worker is made in place of one that could not start: after the first, and at most. In seconds.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0


class _Arbiter(Protocol):
    cfg: Any
    log: Any
    worker_class: type


class Master:
    """The state of one gunicorn master. Made in the master and inherited by the workers it forks."""

    def __init__(self, deployment: Deployment, boots: Boots) -> None:
        self.deployment = deployment
        #: The capabilities that workers need to change to the users of policies, and those that this worker kept.
        self._needed = needed(deployment.plan.settings.policies.values())
        self._kept = needed(())
        self.boots = boots
        #: The ended workers whose processes and cgroups could not be removed yet.
        self._unswept: set[int] = set()
        self._pid = os.getpid()

    @classmethod
    def start(cls, path: str, server: _Arbiter) -> Master:
        """Load and check the settings, and make the cgroups. Raises `RconError` with the reason and the remedy."""
        manager = judge(path, server.worker_class)
        boots = Boots()  # before there are cgroups to remove
        master = cls(manager.deploy(owner=_owner(server.cfg)), boots)
        atexit.register(master.close)  # gunicorn calls no hook when it ends before it serves
        server.log.info(
            "rcon: %s confines requests; cgroups are in %s", path, master.deployment.instance.path
        )
        _warn_of_dirty_workers(server)
        master.warn_of_control_socket(server)
        return master

    def reload(self, manager: Manager, server: _Arbiter) -> None:
        """Use other settings for new workers. Raises `KernelError`, and changes nothing, if that is not possible."""
        self.deployment.reload(manager)
        self._needed = needed(self.deployment.plan.settings.policies.values())
        _warn_of_dirty_workers(server)
        self.warn_of_control_socket(server)

    def warn_of_control_socket(self, server: _Arbiter) -> None:
        """Warn of the policies whose requests may connect to gunicorn's control socket, and so shut gunicorn down.

        The socket belongs to the user that gunicorn was started as. Landlock does not see connect(2).
        """
        config = server.cfg
        if getattr(config, "control_socket_disable", True):
            return
        plan, starter = self.deployment.plan, os.geteuid()
        for_others = config.control_socket_mode & 0o066
        names = [
            name
            for name, policy in plan.settings.policies.items()
            if for_others
            or (int(config.uid) == starter if policy.user is None else caveat(policy, plan.server, starter))
        ]
        if names:
            server.log.warning(
                "rcon: requests of %s can shut gunicorn down through its control socket %s. "
                "Set control_socket_disable = True, or a user of its own and control_socket_mode = 0o600.",
                ", ".join(f"policy {name}" for name in names),
                config.control_socket,
            )

    def keep_privileges(self, server: _Arbiter) -> None:
        """Keep the capabilities that the policies need to change users. Raises `RconError`.

        Call it in a new worker, before it changes its own user.
        """
        if int(server.cfg.uid) != 0:
            self._kept = self._needed
        if _owner(server.cfg) is not None:
            keep(self._kept)

    def settle_privileges(self) -> None:
        """Reduce the capabilities to those kept. Call it in a worker after its change of user. Raises `RconError`."""
        settle(self._kept)

    def sweep(self, worker: int, server: _Arbiter) -> None:
        """Kill the processes and remove the cgroups that an ended worker left behind.

        If that fails, try again with the next worker that ends; the worker's fork server does it as well.
        """
        self._unswept.add(worker)
        for one in list(self._unswept):
            try:
                self.deployment.instance.sweep(f"{one}-")
                self._unswept.discard(one)
            except (RconError, OSError, ValueError) as error:  # else gunicorn and all its workers would end
                if one == worker:
                    server.log.warning(
                        "rcon: could not clean up after worker %d; trying again later: %s", worker, error
                    )

    def leave(self) -> None:
        """Return to gunicorn's first cgroup. Call it in a fork of the master that is about to execute a program."""
        # This fails if gunicorn's own cgroup is the base. An exception here would end the workers of both.
        with contextlib.suppress(RconError, OSError):
            self.deployment.instance.release()

    def close(self) -> None:
        """End all work and remove the cgroups; log a failure. Do nothing except in the master."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        try:
            self.deployment.close()
        except (RconError, OSError, ValueError) as error:
            _log.warning("rcon: cgroups of this server are left; the next start removes them: %s", error)


class Boots:
    """Whether a worker of this server has ever served, and how many failed to start since. Shared by all workers.

    If the first workers cannot start, gunicorn ends: the reason is in its settings. A replacement that cannot start
    fails alone: the reason may pass, and the other workers serve.
    """

    def __init__(self) -> None:
        """Make the file that all workers share. Raises `KernelError`."""
        try:
            self._file = os.memfd_create("rcon-boots")
            try:
                # Takes the memory for it, so that no later write lacks that.
                os.pwrite(self._file, b"\0\0", 0)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise KernelError.from_oserror(error, path="memfd_create(2)") from None

    def started(self) -> None:
        """Note that a worker serves."""
        os.pwrite(self._file, b"\1\0", 0)

    def failed(self) -> float | None:
        """Note that a worker cannot start. Return how long to wait before the next one; None for the first workers."""
        state = os.pread(self._file, 2, 0)
        if not state[0]:
            return None
        os.pwrite(self._file, bytes((1, min(state[1] + 1, 255))), 0)
        return float(min(_FIRST_PAUSE * 2 ** min(state[1], 16), _LONGEST_PAUSE))


def judge(path: str, worker_class: type, deployment: Deployment | None = None) -> Manager:
    """Load the settings and judge them for this worker class. Make nothing. Raises `RconError`.

    Judge for the part of the cgroup tree that ``deployment`` has; without one for that of this machine.
    """
    traits = server_traits(worker_class)
    if traits is None:
        raise ConfinementError(refusal(worker_class))
    hierarchy = None if deployment is None else deployment.instance.hierarchy
    return Manager(load(path), server=traits, hierarchy=hierarchy)


def _owner(cfg: Any) -> tuple[int, int] | None:
    """Return the uid and gid of the workers; None if they are the master's."""
    workers = (int(cfg.uid), int(cfg.gid))
    return None if workers == (os.geteuid(), os.getegid()) else workers


def _warn_of_dirty_workers(server: _Arbiter) -> None:
    if server.cfg.dirty_workers > 0 and server.cfg.dirty_apps:
        server.log.warning("rcon: gunicorn's dirty workers are not confined")
