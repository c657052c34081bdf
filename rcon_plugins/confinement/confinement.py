"""Confinements: a policy in force for one key, with its cgroup, its slots and its executors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.confinement.admission import (
    Admission,
    InlineAdmission,
    LocalAdmission,
    ProcessAdmission,
    ThreadAdmission,
)
from rcon_plugins.confinement.isolation import resources_of
from rcon_plugins.errors import KernelError
from rcon_plugins.executors.inline import InlineExecutor
from rcon_plugins.kernel.files import gone
from rcon_plugins.kernel.process import join_new_session_keyring
from rcon_plugins.tree.group_names import cgroup_name
from rcon_plugins.tree.locks import first_slot

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.confinement.monitor import GroupMonitor
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.pool import ExecutorPool
    from rcon_plugins.executors.thread import ThreadExecutors
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup, Entrance
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance
    from rcon_plugins.work import Work

#: How many times to make a cgroup while other workers remove it.
_ATTEMPTS = 20


class Confinement:
    """One policy in force for one key: the `Host` of its admissions.

    ``users`` is the number of admissions under way; only the manager changes it. ``conclude`` is called once for each
    admission, when it has its outcome.
    """

    def __init__(
        self,
        policy: Policy,
        key: str | None,
        generation: int,
        conclude: Callable[[Admission], None],
    ) -> None:
        self.policy = policy
        self.key = key
        self.name = cgroup_name(policy.name, key, generation)
        self.first_slot = first_slot(cgroup_name(policy.name, key))
        self.users = 0
        self.pids_limit_hits: int | None = None
        self.conclude = conclude

    def admit(
        self, work: Work, reservation: Reservation, identity: Identity | None, memory: int | None
    ) -> LocalAdmission | ProcessAdmission:
        """Take an executor for the work, and return its admission. ``memory`` replaces ``each.memory`` for it alone."""
        raise NotImplementedError

    def close_files(self) -> Cgroup | None:
        """Close the files of this process for the confinement. No work may be running in it.

        Return its cgroup if it is one of threads, for the caller to remove it.
        """
        return None


class ProcessConfinement(Confinement):
    """A confinement whose work runs in executor processes. Its cgroups are made with them."""

    def __init__(
        self,
        policy: Policy,
        key: str | None,
        generation: int,
        conclude: Callable[[Admission], None],
        pool: ExecutorPool,
    ) -> None:
        super().__init__(policy, key, generation, conclude)
        self._pool = pool

    def admit(
        self, work: Work, reservation: Reservation, identity: Identity | None, memory: int | None
    ) -> ProcessAdmission:
        return ProcessAdmission.begin(self, work, reservation, self._pool, identity, memory)


class Context(NamedTuple):
    """The objects that all confinements in threads of one process share."""

    instance: Instance
    hook: pluggy.HookRelay
    monitor: GroupMonitor
    conclude: Callable[[Admission], None] = lambda _: None


class InlineConfinement(Confinement):
    """A confinement that the serving threads enter and leave: a threaded cgroup, or no cgroup if nothing is limited."""

    def __init__(self, policy: Policy, key: str | None, generation: int, context: Context) -> None:
        self._instance, self._hook, self._monitor, conclude = context
        super().__init__(policy, key, generation, conclude)
        self._lock = threading.Lock()
        self._home: Entrance | None = None
        self.executor: InlineExecutor | None = None
        #: Its cgroup, from just before it is made.
        self._cgroup: Cgroup | None = None
        self._controllers = resources_of(self._hook, policy, policy).controllers()

    def open(self) -> None:
        """Make the cgroup with its limits, and open its entrance. Raises `KernelError`."""
        if not self._controllers:
            return
        try:
            self._make_cgroup()
        except BaseException:
            self.close()
            raise

    def _make_cgroup(self) -> None:
        with self._lock:
            home = self._home or self._instance.exit(self._controllers)
            self._home = home
            cgroup = self._cgroup = self._instance.threaded(self.name)
            for attempts_left in reversed(range(_ATTEMPTS)):
                try:
                    cgroup.create(threaded=True, controllers=self._controllers)
                    cgroup.configure(resources_of(self._hook, self.policy, self.policy))
                    self._monitor.watch_threads(cgroup, self.policy, self.key)
                    entrance = cgroup.entrance(self._controllers)
                    break
                except KernelError as error:
                    # Until a thread is in it, another worker may remove it.
                    if not gone(error) or not attempts_left:
                        raise
            # Threads that are about to enter still hold the former executor, whose entrance closes with it.
            self.executor = InlineExecutor(cgroup, entrance, home)

    def enter(self) -> InlineExecutor | None:
        """Move the calling thread into the cgroup. Return the executor that moves it out again; None without a cgroup.

        Make the cgroup again if another worker of the server removed it as its least recently used one. Raises
        `KernelError`.
        """
        attempts_left = _ATTEMPTS
        while (executor := self.executor) is not None:
            try:
                executor.enter()
            except KernelError as error:
                attempts_left -= 1
                if not gone(error) or not attempts_left:
                    raise
            else:
                return executor
            self._make_cgroup()
        return None

    def admit(
        self,
        work: Work,
        reservation: Reservation,
        identity: Identity | None,  # noqa: ARG002 - always None: an inline policy has no identity
        memory: int | None,  # noqa: ARG002 - judged: `each.memory` needs a process
    ) -> LocalAdmission:
        return InlineAdmission(self, work, reservation)

    def close_files(self) -> Cgroup | None:
        if self.executor is not None:
            self.executor.entrance.close()  # it stays, so that a late thread fails to enter
        if self._home is not None:
            self._home.close()
        return self._cgroup

    def close(self) -> None:
        """Close the entrances, and remove the cgroup unless threads of another worker are in it."""
        if (cgroup := self.close_files()) is not None:
            cgroup.delete()


class ThreadConfinement(InlineConfinement):
    """A confinement with threads of its own, which stay in its threaded cgroup until they end."""

    def __init__(
        self,
        policy: Policy,
        key: str | None,
        generation: int,
        context: Context,
        threads: ThreadExecutors,
    ) -> None:
        super().__init__(policy, key, generation, context)
        self._threads = threads

    def admit(
        self,
        work: Work,
        reservation: Reservation,
        identity: Identity | None,
        memory: int | None,  # noqa: ARG002 - judged: `each.memory` needs a process
    ) -> LocalAdmission:
        executor = self._threads.take((self.name, identity), partial(self.settle, identity))
        return ThreadAdmission(self, work, reservation, self._threads, executor)

    def settle(self, identity: Identity | None) -> None:
        """Confine the calling thread until it ends: enter the cgroup, then drop privileges. Raises `KernelError`."""
        self.enter()
        self._hook.rcon_drop(policy=self.policy, target="thread", identity=identity)
        if identity is not None:
            join_new_session_keyring()
