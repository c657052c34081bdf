"""The manager: which policy a work gets, and the confinement that puts it in force."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from rcon_plugins.builtin.log import LOGGER
from rcon_plugins.builtin.plugins import calling
from rcon_plugins.confinement.admission import Admission, LocalAdmission, ProcessAdmission
from rcon_plugins.confinement.budget import MemoryBudget, machine_ledger
from rcon_plugins.confinement.confinement import (
    Confinement,
    InlineConfinement,
    ProcessConfinement,
    ThreadConfinement,
    cgroup_name,
)
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.confinement.live_policies import LivePolicies, PolicyChangeLog
from rcon_plugins.confinement.monitor import GroupMonitor
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.confinement.queue import Reservation, Reservations
from rcon_plugins.ending import Ending
from rcon_plugins.errors import (
    ConfinementError,
    IdentityRefused,
    KernelError,
    LimitExceeded,
    PidsLimitExceeded,
)
from rcon_plugins.executors.pool import ExecutorPool
from rcon_plugins.executors.thread import ThreadExecutors
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.kernel.process import raise_descriptor_limit
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.file import Settings
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.locks import ByteLocks

if TYPE_CHECKING:
    from rcon_plugins.executors.fork_server import Service
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.work import Work

#: Open files of a server, and of an executor: its socket, usage files, ways in and out of a cgroup, wake-up pipes.
_SERVER_FILES = 1024
_EXECUTOR_FILES = 16


class Manager:
    """Confines the work of one process. Thread-safe once started.

    Make it from settings, `start` it in the process that serves, after the application is loaded and before other
    threads run; ask `admit` for each work; `close` it at the end. Servers of several processes make one `Instance` in
    their parent and give it to the manager of each, so that limits and concurrency hold for all of them together.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        server: Server | None = None,
        instance: Instance | None = None,
        plugins: Sequence[object] = (),
        on_lost: Callable[[], object] | None = None,
        generations: Mapping[str, int] | None = None,
        changes: PolicyChangeLog | None = None,
    ) -> None:
        """Judge the policies. Raises `SettingsError` for one that this machine cannot enforce.

        ``on_lost`` is called, in another thread, if the fork server ends before its time: work that needs a process
        is refused from then on, so the host had best be replaced. ``generations`` says how often a policy of that name
        was changed during the life of the instance (see `cgroup_name`). ``changes`` tells of limits changed since.
        """
        self.plan = Plan.make(settings, server, plugins)
        self.plan.check()
        self.settings = self.plan.settings
        self.hook = self.plan.plugins.hook
        # Those that each work asks.
        self._select_policy = calling(self.hook.rcon_select_policy)
        self._work_started = calling(self.hook.rcon_work_started)
        self._work_finished = calling(self.hook.rcon_work_finished)
        #: Settles the few races between a work's own thread and the supervisor. Held for moments.
        self.lock = threading.Lock()
        self._making = threading.Lock()
        self._owns_instance = instance is None
        self._instance = instance
        self._on_lost = on_lost
        self._generations = generations or {}
        self._in_force = LivePolicies(self.settings.policies, changes, self._renew)
        self._pid = 0
        self._reservations: Reservations | None = None
        self._pool: ExecutorPool | None = None
        self._monitor: GroupMonitor | None = None
        self._threads = ThreadExecutors(settings.threads)
        self._confinements: OrderedDict[str, Confinement] = OrderedDict()

    def start(
        self,
        service: Service | None = None,
        *,
        after_fork: Sequence[Callable[[], object]] = (),
        server_files: Sequence[int] = (),
    ) -> None:
        """Make the instance where none was given, and fork the fork server where a policy needs processes.

        ``service`` is what an executor process does with each work; ``after_fork`` is called in each new one;
        ``server_files`` are descriptors of regular files that it must not have (sockets and pipes it never has). Raises
        `DelegationError` and other `KernelError`, `ConfinementError` where a policy needs processes and there is no
        service.
        """
        if self._pid:
            raise ConfinementError("the manager was started already")
        if self.plan.uses_processes and service is None:
            needy = next(name for name, v in self.plan.verdicts.items() if v.isolation == "process")
            raise ConfinementError(
                f"the policy {needy!r} needs processes ({self.plan.verdicts[needy].why}), "
                "and nobody said what runs in them"
            )
        instance = self._instance
        if instance is None:
            instance = Instance.create(self.plan.hierarchy, base=self.settings.cgroup)
            self._instance = instance
        try:
            self.plan = self.plan.within(instance.hierarchy)
            self.plan.check()
            if self._owns_instance:
                for warning in self.plan.warnings():
                    LOGGER.warning("%s", warning)
                if self.plan.wants_adoption(instance):
                    instance.adopt()
            budget = self._budget()
            self._reservations = Reservations(
                ByteLocks(instance.locks), budget, lambda: self._pid == os.getpid()
            )
            if budget is not None:
                server_files = [*server_files, budget.ledger.file]
            kept = self.settings.confinements + self.settings.threads if self.plan.uses_threads else 0
            executors = kept + (self.settings.processes if self.plan.uses_processes else 0)
            raise_descriptor_limit(_SERVER_FILES + executors * _EXECUTOR_FILES)
            self._monitor = GroupMonitor(instance, self.hook, self._key_of, self.settings.policies)
            if self.plan.uses_processes and service is not None:
                self._pool = ExecutorPool(
                    instance,
                    self.hook,
                    self.settings.processes,
                    is_kept=self._confinements.__contains__,
                    on_end=self._executor_ended,
                    on_lost=self._on_lost,
                    monitor=self._monitor,
                    current=self._in_force.current,
                )
                self._pool.processes.start(service, after_fork, server_files)
        except BaseException:
            if self._owns_instance:
                instance.close()
            raise
        self._pid = os.getpid()

    def close(self) -> None:
        """End all executor processes and remove what this manager made. Work under way is killed.

        Not so in an executor thread, which no one can kill: it ends after its work. Its cgroup, and the tree that
        holds it, may stay then; the next start removes them, once this process is gone.

        Does nothing in a process other than the one that started it.
        """
        if self._pid != os.getpid():
            return
        self._pid = 0
        with contextlib.ExitStack() as last:  # each step, also when one before it fails
            if self._owns_instance and self._instance is not None:
                last.callback(self._instance.close)
            for confinement in self._confinements.values():
                if not confinement.users:  # else a thread is in it, or on its way
                    last.callback(self._drop, confinement)
            last.callback(self._threads.close)
            if self._monitor is not None:
                last.callback(self._monitor.close)
            if self._pool is not None:
                last.callback(self._pool.close)
        self._confinements.clear()

    @property
    def fork_server_pid(self) -> int | None:
        """The pid of the fork server; None without one."""
        return self._pool.processes.server_pid if self._pool is not None else None

    @property
    def is_lost(self) -> bool:
        """Whether the fork server ended before its time, so that no work that needs a process can begin."""
        return self._pool is not None and self._pool.processes.lost

    def admit(
        self, work: Work, *, wait: bool = False, memory: Callable[[Policy], int | None] | None = None
    ) -> LocalAdmission | ProcessAdmission | None:
        """Let a work run under its policy; None when no route names it and the settings allow that.

        Raises `ConfinementError` when the work cannot be confined (`IdentityRefused` when the identity that its policy
        gives it is not allowed), `ConcurrencyLimitExceeded` when as much of it is under way as may be or the budget has
        no room, `PidsLimitExceeded` when its confinement is full of processes. In each case it must not run; hooks and
        log have been told. With ``wait`` it waits for its turn instead of `ConcurrencyLimitExceeded`;
        for the budget, with ``limit`` `BUDGET` in that error, it waits as long as the settings say, either way.
        ``memory`` may say, for its policy, how many bytes this one work has in the place of ``each.memory``.
        """
        if self._pid != os.getpid():
            self._refuse(work, "", None, ConfinementError(self._why_not_here()))
        policy_name, key = "", None
        try:
            selected = self._select(work)
            if selected is None:
                return None
            policy_name = selected
            policy = self._in_force.current(self.settings.policies[policy_name])
            key = work.attributes.get(policy.per) if policy.per is not None else None
            identity = resolve(policy, work.attributes) if policy.user is not None else None
            confinement = self._hold(policy_name, key)
        except Exception as error:  # noqa: BLE001 - whatever a plugin raises, the work does not run
            self._refuse(work, policy_name, key, error)
        reservation, reservations = Reservation(), self._ready_reservations()
        try:
            own = memory(policy) if memory is not None else None
            reservations.reserve(reservation, confinement, own, wait=wait)
            self._work_started(work=work, policy=policy)
            return reservations.retry(wait, partial(confinement.admit, work, reservation, identity, own))
        except BaseException as error:
            self._let_go(confinement, reservation)
            if not isinstance(error, Exception):
                raise
            self._refuse(work, policy_name, key, error)

    def policy_of(self, work: Work) -> Policy | None:
        """The policy that a work would have, as it is now; None without limits. Raises where it would be refused."""
        selected = self._select(work)
        return None if selected is None else self._in_force.current(self.settings.policies[selected])

    def _renew(self, changed: Mapping[str, Policy]) -> None:
        """These policies are otherwise from now on."""
        with self._making:
            self.settings = self.settings.with_changed(changed)
            for confinement in list(self._confinements.values()):
                confinement.policy = changed.get(confinement.policy.name, confinement.policy)
        if self._pool is not None:
            self._pool.change(changed)

    def _concluded(self, confinement: Confinement, admission: Admission) -> None:
        """Take note of the outcome of an admission, once."""
        self._let_go(confinement, admission.reservation)
        if admission.outcome is not None:
            self._tell(admission.work, admission.outcome)

    def _select(self, work: Work) -> str | None:
        selected: str | None = self._select_policy(work=work) or self.settings.fallback
        if selected is None:
            if self.settings.unmatched == "allow":
                return None
            raise ConfinementError(
                f"no route names {work.quoted()}; add a route or a policy named `default`, "
                'or set unmatched = "allow" to let such work run without limits'
            )
        if selected not in self.settings.policies:
            raise ConfinementError(f"a plugin selected the policy {selected!r}, which does not exist")
        return selected

    def _hold(self, policy_name: str, key: str | None) -> Confinement:
        """The confinement of a policy and key, made where it is not kept, with one more user."""
        name = cgroup_name(policy_name, key, self._generations.get(policy_name, 0))
        with self.lock:
            found = self._confinements.get(name)
            if found is not None:
                self._confinements.move_to_end(name)
                found.users += 1
                return found
        with self._making:
            with self.lock:
                found = self._confinements.get(name)
                if found is not None:
                    found.users += 1
                    return found
            made = self._make_confinement(policy_name, key)
            made.on_conclusion = self._concluded
            with self.lock:
                made.users += 1
                self._confinements[name] = made
                superfluous = self._superfluous()
            for confinement in superfluous:
                self._drop(confinement)
        return made

    def _make_confinement(self, policy_name: str, key: str | None) -> Confinement:
        verdict = self.plan.verdicts[policy_name]
        policy = self.settings.policies[policy_name]
        generation = self._generations.get(policy_name, 0)
        if verdict.isolation == "process":
            if self._pool is None:
                raise ConfinementError(f"{policy_name} needs a process, and there is no fork server")
            return ProcessConfinement(policy, key, verdict, self._pool, generation)
        watch = self._monitor.watch_threads if self._monitor is not None else None
        instance = self._ready_instance()
        if verdict.isolation == "thread":
            return ThreadConfinement(
                policy, key, verdict, instance, self.hook, self._threads, generation, watch
            )
        return InlineConfinement(policy, key, verdict, instance, self.hook, generation, watch)

    def _superfluous(self) -> list[Confinement]:
        """Take out what is kept beyond the bound and unused, the longest unused first."""
        excess = len(self._confinements) - self.settings.confinements
        idle = [name for name, kept in self._confinements.items() if not kept.users]
        return [self._confinements.pop(name) for name in idle[: max(0, excess)]]

    def _drop(self, confinement: Confinement) -> None:
        self._threads.forget(confinement.name)
        if self._monitor is not None:
            self._monitor.forget(confinement.name)
        try:
            confinement.close()
        except KernelError as error:
            LOGGER.error("the cgroup of %s could not be removed: %s", confinement.name, error)
        if isinstance(confinement, ProcessConfinement) and self._pool is not None:
            self._pool.forget(confinement.name)

    def _executor_ended(self, name: str) -> None:
        """An executor process of a confinement is gone: the cgroup goes too, if it is empty and not kept."""
        if name in self._confinements:
            return
        try:
            self._ready_instance().policy_cgroup(name).delete()
        except KernelError as error:
            LOGGER.error("the cgroup of %s could not be removed: %s", name, error)

    def _let_go(self, confinement: Confinement, reservation: Reservation) -> None:
        with self.lock:
            confinement.users -= 1
            idle = not confinement.users
        if idle and self._monitor is not None and confinement.isolation == "process":
            self._monitor.shrink(confinement.name)
        self._ready_reservations().release(reservation)

    def _refuse(self, work: Work, policy: str, key: str | None, error: Exception) -> NoReturn:
        """Tell hooks and log that the work does not run, and raise that."""
        ending: Ending
        if isinstance(error, LimitExceeded):
            error.policy, error.key = policy, key
            ending = "pids" if isinstance(error, PidsLimitExceeded) else "concurrency"
            self._tell(
                work, Outcome(ending=ending, policy=policy, key=key, limit=error.limit, detail=str(error))
            )
            raise error
        ending = "forbidden" if isinstance(error, IdentityRefused) else "refused"
        self._tell(work, Outcome(ending=ending, policy=policy, key=key, detail=str(error)))
        if isinstance(error, ConfinementError):
            raise error
        raise ConfinementError(f"{work.name}: {type(error).__name__}: {error}") from error

    def _tell(self, work: Work, outcome: Outcome) -> None:
        try:
            self._work_finished(work=work, outcome=outcome)
        except Exception:  # noqa: BLE001 - the work is over; a plugin's fault in hearing so is for the log
            LOGGER.exception("a plugin failed in rcon_work_finished")

    def _key_of(self, name: str) -> str | None:
        confinement = self._confinements.get(name)
        return None if confinement is None else confinement.key

    def _budget(self) -> MemoryBudget | None:
        budget, whole = self.settings.budget, self.plan.budget
        return None if budget is None or whole is None else MemoryBudget(machine_ledger(), whole, budget.wait)

    def _ready_reservations(self) -> Reservations:
        if self._reservations is None:
            raise ConfinementError("the manager was not started")
        return self._reservations

    def _ready_instance(self) -> Instance:
        if self._instance is None:
            raise ConfinementError("the manager was not started")
        return self._instance

    def _why_not_here(self) -> str:
        if not self._pid:
            return "the manager is not started, or closed"
        return (
            f"the manager was started in process {self._pid}, and this is a fork of it, {os.getpid()}; "
            "start one in each process that serves (see the adapter for this server)"
        )
