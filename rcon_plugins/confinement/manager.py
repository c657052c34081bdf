"""The start-up sequence of every server: from settings to a `RunningManager`.

1. `Manager` loads the plugins and judges the settings.
2. `Manager.deploy` is called once for a server. It opens the ledger of the memory budget, makes the cgroup tree, judges
   again if that part of the tree offers less, moves the process into the tree if its threads need that, and logs
   warnings.
3. `Deployment.start` is called in each process that serves. It starts a `RunningManager` with its fork server.

A server of one process does all of it with `Manager.start`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rcon_plugins.builtin.log import LOGGER
from rcon_plugins.confinement.budget import machine_ledger
from rcon_plugins.confinement.live_policies import Change, LivePolicies, PolicyChangeLog, change_limit
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.confinement.running import RunningManager
from rcon_plugins.errors import KernelError
from rcon_plugins.executors.output import Log, standard_error
from rcon_plugins.tally.writer import Tally
from rcon_plugins.tree import runtime
from rcon_plugins.tree.instance import Instance

if TYPE_CHECKING:
    from rcon_plugins.confinement.isolation import Server
    from rcon_plugins.executors.inside import Service
    from rcon_plugins.kernel.cgroup import Hierarchy
    from rcon_plugins.settings.file import Settings


class Manager:
    """Settings judged for this machine and server. Changes nothing on the machine until it is started."""

    def __init__(
        self,
        settings: Settings,
        *,
        server: Server | None = None,
        plugins: Sequence[object] = (),
        hierarchy: Hierarchy | None = None,
        memory: Mapping[str, int] | None = None,
    ) -> None:
        """Load the plugins and judge the policies. Raises `SettingsError` for a policy that cannot be enforced here.

        :param server: the traits of the server; by default other threads of the process serve, too.
        :param plugins: plugins in addition to those that the settings name.
        :param hierarchy: the part of the cgroup tree to judge for; by default that of this machine.
        :param memory: more memory limits in bytes that must fit into the budget, by their key in an error message.
        """
        self.plan = Plan.make(settings, server, plugins, hierarchy)
        for key, size in (memory or {}).items():
            self.plan.check_fits(size, key)
        self.plan.check()

    def start(
        self,
        service: Service | None = None,
        *,
        on_lost: Callable[[], object] | None = None,
        after_fork: Sequence[Callable[[], object]] = (),
        server_files: Sequence[int] = (),
        log: Log = standard_error,
    ) -> RunningManager:
        """Deploy, and start confining in the calling process: for a server of one process.

        `RunningManager.close` removes the cgroup tree too. See `Deployment.start` for the parameters and errors.
        """
        self.plan.check_service(service)
        deployment = self.deploy()
        try:
            return deployment.start(
                service,
                on_lost=on_lost,
                after_fork=after_fork,
                server_files=server_files,
                log=log,
                on_close=deployment.close,
            )
        except BaseException:
            deployment.close()
            raise

    def deploy(self, *, owner: tuple[int, int] | None = None, changeable: bool = False) -> Deployment:
        """Make the cgroup tree of a server, once for all its processes. Log the warnings of the plan.

        Call it in the process that will close the deployment, before it forks the processes that serve.

        :param owner: the (uid, gid) of the processes that will serve, if it differs from this process's.
        :param changeable: enable `Deployment.change`, which costs one fstat(2) for each unit of work.
        :raises KernelError: the tree cannot be made (`DelegationError`, with the remedy).
        :raises SettingsError: this part of the cgroup tree cannot enforce a policy.
        """
        plan = self.plan
        if plan.settings.budget is not None:
            machine_ledger()  # opened as this user: the processes that serve may have another
        with plan.finding_base(plan.settings.file):
            instance = Instance.create(plan.hierarchy, base=plan.settings.cgroup, owner=owner)
        try:
            plan = plan.within(instance.hierarchy)
            if plan.needs_adoption(instance):
                instance.adopt()
            warnings = plan.warnings(None if owner is None else owner[0])
            changes = PolicyChangeLog() if changeable else None
        except BaseException:
            instance.close()
            raise
        for warning in warnings:
            LOGGER.warning("rcon: %s", warning)
        return Deployment(plan, instance, changes, _runtime_directory(instance, owner))


class Deployment:
    """Judged settings and the cgroup tree of one server. The processes that serve inherit it by fork.

    Made by `Manager.deploy`.
    """

    def __init__(
        self, plan: Plan, instance: Instance, changes: PolicyChangeLog | None, directory: str | None
    ) -> None:
        self.plan = plan
        #: The directory of the tallies of this server; None if there is none.
        self.directory = directory
        self.instance = instance
        #: The policies as they are now, seen from this process.
        self.policies = LivePolicies(plan.settings.policies, changes)
        #: How often a reload changed each policy. A changed policy gets new cgroups, because processes that still
        #: finish work under the old policy would write the old limits back.
        self.generations: dict[str, int] = {}
        self._changes = changes
        self._judged_in = os.getpid()

    def start(
        self,
        service: Service | None = None,
        *,
        on_lost: Callable[[], object] | None = None,
        after_fork: Sequence[Callable[[], object]] = (),
        server_files: Sequence[int] = (),
        log: Log = standard_error,
        on_close: Callable[[], object] = lambda: None,
    ) -> RunningManager:
        """Start confining in the calling process, and fork its fork server if a policy needs processes.

        Call it in each process that serves, after the application is loaded and before other threads run.

        :param service: what an executor process does with each unit of work.
        :param on_lost: called in another thread if the fork server ends early. From then on all work that needs a
            process is refused, so replace the host.
        :param after_fork: called in each new executor process.
        :param server_files: descriptors of regular files that executor processes must not have. They never have the
            server's sockets and pipes.
        :param log: the log for the output of executor processes with a user of their own; see `log_of`.
        :param on_close: called last by `RunningManager.close`.
        :raises ConfinementError: a policy needs processes and there is no service.
        :raises SettingsError: this process lacks what a policy needs.
        """
        self.plan.check_service(service)
        if self._judged_in != os.getpid():
            self.plan.check_process()
        tally = _tally(self.directory)
        try:
            running = RunningManager(
                self.plan,
                self.instance,
                dict(self.generations),
                self._changes,
                tally,
                on_lost=on_lost,
                on_close=on_close,
            )
            running.begin(service, after_fork, server_files, log)
        except BaseException:
            tally.close()
            raise
        return running

    def change(self, policy: str, key: str, value: str) -> Change:
        """Change one limit of a policy in place: for running work and for work to come, in every process.

        Call it in one process, by one thread at a time; see `change_limit`. Raises `RconError`.
        """
        return change_limit(self.plan, self.policies, self.instance, policy, key, value)

    def reload(self, manager: Manager) -> None:
        """Use other settings for the processes that start from now on. Running processes keep the old ones.

        Make ``manager`` for the `Instance.hierarchy` of this deployment: the cgroup base does not change. Raises
        `KernelError`, and changes nothing, if the budget's ledger cannot be opened or the process cannot be moved.
        """
        plan = manager.plan
        if plan.settings.budget is not None:
            machine_ledger()
        if plan.needs_adoption(self.instance):
            self.instance.adopt()
        if plan.settings.cgroup != self.plan.settings.cgroup:
            LOGGER.warning("rcon: a changed `cgroup` takes effect at the next start, not at a reload")
        for name, policy in plan.settings.policies.items():
            if self.policies.by_name.get(name, policy) != policy:
                self.generations[name] = self.generations.get(name, 0) + 1
        self.policies = LivePolicies({**self.policies.by_name, **plan.settings.policies}, self._changes)
        self.plan = plan

    def close(self) -> None:
        """End all work and remove the cgroup tree. Do nothing except in the process that made it."""
        try:
            self.instance.close()
        finally:
            if self.directory is not None and self._judged_in == os.getpid():
                runtime.end(self.directory)


def _runtime_directory(instance: Instance, owner: tuple[int, int] | None) -> str | None:
    """Make the directory of the tallies, and remove those of servers that ended long ago. Log why there is none."""
    try:
        directory = runtime.make(instance.path.rpartition("/")[2], owner)
    except KernelError as error:
        LOGGER.warning("rcon: what this server counts cannot be read by rcon top, stat and ls: %s", error)
        return None
    runtime.collect()
    return directory


def _tally(directory: str | None) -> Tally:
    """Return the tally of this process. It counts nothing if its file cannot be made, which the log says."""
    if directory is None:
        return Tally.nowhere()  # said at the start
    try:
        return Tally.take(directory)
    except KernelError as error:
        LOGGER.warning("rcon: what this process counts cannot be read by rcon top, stat and ls: %s", error)
        return Tally.nowhere()
