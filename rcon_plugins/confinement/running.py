"""A running manager: selects the policy of each unit of work, and admits it to the confinement that enforces it."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NoReturn

from rcon_plugins.builtin.log import LOGGER
from rcon_plugins.builtin.plugins import calling
from rcon_plugins.confinement.budget import MemoryBudget, machine_ledger
from rcon_plugins.confinement.confinement import (
    Confinement,
    Context,
    InlineConfinement,
    ProcessConfinement,
    ThreadConfinement,
)
from rcon_plugins.confinement.isolation import shares_memory
from rcon_plugins.confinement.live_policies import LivePolicies, PolicyChangeLog
from rcon_plugins.confinement.monitor import GroupMonitor
from rcon_plugins.confinement.queue import Reservation, Reservations
from rcon_plugins.confinement.removal import Removals
from rcon_plugins.ending import Ending
from rcon_plugins.errors import (
    ConfinementError,
    IdentityRefused,
    LimitExceeded,
    PidsLimitExceeded,
    RconError,
    Unroutable,
)
from rcon_plugins.executors.inline import leave_missed
from rcon_plugins.executors.inside import other_thread_names
from rcon_plugins.executors.pool import ExecutorPool
from rcon_plugins.executors.thread import ThreadExecutors
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.kernel.process import raise_descriptor_limit
from rcon_plugins.kernel.shared_memory import left_by
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.budget import BUDGET
from rcon_plugins.settings.units import listed
from rcon_plugins.tree.group_names import cgroup_name
from rcon_plugins.tree.locks import ByteLocks

if TYPE_CHECKING:
    from rcon_plugins.confinement.admission import Admission, Host, LocalAdmission, ProcessAdmission
    from rcon_plugins.confinement.plan import Plan
    from rcon_plugins.executors.inside import Service
    from rcon_plugins.executors.output import Log
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tally.layout import Refusal
    from rcon_plugins.tally.writer import Tally
    from rcon_plugins.tree.instance import Instance
    from rcon_plugins.work import Work

#: The number of open files of a server, and of each executor: socket, usage files, entrances of its cgroup, pipes.
_SERVER_FILES = 1024
_EXECUTOR_FILES = 16
#: The key of the confinement of a trial begins so. No request or task has such a key.
_TRIAL = "\0trial "
#: The most pieces of shared memory that the log names at the end.
_MOST_NAMED = 10


class RunningManager:
    """Confines the work of one process. Thread-safe. Made by `Manager.start` or `Deployment.start`.

    Call `admit` for each unit of work, and `close` at the end. Use it only in the process that started it, not in a
    fork.
    """

    def __init__(
        self,
        plan: Plan,
        instance: Instance,
        generations: Mapping[str, int],
        changes: PolicyChangeLog | None,
        tally: Tally,
        on_lost: Callable[[], object] | None,
        on_close: Callable[[], object],
    ) -> None:
        """``on_close`` is called last by `close`, which closes ``tally`` too. See `Deployment` for the others."""
        self.plan = plan
        self.instance = instance
        self.hook = plan.plugins.hook
        self.tally = tally
        self._generations = generations
        self._on_close = on_close
        settings = plan.settings
        self._policies = LivePolicies(settings.policies, changes, self._policies_changed)
        # The hooks that each unit of work calls.
        self._select_policy = calling(self.hook.rcon_select_policy)
        has_plugin = self.hook.rcon_work_started.get_hookimpls()
        self._work_started = calling(self.hook.rcon_work_started) if has_plugin else None
        self._work_finished = calling(self.hook.rcon_work_finished)
        #: The name of the policy for work that no route matches; empty without one.
        self._fallback = settings.fallback or ""
        self._lets_pass = settings.unmatched == "allow"
        self._has_inline = any(verdict.isolation == "inline" for verdict in plan.verdicts.values())
        #: Guards `_confinements` and their users. Held for a short time only.
        self._lock = threading.Lock()
        #: Held while a confinement is made.
        self._making = threading.Lock()
        self._confinements: OrderedDict[str, Confinement] = OrderedDict()
        self._pid = os.getpid()
        #: Whether work is admitted: between `begin` and `close`.
        self._open = False
        self._began = 0.0
        #: The policies whose executors share the server's memory, which stays when they have ended, and their users.
        self._sharing: frozenset[str] = frozenset()
        self._sharing_uids: set[int] = set()
        self._budget = _budget(plan)
        self._reservations = Reservations(ByteLocks(instance.locks), self._budget, lambda: self._open)
        self._monitor = GroupMonitor(instance, self.hook, self._key_of, settings.policies)
        self._threads = ThreadExecutors(settings.threads)
        self._removals = Removals(self._is_needed, self._threads.serves)
        self._pool = ExecutorPool(
            instance,
            self.hook,
            settings.processes,
            is_kept=self._confinements.__contains__,
            on_end=self._remove_unused,
            on_spawn=lambda name, policy: tally.spawn(tally.record(policy.name, self._key_of(name))),
            on_evict=lambda name, policy: tally.evict_executor(tally.record(policy.name, self._key_of(name))),
            on_too_much_memory=lambda name, policy: tally.replace_for_memory(
                tally.record(policy.name, self._key_of(name))
            ),
            on_lost=on_lost,
            monitor=self._monitor,
            current=self._policies.latest,
            key_of=self._key_of,
        )

    def begin(
        self,
        service: Service | None,
        after_fork: Sequence[Callable[[], object]],
        server_files: Sequence[int],
        log: Log,
    ) -> None:
        """Fork the fork server if a policy needs processes. See `Deployment.start` for the parameters."""
        settings, plan = self.plan.settings, self.plan
        threads = settings.confinements + settings.threads if plan.uses_threads else 0
        executors = threads + (settings.processes if plan.uses_processes else 0)
        raise_descriptor_limit(_SERVER_FILES + executors * _EXECUTOR_FILES)
        # First of all: the trial of namespaces that this makes counts for the fork server and all executors.
        self._sharing = frozenset(
            name
            for name, verdict in plan.verdicts.items()
            if verdict.isolation == "process" and shares_memory(verdict.policy)
        )
        if service is not None and plan.uses_processes:
            ledger = () if self._budget is None else (self._budget.ledger.file,)
            changes = () if self._policies.changes is None else (self._policies.changes.file,)
            plan.load_function()
            # Threads of a job runner are its own.
            names = () if plan.server.tasks else other_thread_names()
            self._pool.processes.start(service, after_fork, [*server_files, *ledger, *changes], log, names)
        try:
            # Celery ends a pool process that does not report within seconds.
            if self._pool.processes.usable and not plan.server.tasks:
                self._try_an_executor()
            if plan.uses_processes:
                self.instance.sweep_dead()
            if plan.uses_threads:
                self.instance.sweep_threaded(settings.confinements)
        except BaseException:
            with contextlib.ExitStack() as last:  # nobody else would end the fork server
                last.callback(self._removals.close)
                last.callback(self._monitor.close)
                last.callback(self._pool.close)
            raise
        self._began = time.time()
        self._open = True

    def _try_an_executor(self) -> None:
        """Make an executor process and end it: what would refuse every request stops the server now.

        It gets a confinement of its own: running work of other processes of the server neither hinders it nor is
        hindered. Do nothing if no policy says as whom its work runs before there is some. Raises `ConfinementError`.
        """
        for policy in self._of_processes():
            try:
                identity = resolve(policy, {})
            except RconError:
                continue
            name = cgroup_name(policy.name, f"{_TRIAL}{self._pid}", self._generations.get(policy.name, 0))
            try:
                self._pool.try_one(name, policy, identity)
            except (ConfinementError, OSError) as error:
                raise ConfinementError(
                    f"policy {policy.name}: no executor process can serve: {error}"
                ) from error
            return

    def _of_processes(self) -> list[Policy]:
        """Return the policies whose work runs in processes, the one for work without a route first."""
        verdicts = self.plan.verdicts
        found = [
            policy for name, policy in self._policies.by_name.items() if verdicts[name].isolation == "process"
        ]
        return sorted(found, key=lambda policy: policy.name != self._fallback)

    def close(self) -> None:
        """Kill running work, end all executor processes, and remove the cgroups that this manager made.

        An executor thread cannot be killed: it ends after its work. Its cgroup, and the tree around it, may stay until
        the next start removes them. Do nothing except in the process that started the manager.
        """
        if self._pid != os.getpid() or not self._open:
            return
        self._open = False
        leave_missed()  # or the cgroup that this thread is in would stay
        with contextlib.ExitStack() as last:  # run each step, even if an earlier one fails
            last.callback(self._on_close)
            last.callback(self.tally.close)
            last.callback(self._removals.close)
            last.callback(self._report_shared_memory)
            for confinement in self._confinements.values():
                if not confinement.users:  # otherwise a thread is in it, or about to enter
                    last.callback(self._drop, confinement)
            last.callback(self._threads.close)
            last.callback(self._monitor.close)
            last.callback(self._pool.close)
        self._confinements.clear()

    @property
    def fork_server_pid(self) -> int | None:
        """The pid of the fork server; None without one."""
        return self._pool.processes.server_pid or None

    @property
    def is_lost(self) -> bool:
        """Whether the fork server ended early, so that no work that needs a process can start."""
        return self._pool.processes.lost

    def admit(
        self, work: Work, *, wait: bool = False, memory: Callable[[Policy], int | None] | None = None
    ) -> LocalAdmission | ProcessAdmission | None:
        """Admit a unit of work under its policy. Return None when no route names it and the settings allow that.

        On an error the work must not run; hooks and log have received the error already. With ``wait``, wait for a free
        slot instead of raising `ConcurrencyLimitExceeded`. In both cases the settings bound the wait for the memory
        budget; the error's ``limit`` is `BUDGET` then. ``memory`` is called with the policy. If it returns a number of
        bytes, that replaces ``each.memory`` for this work alone.

        Raises `ConfinementError` if the work cannot be confined, `Unroutable` if it has no policy, `IdentityRefused` if
        its policy does not allow the identity it would get, `ConcurrencyLimitExceeded` if the policy's concurrency or
        the budget is used up, `PidsLimitExceeded` if its confinement has as many processes as it may.
        """
        if self._pid != os.getpid() or not self._open:
            self._refuse(work, "", None, ConfinementError(self._why_not_here()))
        if self._has_inline:
            leave_missed()
        name, key, policies = "", None, self._policies
        try:
            name = self._select_policy(work=work) or self._fallback
            if not name and self._lets_pass:
                return None
            if policies.changes is not None:
                policies.refresh()
            policy = policies.by_name.get(name)
            if policy is None:
                raise _no_policy(work, name)
            key = work.attributes.get(policy.per) if policy.per is not None else None
            identity = resolve(policy, work.attributes) if policy.user is not None else None
            if name in self._sharing:
                self._sharing_uids.add(os.geteuid() if identity is None else identity.uid)
            confinement = self._hold(policy, key)
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything; the work does not run
            self._refuse(work, name, key, error)
        record = self.tally.record(name, key)
        reservation = Reservation(record)
        try:
            own_memory = memory(policy) if memory is not None else None
            if policy.concurrency is not None or self._budget is not None:
                self._reservations.reserve(
                    reservation, confinement.policy, confinement.first_slot, own_memory, wait=wait
                )
            if self._work_started is not None:
                self._work_started(work=work, policy=policy)
            if wait:
                admit = partial(confinement.admit, work, reservation, identity, own_memory)
                admission = self._reservations.retry(wait, admit)
            else:
                admission = confinement.admit(work, reservation, identity, own_memory)
            self.tally.begin(record)
            return admission
        except BaseException as error:
            self._release(confinement, reservation)
            if not isinstance(error, Exception):
                raise
            self._refuse(work, name, key, error)

    def policy_of(self, work: Work) -> Policy | None:
        """Return the policy that a unit of work gets if it is admitted now; None if it runs without limits.

        On an error the work must not run; hooks and log have received the error already. Raises as `admit` does.
        """
        name = ""
        try:
            name = self._select_policy(work=work) or self._fallback
            if not name and self._lets_pass:
                return None
            policy = self._policies.all().get(name)
            if policy is None:
                raise _no_policy(work, name)
            return policy
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything; the work does not run
            self._refuse(work, name, None, error)

    def _hold(self, policy: Policy, key: str | None) -> Confinement:
        """Return the confinement of a policy and key, and count one more user. Make it if it is not kept."""
        generation = self._generations.get(policy.name, 0)
        name = cgroup_name(policy.name, key, generation)
        with self._lock:
            confinement = self._confinements.get(name)
            if confinement is not None:
                self._confinements.move_to_end(name)
                confinement.users += 1
                return confinement
        with self._making:
            with self._lock:
                confinement = self._confinements.get(name)
                if confinement is not None:
                    confinement.users += 1
                    return confinement
            try:
                confinement = self._make(policy.name, key, generation)
            except BaseException:
                self._monitor.forget(name)
                raise
            with self._lock:
                confinement.users += 1
                self._confinements[name] = confinement
                superfluous = self._take_superfluous()
            for one in superfluous:
                self.tally.evict(self.tally.record(one.policy.name, one.key))
                self._drop(one)
        return confinement

    def _make(self, policy_name: str, key: str | None, generation: int) -> Confinement:
        # Look the policy up again: it may have changed while this thread waited.
        policy = self._policies.by_name[policy_name]
        isolation = self.plan.verdicts[policy_name].isolation
        if isolation == "process":
            return ProcessConfinement(policy, key, generation, self._conclude, self._pool)
        context = Context(self.instance, self.hook, self._monitor, self._conclude)
        if isolation == "inline":
            threaded = InlineConfinement(policy, key, generation, context)
        else:
            threaded = ThreadConfinement(policy, key, generation, context, self._threads)
        threaded.open()
        return threaded

    def _report_shared_memory(self) -> None:
        """Name in the log what users of executors left in shared memory: it stays until somebody removes it."""
        left = left_by(self._sharing_uids, self._began) if self._sharing_uids else []
        if left:
            named = listed([f"{one.name!r} (uid {one.uid})" for one in left], _MOST_NAMED)
            size = sum(one.size for one in left) / 2**20
            LOGGER.warning(
                "rcon: users of executors left %.1f MiB of shared memory: %s. Remove it (rm, ipcrm).",
                size, named,
            )  # fmt: skip

    def _take_superfluous(self) -> list[Confinement]:
        """Take unused confinements out of those kept until their number is allowed, least recently used first."""
        excess = len(self._confinements) - self.plan.settings.confinements
        if excess <= 0:
            return []
        idle = (name for name, kept in self._confinements.items() if not kept.users)
        return [self._confinements.pop(name) for name in list(itertools.islice(idle, excess))]

    def _drop(self, confinement: Confinement) -> None:
        """End the executors of a confinement that is no longer kept, and have its cgroup removed."""
        name = confinement.name
        self._threads.forget(name)
        self._monitor.forget(name)
        if (threaded := confinement.close_files()) is not None:
            self._removals.remove(name, threaded)
        self._pool.forget(name)
        if not self._pool.processes.serves(name):
            self._pool.processes.submit(partial(self._remove_unused, name))

    def _remove_unused(self, name: str) -> None:
        """Remove the cgroup of a confinement that is not kept and whose executor processes have all ended.

        Called in the supervisor's thread when an executor has ended, and when a confinement is dropped: whichever is
        last finds the other done.
        """
        with self._making:  # so that no thread is about to make the confinement again
            if self._is_needed(name):
                return
            self._monitor.forget(name)
        self._removals.remove(name, self.instance.policy_cgroup(name))

    def _is_needed(self, name: str) -> bool:
        return name in self._confinements or self._pool.processes.serves(name)

    def _policies_changed(self, changed: Mapping[str, Policy]) -> None:
        """Apply changed policies to confinements and pool. Called before any thread gets one from `LivePolicies`."""
        with self._making:
            for confinement in list(self._confinements.values()):
                confinement.policy = changed.get(confinement.policy.name, confinement.policy)
        self._pool.change(changed)

    def _conclude(self, admission: Admission) -> None:
        """Release what an admission holds, and report its outcome. Called once for each admission."""
        self._release(admission.host, admission.reservation)
        if admission.outcome is not None:
            if admission.reservation.record is not None:
                self.tally.end(admission.reservation.record, admission.outcome)
            self._report(admission.work, admission.outcome)

    def _release(self, confinement: Host, reservation: Reservation) -> None:
        with self._lock:
            confinement.users -= 1
            idle = not confinement.users
        if idle and self._monitor.expands:
            self._monitor.shrink(confinement.name)
        if reservation.slot is not None or reservation.memory is not None:
            self._reservations.release(reservation)

    def _refuse(self, work: Work, policy: str, key: str | None, error: Exception) -> NoReturn:
        """Count, and report to hooks and log, that the work does not run, and raise the error."""
        # Work without a policy gets one record: a client may invent the names.
        record = self.tally.record(*((policy, key) if policy in self._policies.by_name else ("", None)))
        self.tally.refuse(record, _reason_of(error))
        if isinstance(error, LimitExceeded):
            error.policy, error.key = policy, key
            ending: Ending = "pids" if isinstance(error, PidsLimitExceeded) else "concurrency"
            self._report(
                work, Outcome(ending=ending, policy=policy, key=key, limit=error.limit, detail=str(error))
            )
            raise error
        self._report(work, Outcome(ending=_kind_of(error), policy=policy, key=key, detail=str(error)))
        if isinstance(error, ConfinementError):
            raise error
        raise ConfinementError(f"{work.name}: {type(error).__name__}: {error}") from error

    def _report(self, work: Work, outcome: Outcome) -> None:
        try:
            self._work_finished(work=work, outcome=outcome)
        except Exception:  # noqa: BLE001 - the work is over: log the error of the plugin
            LOGGER.exception("rcon: a plugin failed in rcon_work_finished")

    def _key_of(self, name: str) -> str | None:
        confinement = self._confinements.get(name)
        return None if confinement is None else confinement.key

    def _why_not_here(self) -> str:
        if self._pid == os.getpid():
            return "the manager is closed"
        return (
            f"the manager was started in process {self._pid}, and this is its fork {os.getpid()}; "
            "start one in each process that serves (see the adapter for this server)"
        )


def _reason_of(error: Exception) -> Refusal:
    if isinstance(error, PidsLimitExceeded):
        return "pids"
    if isinstance(error, LimitExceeded):
        if error.limit == BUDGET:
            return "budget"
        return "processes" if error.limit == "processes" else "concurrency"
    return _kind_of(error)


def _kind_of(error: Exception) -> Literal["forbidden", "unroutable", "refused"]:
    """Return why work was refused without a limit. The tally and the outcome have the same words for it."""
    if isinstance(error, IdentityRefused):
        return "forbidden"
    return "unroutable" if isinstance(error, Unroutable) else "refused"


def _budget(plan: Plan) -> MemoryBudget | None:
    settings, whole = plan.settings.budget, plan.budget
    return None if settings is None or whole is None else MemoryBudget(machine_ledger(), whole, settings.wait)


def _no_policy(work: Work, name: str) -> ConfinementError:
    if name:
        return ConfinementError(f"a plugin selected the policy {name!r}, which does not exist")
    return Unroutable(
        f"no route names {work.quoted()}; add a route or a policy named `default`, "
        'or set unmatched = "allow" to let such work run without limits'
    )
