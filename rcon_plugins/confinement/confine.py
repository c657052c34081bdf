"""``with confine(cpu="30%"): …`` for any program: confine the calling thread inside a block."""

from __future__ import annotations

import itertools
import os
import threading
from types import TracebackType

import msgspec

from rcon_plugins.builtin.plugins import make_plugin_manager
from rcon_plugins.confinement.confinement import Context, InlineConfinement
from rcon_plugins.confinement.isolation import Server, judge
from rcon_plugins.confinement.monitor import GroupMonitor
from rcon_plugins.errors import SettingsError
from rcon_plugins.executors.inline import InlineExecutor
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.file import Settings
from rcon_plugins.settings.policy import Policy
from rcon_plugins.tree.instance import Instance


def confine(policy: Policy | None = None, /, **limits: object) -> Confined:
    """Confine the calling thread, and the threads it starts, inside a ``with`` block.

    Give either a policy, or limits as in a settings file: ``cpu="30%"``, ``cpus="0-1"``, ``pids=16``,
    ``cpu_weight=50``, and on cgroup v1 ``io``. Memory and ``each`` limits need a process, and are refused. A child
    process started inside the block stays confined after it::

        with confine(cpu="30%", cpus="0"):
            crunch()

    The first block makes the cgroup, which takes some milliseconds. To enter often, keep the object: `Confined.open`
    keeps its cgroup until `Confined.close`::

        limited = confine(cpu="30%").open()
        with limited: ...
        with limited: ...
        limited.close()

    A CPU quota can stop the thread while it holds the GIL; the other threads of the program then wait, too. Raises
    `SettingsError` for limits that cannot be enforced here, `DelegationError` if no cgroup may be made.
    """
    if policy is None:
        policy = Policy.make("confine", **limits)
    elif limits:
        raise SettingsError("both a policy and limits were given", hint="give one of them")
    if policy.per is not None or policy.concurrency is not None:
        raise SettingsError(
            "`per` and `concurrency` need a server, and confine() has only a thread",
            key=f"policy.{policy.name}",
            hint="use a Manager, or leave them out",
        )
    return Confined(msgspec.structs.replace(policy, isolation="inline"))


class Confined:
    """A policy that any number of threads may enter at the same time, using ``with``. See `confine`."""

    _numbers = itertools.count(1)

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._lock = threading.Lock()
        self._users = 0
        self._confinement: InlineConfinement | None = None
        self._stays = _Stays()

    def open(self) -> Confined:
        """Make the cgroup and keep it until `close`; return self."""
        with self._lock:
            if self._confinement is None:
                self._confinement = self._make()
            self._users += 1
        return self

    def close(self) -> None:
        """Remove the cgroup, unless a block or another `open` still needs it."""
        with self._lock:
            self._users -= 1
            confinement = self._confinement
            if self._users or confinement is None:
                return
            self._confinement = None
            try:
                confinement.close()
            finally:
                _this_process.leave()

    def __enter__(self) -> Confined:
        self.open()
        try:
            confinement = self._confinement
            executor = confinement.enter() if confinement is not None else None
        except BaseException:
            self.close()
            raise
        self._stays.executors.append(executor)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        executor = self._stays.executors.pop()
        try:
            if executor is not None:
                executor.leave()
        finally:
            self.close()

    def _make(self) -> InlineConfinement:
        hook = make_plugin_manager(Settings(policies={self.policy.name: self.policy})).hook
        verdict = judge(self.policy, Server(), Hierarchy.discover(), hook)
        verdict.check()
        instance = _this_process.join()
        try:
            number = str(next(self._numbers))
            monitor = GroupMonitor(instance, hook, lambda _: None, {})
            confinement = InlineConfinement(self.policy, number, 0, Context(instance, hook, monitor))
            confinement.open()
            return confinement
        except BaseException:
            _this_process.leave()
            raise


class _Stays(threading.local):
    def __init__(self) -> None:
        self.executors: list[InlineExecutor | None] = []


class _ThisProcess:
    """The instance that all `Confined` objects of this process share.

    A process can have only one, because it is in one cgroup: moving the process moves all its threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instance: Instance | None = None
        self._users = 0
        self._pid = 0

    def join(self) -> Instance:
        """Return the instance. The first call makes it and moves the process into it."""
        with self._lock:
            if self._pid != os.getpid():  # first use, or a fork, which must not use its parent's instance
                self._instance, self._users, self._pid = None, 0, os.getpid()
            instance = self._instance
            if instance is None:
                instance = Instance.create(Hierarchy.discover())
                try:
                    if instance.threads_need_adoption():
                        instance.adopt()
                except BaseException:
                    instance.close()
                    raise
                self._instance = instance
            self._users += 1
            return instance

    def leave(self) -> None:
        """Note that one user is done. After the last one, move the process back and remove the instance."""
        with self._lock:
            self._users -= 1
            instance = self._instance
            if self._users or instance is None:
                return
            self._instance = None
            instance.close()


_this_process = _ThisProcess()
