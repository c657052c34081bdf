"""A confined worker. Its main process checks the settings and makes the cgroups that its pool's processes share."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from celery import bootsteps
from celery.exceptions import CeleryCommandException

from rcon_plugins.confinement.isolation import Server
from rcon_plugins.confinement.manager import Deployment, Manager
from rcon_plugins.errors import ConfinementError, RconError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.file import Settings
from rcon_plugins.settings.policy import Policy
from rcon_plugins.tally.reader import TallyOfServer, read_directory
from rcon_plugins.work import Work

_log = logging.getLogger("rcon")


class Pool(NamedTuple):
    """How a pool of Celery runs tasks. ``children``: in processes that it forks, each with its own manager."""

    server: Server
    children: bool = False

    @property
    def single_threaded(self) -> bool:
        """Whether the process that runs a task does nothing else at the same time, so that it may fork."""
        return not self.server.threads and not self.server.greenlets


_POOLS: Final = {
    "celery.concurrency.prefork.TaskPool": Pool(Server(threads=False, tasks=True), children=True),
    "celery.concurrency.solo.TaskPool": Pool(Server(threads=False, tasks=True)),
    "celery.concurrency.thread.TaskPool": Pool(Server(threads=True, tasks=True)),
    "celery.concurrency.gevent.TaskPool": Pool(Server(threads=False, greenlets=True, tasks=True)),
}


def pool_of(pool_class: Any, start_method: str, *, restarts: bool = False) -> Pool:
    """Return how a pool's class runs tasks. Subclasses of Celery's own pools are accepted.

    ``restarts``: remote control may reload modules and restart the pool.

    Raises `ConfinementError` for a pool whose tasks cannot be confined.
    """
    known = (_POOLS.get(f"{base.__module__}.{base.__qualname__}") for base in pool_class.__mro__)
    pool = next((pool for pool in known if pool is not None), None)
    if pool is None:
        name = f"{pool_class.__module__}.{pool_class.__qualname__}"
        reason = (
            "eventlet's loop does not survive the forks that make executor processes"
            if ".eventlet" in name
            else "rcon_celery does not know how it runs tasks"
        )
        raise ConfinementError(
            f"the pool {name} cannot be confined: {reason}; use prefork, threads, solo or gevent (-P prefork)"
        )
    if pool.children and start_method != "fork":
        raise ConfinementError(
            f'worker_pool_start_method = "{start_method}" cannot be confined: only forked processes share the limits '
            'of a worker; set it to "fork"'
        )
    if restarts and not pool.children:
        raise ConfinementError(
            "worker_pool_restarts = True cannot be confined with this pool: executor processes would keep the code "
            "with which the worker started; use prefork (-P prefork), or set it to False and restart the worker"
        )
    return pool


class StartRefused(RconError, CeleryCommandException):  # type: ignore[misc]
    """Raised when a worker must not start. Celery prints the message alone and exits with 1."""

    def __init__(self, message: str) -> None:
        CeleryCommandException.__init__(self, message=message, exit_code=1)


def start_step(start: Callable[[Any], object]) -> type:
    """Return the step of a worker's start that calls ``start`` with Celery's worker, before its pool forks."""

    class Confinement(bootsteps.StartStopStep):  # type: ignore[misc]
        """Confine the tasks of the worker, or refuse to start."""

        label = "rcon"

        def create(self, parent: Any) -> None:
            try:
                start(parent)
            except RconError as error:
                raise StartRefused(str(error)) from None

    return Confinement


class ConfinedWorker:
    """The state of one worker: made in its main process, and inherited by the processes of its pool."""

    def __init__(self, deployment: Deployment, pool: Pool, hostname: str) -> None:
        #: The settings that apply, and the cgroups of the worker.
        self.deployment = deployment
        self.pool = pool
        self.hostname = hostname
        #: Whether the worker sends events.
        self.sends_events = False
        self._pid = os.getpid()

    @classmethod
    def start(
        cls,
        settings: Settings,
        tasks: ConfinedTasks,
        pool: Pool,
        hostname: str,
        largest: Mapping[str, int],
    ) -> ConfinedWorker:
        """Check that this machine can enforce the settings, and make the cgroups.

        ``tasks`` are the tasks with `confined`. ``largest`` is the most memory that tasks may get on a retry, in bytes,
        by its key in an error message. Raises `RconError` with the problem and its remedy.
        """
        manager = Manager(settings, server=pool.server, plugins=[tasks], memory=largest)
        manager.plan.load_function()
        worker = cls(manager.deploy(changeable=True), pool, hostname)
        atexit.register(worker.close)
        _log.info("rcon: tasks are confined in the cgroup %s", worker.deployment.instance.path)
        return worker

    def tally(self) -> TallyOfServer | None:
        """Return what all processes of this worker counted; None if that is unknown."""
        directory = self.deployment.directory
        return None if directory is None else read_directory(directory)

    def close_before_restart(self) -> None:
        """Have `close` called before all other exit handlers.

        After a SIGHUP, an exit handler of Celery executes the worker again in the same process. A cgroup that is still
        there belongs to a living process then, so no later start would remove it.
        """
        if os.getpid() == self._pid:
            atexit.unregister(self.close)
            atexit.register(self.close)

    def close(self) -> None:
        """Kill all tasks and remove the cgroups; log a failure. Do nothing except in the worker's main process."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        try:
            self.deployment.close()
        except (RconError, OSError, ValueError) as error:
            _log.warning("rcon: cgroups of this worker are left; the next start removes them: %s", error)


class ConfinedTasks:
    """A plugin with the policies of tasks with `confined`. Selects the policy of each such task."""

    def __init__(self, names: Mapping[str, str], policies: Sequence[Policy]) -> None:
        """``names`` are the names of the policies, by task."""
        self._names = names
        self._policies = policies

    @hookimpl
    def rcon_policies(self) -> Sequence[Policy]:
        """Return the policies made from decorators."""
        return self._policies

    @hookimpl
    def rcon_select_policy(self, work: Work) -> str | None:
        """Return the policy that the task's own code names."""
        return self._names.get(work.attributes.get("task", ""))
