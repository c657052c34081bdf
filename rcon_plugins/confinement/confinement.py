"""A policy in force: its cgroup, its slots, its executors; one for each key of the policy."""

from __future__ import annotations

import errno
import hashlib
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.confinement.admission import (
    Admission,
    InlineAdmission,
    LocalAdmission,
    ProcessAdmission,
    ThreadAdmission,
)
from rcon_plugins.confinement.isolation import Isolation, Verdict, resources_of
from rcon_plugins.errors import KernelError
from rcon_plugins.executors.inline import InlineExecutor
from rcon_plugins.kernel.process import join_new_session_keyring
from rcon_plugins.tree.locks import first_slot

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.pool import ExecutorPool
    from rcon_plugins.executors.thread import ThreadExecutors
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup, Entrance
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance
    from rcon_plugins.work import Work

_PLAIN_KEY = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,99}")


def cgroup_name(policy: str, key: str | None, generation: int = 0) -> str:
    """The directory name of a confinement: ``policy``, or ``policy~key``.

    ``policy.2`` where the policy was changed twice: a changed policy has a cgroup of its own, so that workers that
    still finish their work under the former do not write its limits back.

    A key is what a client sent. One that is not plain (host-like, at most 100 characters) appears as ``policy~~HASH``
    instead, so that no key, whatever it holds, names anything but one directory; different keys never share one.
    """
    if generation:
        policy = f"{policy}.{generation}"
    if key is None:
        return policy
    if _PLAIN_KEY.fullmatch(key):
        return f"{policy}~{key}"
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=20).hexdigest()
    return f"{policy}~~{digest}"


class Confinement:
    """One policy, for one key, in force. The `Host` of its admissions. ``users`` counts them; its manager keeps it."""

    isolation: Isolation

    def __init__(self, policy: Policy, key: str | None, verdict: Verdict, generation: int = 0) -> None:
        self.policy = policy
        self.key = key
        self.name = cgroup_name(policy.name, key, generation)
        self.isolation = verdict.isolation
        self.first_slot = first_slot(cgroup_name(policy.name, key))
        self.users = 0
        self.pids_limit_hits: int | None = None
        #: Called with each admission, once, when it has an outcome. Set by the manager.
        self.on_conclusion: Callable[[Confinement, Admission], None] | None = None

    def admit(
        self, work: Work, reservation: Reservation, identity: Identity | None, memory: int | None
    ) -> LocalAdmission | ProcessAdmission:
        """Take an executor for the work, and return its admission. ``memory`` replaces ``each.memory`` for it alone."""
        raise NotImplementedError

    def conclude(self, admission: Admission) -> None:
        """Tell the manager that the admission has its outcome."""
        if self.on_conclusion is not None:
            self.on_conclusion(self, admission)

    def close(self) -> None:
        """Remove what this process keeps of it in the kernel. No work may be under way."""


class ProcessConfinement(Confinement):
    """Its work runs in executor processes; the cgroups are made with them."""

    def __init__(
        self, policy: Policy, key: str | None, verdict: Verdict, pool: ExecutorPool, generation: int = 0
    ) -> None:
        super().__init__(policy, key, verdict, generation)
        self._pool = pool

    def admit(
        self, work: Work, reservation: Reservation, identity: Identity | None, memory: int | None
    ) -> ProcessAdmission:
        return ProcessAdmission.begin(self, work, reservation, self._pool, identity, memory)


class InlineConfinement(Confinement):
    """Its work runs in threads of this process, inside of its threaded cgroup; it has none where nothing is limited.

    The threads that serve enter it and leave it (`enter`).
    """

    def __init__(
        self,
        policy: Policy,
        key: str | None,
        verdict: Verdict,
        instance: Instance,
        hook: pluggy.HookRelay,
        generation: int = 0,
        watch: Callable[[Cgroup, Policy, str | None], object] | None = None,
    ) -> None:
        """``watch`` is called with each new cgroup, this policy and key, before anything enters."""
        super().__init__(policy, key, verdict, generation)
        self._watch = watch
        self._instance = instance
        self._hook = hook
        self._lock = threading.Lock()
        self._home: Entrance | None = None
        self.executor: InlineExecutor | None = None
        #: Ways into cgroups that are gone. Threads may still be about to use one, and find that it leads nowhere;
        #: closed, its number could be that of another file by then.
        self._former: list[InlineExecutor] = []
        self._controllers = resources_of(hook, policy, policy).controllers()
        if self._controllers:
            try:
                self.open()
            except BaseException:
                self.close()
                raise

    def open(self) -> None:
        """Make the cgroup, write its limits, and open what threads enter it by."""
        with self._lock:
            home = self._home or self._instance.exit(self._controllers)
            self._home = home
            cgroup = self._instance.threaded(self.name)
            cgroup.create(threaded=True, controllers=self._controllers)
            cgroup.configure(resources_of(self._hook, self.policy, self.policy))
            if self._watch is not None:
                self._watch(cgroup, self.policy, self.key)
            entrance = cgroup.entrance(self._controllers)
            self.executor, former = InlineExecutor(cgroup, entrance, home), self.executor
            if former is not None:
                self._former.append(former)

    def enter(self) -> InlineExecutor | None:
        """Move the calling thread in; what is returned moves it out again.

        Another worker of the server, for whom this confinement had become the least recently used, may have removed
        the cgroup: it is made again then. Raises `KernelError`.
        """
        executor = self.executor
        if executor is None:
            return None
        try:
            executor.enter()
        except KernelError as error:
            if error.errno not in (errno.ENODEV, errno.ENOENT):
                raise
            self.open()
            executor = self.executor
            if executor is not None:
                executor.enter()
        return executor

    def admit(
        self,
        work: Work,
        reservation: Reservation,
        identity: Identity | None,  # noqa: ARG002 - judged: an inline policy has none
        memory: int | None,  # noqa: ARG002 - judged: `each.memory` needs a process
    ) -> LocalAdmission:
        return InlineAdmission(self, work, reservation, self.enter)

    def close(self) -> None:
        """Close the ways in, and remove the cgroup unless threads of another worker are in it."""
        for former in self._former:
            former.entrance.close()
        if self.executor is not None:
            self.executor.close()
        if self._home is not None:
            self._home.close()


class ThreadConfinement(InlineConfinement):
    """Its work runs in threads of its own, which settle in its threaded cgroup for good."""

    def __init__(
        self,
        policy: Policy,
        key: str | None,
        verdict: Verdict,
        instance: Instance,
        hook: pluggy.HookRelay,
        threads: ThreadExecutors,
        generation: int = 0,
        watch: Callable[[Cgroup, Policy, str | None], object] | None = None,
    ) -> None:
        super().__init__(policy, key, verdict, instance, hook, generation, watch)
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
        """Confine the calling thread for good: its cgroup, then all that it must give up. Raises `KernelError`."""
        self.enter()
        self._hook.rcon_drop(policy=self.policy, place="thread", identity=identity)
        if identity is not None:
            join_new_session_keyring()
