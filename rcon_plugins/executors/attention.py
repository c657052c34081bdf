"""What a manager wants to know of the cgroups of executors: see `rcon_plugins.confinement.monitor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.settings.limits import Limits
    from rcon_plugins.settings.memory import Memory
    from rcon_plugins.settings.policy import Policy


class Attention(Protocol):
    """What is kept of the events of an executor's cgroup, and of its limits that may change."""

    @property
    def changed(self) -> bool:
        """Whether the limits of its leaf are not the policy's any more."""

    def memory(self, limit: str) -> Memory | None:
        """The limit ``memory`` or ``each.memory`` in force; None where there is none."""

    def change(self, policies: Mapping[str, Policy]) -> bool:
        """These policies are otherwise now; whether its own is among them, and is to be watched anew."""

    def part(self) -> None:
        """The executor has ended, and its leaf is about to be removed."""


class Attendant(Protocol):
    """Who wants to know what happens to the cgroups of executors."""

    def limits(self, name: str, policy: Policy) -> Limits:
        """Of a confinement, for all of its work together: the policy's, unless they were changed."""

    def change(self, policies: Mapping[str, Policy]) -> None:
        """These policies are otherwise now."""

    def attend(self, executor: Executor) -> Attention:
        """Begin to watch a new executor, before it is born, and its confinement. Raises `KernelError`."""
