"""A plan: settings judged for this machine and server, before anything is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.builtin.plugins import make_plugin_manager
from rcon_plugins.builtin.started import Started
from rcon_plugins.confinement.isolation import Server, Verdict, caveat, judge, process_refusals, shares_memory
from rcon_plugins.errors import ConfinementError, DelegationError, SettingsError
from rcon_plugins.identity.resolution import check as check_identity
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.budget import promised
from rcon_plugins.settings.file import Settings
from rcon_plugins.settings.units import format_size

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance


_STARTED = "rcon.started"


class Plan(NamedTuple):
    """Settings judged for this machine and server: a verdict for each policy. Immutable."""

    settings: Settings
    server: Server
    hierarchy: Hierarchy
    plugins: pluggy.PluginManager
    verdicts: Mapping[str, Verdict]

    @classmethod
    def make(
        cls,
        settings: Settings,
        server: Server | None = None,
        plugins: Sequence[object] = (),
        hierarchy: Hierarchy | None = None,
    ) -> Plan:
        """Load the plugins and judge each policy. Change nothing. Raises `SettingsError`, `KernelError`."""
        hierarchy = hierarchy or Hierarchy.discover()
        manager = make_plugin_manager(settings, plugins)
        contributed = [policy for some in manager.hook.rcon_policies(settings=settings) for policy in some]
        settings, server = settings.with_policies(contributed), server or Server()
        verdicts = {
            name: judge(policy, server, hierarchy, manager.hook) for name, policy in settings.policies.items()
        }
        return cls(settings, server, hierarchy, manager, verdicts)

    def within(self, hierarchy: Hierarchy) -> Plan:
        """Return the plan for a part of the cgroup tree. Judge and check again only if it differs.

        Raises `SettingsError` for what that part cannot enforce.
        """
        if hierarchy == self.hierarchy:
            return self
        verdicts = {
            name: judge(policy, self.server, hierarchy, self.plugins.hook)
            for name, policy in self.settings.policies.items()
        }
        plan = self._replace(hierarchy=hierarchy, verdicts=verdicts)
        plan.check()
        return plan

    @contextlib.contextmanager
    def finding_base(self, file: str | None = None) -> Iterator[None]:
        """Find the base in the ``with`` block. If `cgroup` of the settings names it, a refusal begins with that key.

        ``file`` comes before the key.
        """
        try:
            yield
        except DelegationError as error:
            if self.settings.cgroup is not None:
                where = f"{file}: cgroup" if file else "cgroup"
                error.problem = f"{where}: {error.problem}"
            raise

    def check(self) -> None:
        """Raise `SettingsError` for the first policy that cannot be enforced here: limit, reason, remedy."""
        for verdict in self.verdicts.values():
            verdict.check(self.settings.file)
            check_identity(verdict.policy, self.settings.file)
        self.check_budget()

    def check_process(self) -> None:
        """Raise `SettingsError` for the first policy that the calling process lacks privileges for.

        Call it in a process whose user differs from that of the process that made the plan.
        """
        for verdict in self.verdicts.values():
            verdict._replace(refusals=tuple(process_refusals(verdict))).check(self.settings.file)
            check_identity(verdict.policy, self.settings.file)

    def load_function(self) -> None:
        """Import the function of `executor_started`, once. Call it where the application is loaded.

        Raises `SettingsError` if there is no such function.
        """
        if not self.plugins.has_plugin(_STARTED) and (started := Started.of(self.settings)) is not None:
            self.plugins.register(started, _STARTED)

    def check_service(self, service: object | None) -> None:
        """Raise `ConfinementError` if a policy needs processes and there is no service to run in them."""
        if service is not None:
            return
        for name, verdict in self.verdicts.items():
            if verdict.isolation == "process":
                raise ConfinementError(
                    f"the policy {name!r} needs processes ({verdict.why}), and no service was given to run in them"
                )

    def check_budget(self) -> None:
        """Raise `SettingsError` for the first policy whose memory limit exceeds the whole budget."""
        if self.settings.budget is not None:
            for name, policy in self.settings.policies.items():
                memory = promised(policy)
                if memory is not None:
                    self.check_fits(memory, f"policy.{name}.{_where(policy)}")
                if policy.on_memory is not None:
                    self.check_fits(policy.on_memory.up_to, f"policy.{name}.on_memory.up_to")

    @property
    def budget(self) -> int | None:
        """The whole budget, in bytes, on this machine; None without one. Raises `KernelError`."""
        budget = self.settings.budget
        return None if budget is None else budget.memory.of(self.hierarchy.usable_memory())

    def check_fits(self, memory: int, key: str) -> None:
        """Raise `SettingsError` for a memory limit in bytes, written as ``key``, that exceeds the whole budget."""
        whole = self.budget
        if whole is not None and memory > whole // 2**20 * 2**20:
            raise SettingsError(
                f"{format_size(memory)} never fits: the whole budget is {whole // 2**20}M here",
                key=key,
                value=memory,
                hint="lower it, or raise budget.memory",
                file=self.settings.file,
            )

    def warnings(self, uid: int | None = None) -> list[str]:
        """Return warnings about these settings: untrusted code that is not contained, memory that is not counted.

        ``uid`` is the server's user, if it differs from that of the calling process.
        """
        found: dict[str, list[str]] = {}
        for name, verdict in self.verdicts.items():
            why = caveat(verdict.policy, self.server, uid) if verdict.isolation == "process" else None
            if why is not None:
                found.setdefault(why, []).append(name)
        warnings = [f"{_policies(names)}: {why}" for why, names in found.items()]
        together = [
            verdict
            for verdict in self.verdicts.values()
            if verdict.isolation == "process" and verdict.policy.memory is None
        ]
        unbounded = [one.policy.name for one in together if shares_memory(one.policy, uid)]
        if unbounded:
            warnings.append(
                f"{_policies(unbounded)}: files in /dev/shm, and shared memory, outlive their request or task, and no "
                "limit bounds them together. Set `memory =`."
            )
        passing = [
            one.policy.name
            for one in together
            if one.policy.each.memory is not None and one.policy.name not in unbounded
        ]
        if passing:
            warnings.append(
                f"{_policies(passing)}: a memfd passed over a socket outlives its request or task, and `each.memory` "
                "does not bound it. Set `memory =`."
            )
        limited = [name for name, policy in self.settings.policies.items() if promised(policy) is not None]
        gap = self.hierarchy.swap_gap() if limited else None
        if gap is not None:
            warnings.append(
                f"{_policies(limited)}: memory limits do not bound swap: {gap.reason}. Remedy: {gap.remedy}."
            )
        if self.settings.budget is not None:
            unknown = [name for name, policy in self.settings.policies.items() if promised(policy) is None]
            if unknown:
                warnings.append(
                    f"{_policies(unknown)}: no memory limit, so the budget does not count it. Set `memory =`."
                )
            if self.settings.unmatched == "allow":
                warnings.append("the budget does not count requests and tasks that match no route")
        inside = [name for name, verdict in self.verdicts.items() if verdict.isolation == "inline"]
        where = [_policies(inside)] if inside else []
        if self.settings.unmatched == "allow":
            where.append("requests and tasks that match no route")
        if where and any(policy.user is not None for policy in self.settings.policies.values()):
            warnings.append(
                f"{' and '.join(where)}: the code runs in the server's process and can become the users of other "
                'policies. Set `user =` or `isolation = "process"` to contain untrusted code.'
            )
        return warnings

    @property
    def uses_threads(self) -> bool:
        """Whether threads of the server enter cgroups, so that the server must live in the instance."""
        return any(verdict.isolation in ("inline", "thread") for verdict in self.verdicts.values())

    def needs_adoption(self, instance: Instance) -> bool:
        """Return whether the server's own processes must live in the instance (`Instance.adopt`)."""
        return instance.needs_adoption or (self.uses_threads and instance.threads_need_adoption())

    @property
    def uses_processes(self) -> bool:
        """Whether a fork server is needed."""
        return any(verdict.isolation == "process" for verdict in self.verdicts.values())


def _policies(names: list[str]) -> str:
    return f"{'policy' if len(names) == 1 else 'policies'} {', '.join(names)}"


def _where(policy: Policy) -> str:
    """Return the key of the limit that one unit of work of a policy reserves."""
    where, limit = ("each.memory", policy.each.memory) if policy.each.memory else ("memory", policy.memory)
    return f"{where}.up_to" if limit is not None and limit.expands else where
