"""What settings come to on this machine and this server: known, and refused, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.builtin.plugins import make_plugin_manager
from rcon_plugins.confinement.isolation import Server, Verdict, caveat, judge
from rcon_plugins.errors import SettingsError
from rcon_plugins.identity.resolution import check as check_identity
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.budget import promised
from rcon_plugins.settings.file import Settings
from rcon_plugins.settings.units import Size

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance


class Plan(NamedTuple):
    """What the settings come to on this machine and this server, before anything is made."""

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
        """Load the plugins and judge each policy. Changes nothing. Raises `SettingsError`, `KernelError`."""
        hierarchy = hierarchy or Hierarchy.discover()
        manager = make_plugin_manager(settings, plugins)
        contributed = [policy for some in manager.hook.rcon_policies(settings=settings) for policy in some]
        return cls(settings.with_policies(contributed), server or Server(), hierarchy, manager, {}).within(
            hierarchy
        )

    def within(self, hierarchy: Hierarchy) -> Plan:
        """The same judged again, for a part of the cgroup tree that may have fewer controllers."""
        verdicts = {
            name: judge(policy, self.server, hierarchy, self.plugins.hook)
            for name, policy in self.settings.policies.items()
        }
        return self._replace(hierarchy=hierarchy, verdicts=verdicts)

    def check(self) -> None:
        """Raise `SettingsError` for the first policy that cannot be enforced here: limit, reason, remedy."""
        for verdict in self.verdicts.values():
            verdict.check(self.settings.file)
            check_identity(verdict.policy, self.settings.file)
        self.check_budget()

    def check_budget(self) -> None:
        """Raise `SettingsError` for the first policy that never fits into the budget."""
        if self.settings.budget is not None:
            for name, policy in self.settings.policies.items():
                memory = promised(policy)
                if memory is not None:
                    self.check_fits(memory, f"policy.{name}.{_where(policy)}")
                if policy.on_memory is not None:
                    self.check_fits(policy.on_memory.up_to, f"policy.{name}.on_memory.up_to")

    @property
    def budget(self) -> int | None:
        """The whole budget, in bytes, on this machine; None without one. Raises KernelError."""
        budget = self.settings.budget
        return None if budget is None else budget.memory.of(self.hierarchy.usable_memory())

    def check_fits(self, memory: Size, key: str) -> None:
        """Raise `SettingsError` for a limit of memory, written as ``key``, that is above the whole budget."""
        whole = self.budget
        if whole is not None and memory > whole // 2**20 * 2**20:
            raise SettingsError(
                f"{memory} never fits: the whole budget is {whole // 2**20}M here",
                key=key,
                value=memory,
                hint="lower it, or raise budget.memory",
                file=self.settings.file,
            )

    def warnings(self, uid: int | None = None) -> list[str]:
        """Where work in processes is bounded against accidents only, and why: one sentence for each reason.

        ``uid`` is the server's user, where it is not that of the calling process yet.
        """
        found: dict[str, list[str]] = {}
        for name, verdict in self.verdicts.items():
            why = caveat(verdict.policy, uid) if verdict.isolation == "process" else None
            if why is not None:
                found.setdefault(why, []).append(name)
        warnings = [f"{', '.join(names)}: {why}" for why, names in found.items()]
        if self.settings.budget is not None:
            unknown = [name for name, policy in self.settings.policies.items() if promised(policy) is None]
            if self.settings.unmatched == "allow":
                unknown.append("work that no route names")
            if unknown:
                warnings.append(
                    f"{', '.join(unknown)}: without a limit of memory, so that the budget does not count it"
                )
        inside = [name for name, verdict in self.verdicts.items() if verdict.isolation == "inline"]
        if self.settings.unmatched == "allow":
            inside.append("work that no route names")
        if inside and any(policy.user is not None for policy in self.settings.policies.values()):
            warnings.append(
                f"{', '.join(inside)}: runs in the server's own process, which may become other users for the sake of "
                "other policies: so may code that means harm there"
            )
        return warnings

    @property
    def uses_threads(self) -> bool:
        """Whether threads of the server will enter cgroups, for which the server must live in the instance."""
        return any(verdict.isolation in ("inline", "thread") for verdict in self.verdicts.values())

    def wants_adoption(self, instance: Instance) -> bool:
        """Whether the server's own processes must live in the instance (`Instance.adopt`) for this plan to work."""
        return instance.needs_adoption or (self.uses_threads and instance.threads_need_adoption())

    @property
    def uses_processes(self) -> bool:
        """Whether a fork server is needed."""
        return any(verdict.isolation == "process" for verdict in self.verdicts.values())


def _where(policy: Policy) -> str:
    """The key of the limit that is promised to one work of a policy."""
    where, limit = ("each.memory", policy.each.memory) if policy.each.memory else ("memory", policy.memory)
    return f"{where}.up_to" if limit is not None and limit.expands else where
