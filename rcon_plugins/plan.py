"""What settings come to on this machine and this server: known, and refused, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.identity import check as check_identity
from rcon_plugins.isolation import Server, Verdict, judge
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.plugins import make_plugin_manager
from rcon_plugins.settings import Settings

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.instance import Instance


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

    def warnings(self) -> list[str]:
        """One sentence for each policy whose boundary this kernel cannot make as strong as it should be."""
        return [
            f"policy {name}: {verdict.caveat}"
            for name, verdict in self.verdicts.items()
            if verdict.isolation == "process" and verdict.caveat is not None
        ]

    @property
    def uses_threads(self) -> bool:
        """Whether threads of the server will enter cgroups, for which the server must live in the instance."""
        return any(verdict.isolation in ("inline", "thread") for verdict in self.verdicts.values())

    def wants_adoption(self, instance: Instance) -> bool:
        """Whether the server's own processes must live in the instance (`Instance.adopt`) for this plan to work."""
        # v2 moves threads within one domain only; v1 does not care, but another user may not go back to where root had
        # put the server.
        elsewhere = instance.hierarchy.layout == "v2" or instance.user is not None
        return instance.needs_adoption or (self.uses_threads and elsewhere)

    @property
    def uses_processes(self) -> bool:
        """Whether a fork server is needed."""
        return any(verdict.isolation == "process" for verdict in self.verdicts.values())
