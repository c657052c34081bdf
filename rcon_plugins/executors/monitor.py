"""What executors need of the monitor of cgroups, which is `rcon_plugins.confinement.monitor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.settings.limits import Limits
    from rcon_plugins.settings.memory import Memory
    from rcon_plugins.settings.policy import Policy


class Monitored(Protocol):
    """The watched cgroup of one executor."""

    @property
    def changed(self) -> bool:
        """Whether its limits differ from the policy's."""

    def memory(self, limit: str) -> Memory | None:
        """Return the limit ``memory`` or ``each.memory`` in force; None without one."""

    def change(self, policies: Mapping[str, Policy]) -> bool:
        """Apply changed policies. Return whether its own is among them, so that it must be watched anew."""

    def finish(self) -> None:
        """Report the last events, and stop watching: the executor has ended, and its cgroup is about to be removed."""


class Monitor(Protocol):
    """Watches the cgroups of executors."""

    def limits(self, name: str, policy: Policy) -> Limits:
        """Return the limits in force for all work of a confinement: the policy's, unless they were changed."""

    def change(self, policies: Mapping[str, Policy]) -> None:
        """Apply changed policies."""

    def watch(self, executor: Executor) -> Monitored:
        """Start watching a new executor, before its process is forked. Raises `KernelError`."""
